"""`python -m puzzle.cli`, the same as `puzzle`."""

import sys

from puzzle.cli import main

if __name__ == "__main__":
    sys.exit(main())
