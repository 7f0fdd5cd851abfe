"""Runs of which one rank fails."""

import os
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from puzzle.engine.checkpoint import checkpoint
from puzzle.engine.pipeline.stage import StageRun
from puzzle.rlhf.process import process

FAILURES: dict[str, tuple[object, str, Exception]] = {
    "memory": (
        StageRun,
        "compute",
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    ),
    "bug": (StageRun, "compute", ValueError("a bug")),
    "file": (checkpoint, "write_boxes", OSError(28, "No space left on device", "rank-00001.safetensors")),
}


def meets_failure(resolved: dict[str, Any], out: str, kind: str) -> None:
    """A process of `puzzle train` whose rank 1 meets a failure once the run has begun; `out`/failed: when."""

    def fail(*_: object) -> None:
        (Path(out) / "failed").touch()
        raise error

    place, name, error = FAILURES[kind]
    if os.environ["RANK"] == "1":
        mock.patch.object(place, name, fail).start()
    moment = datetime.now().astimezone().isoformat()
    process(resolved, None, out, moment)
