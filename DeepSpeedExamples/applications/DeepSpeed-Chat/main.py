"""Step 3 of RLHF on DeepSpeed: `python main.py --help`; torchrun, deepspeed or this script starts processes.

Algorithm, data, clock and log are those of `puzzle`; models, passes and steps are DeepSpeed's.
"""

import sys
from pathlib import Path

# A script's own folder is on the path; the project's root is two folders above `applications`.
sys.path.append(str(Path(__file__).resolve().parents[3]))

from dschat.options import parse

from puzzle.errors import UserError
from puzzle.launch import local


def main() -> int:
    """Run; 0 when it ended well, 2 after a user error, a worker's code when that died."""
    try:
        config, zero, out = parse(sys.argv[1:])
        if local.identity()[0] == 0:
            out.mkdir(parents=True, exist_ok=True)
        local.run("dschat.ppo_step:train", (config, zero, out), config.world, out / "ranks")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except local.WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
