"""Step 3 of RLHF on DeepSpeed: `python main.py --help`; torchrun, deepspeed or this script starts processes.

Algorithm, data, clock and log are those of `puzzle`; models, passes and steps are DeepSpeed's.
"""

import argparse
import contextlib
import os
import sys
from dataclasses import asdict
from pathlib import Path

# A script's own folder is on the path, unless PYTHONSAFEPATH is set; the project's root is two folders above
# `applications`.
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parents[3]))

from puzzle.errors import exit_code


def main() -> int:
    """Run; 0 when it ended well, 2 after a user error, a worker's code when that died."""
    from dschat.options import parse

    from puzzle.config.capabilities import require_device
    from puzzle.engine.runtime.identity import Identity, launched
    from puzzle.files import lock
    from puzzle.launch import LAUNCHERS, launch, local, slurm

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--launcher", choices=LAUNCHERS, default="local")
    given, words = parser.parse_known_args()
    try:
        config, zero, out = parse(words)
        require_device(config.device)
        if given.launcher == "slurm" and not slurm.inside():
            return slurm.submit([sys.executable, __file__, *sys.argv[1:]], config.world, out)
        # Processes on other hosts find `dschat` and `puzzle` by it.
        paths = (str(Path(__file__).resolve().parent), sys.path[-1], os.environ.get("PYTHONPATH", ""))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        args = (config.resolved(), asdict(zero), str(out.resolve()))
        with contextlib.nullcontext(None) if (launched() or Identity()).rank else lock.hold(out) as keep:
            target, logs = "dschat.ppo_step:process", out / "ranks"
            launch(given.launcher, target, args, config.world, logs, config.device, keep)
    except local.WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
