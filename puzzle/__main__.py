"""`python -m puzzle`, the same as `puzzle`."""

import sys

from puzzle.cli import main
from puzzle.files.path import leave_working_folder

if __name__ == "__main__":
    leave_working_folder()
    sys.exit(main())
