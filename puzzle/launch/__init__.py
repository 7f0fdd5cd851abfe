"""Launchers place processes; each process runs the same program."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

Launcher = Literal["local", "ray", "slurm"]
LAUNCHERS: tuple[Launcher, ...] = get_args(Launcher)


def launch(
    launcher: Launcher,
    target: str,
    args: Sequence[Any],
    world: int,
    logs: Path | None,
    device: str,
    keep: int | None = None,
) -> None:
    """Run `target` ("module:function") as `world` processes on devices of kind `device` (auto, cpu, cuda).

    `args` are JSON values; processes of this host keep the file descriptor `keep` open (`local`). Raises
    UserError or local.WorkerError with the first failure's line, all others gone.
    """
    if launcher == "local":
        import_module("puzzle.launch.local").run(target, args, world, logs, keep=keep)
    else:
        import_module(f"puzzle.launch.{launcher}").run(target, args, world, logs, device)
