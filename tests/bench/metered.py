"""A run on a CPU whose stages' memory peaks are counted by the profiler: devices count them by themselves."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.profiler import profile

from puzzle.config.run import TrainConfig
from puzzle.engine.runtime import stage_timer as timing
from puzzle.engine.train import offload
from puzzle.engine.train.offload import BLOCK
from puzzle.rlhf.trainer import train


class Meter:
    """Follows every allocation of this process's tensors; `take` is `timing.take_peak` for them."""

    def __init__(self) -> None:
        self.held = 0
        self._begin()

    def _begin(self) -> None:
        self._profile = profile(profile_memory=True)
        self._profile.start()

    def take(self, device: torch.device) -> int:
        """Most bytes held since the last call."""
        self.end()
        profiler: Any = self._profile.profiler
        events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
        totals = [*itertools.accumulate(sizes, initial=self.held)]
        self.held = totals[-1]
        self._begin()
        return max(totals)

    def end(self) -> None:
        """Count no longer."""
        self._profile.stop()


def metered(config: TrainConfig, out: Path) -> None:
    """`train` of one process, with `peak_bytes` in its log."""
    meter = Meter()
    try:
        with (
            mock.patch.object(timing, "take_peak", meter.take),
            mock.patch.object(offload.HostMemory, "_block", _uncounted),
        ):
            train(config, out)
    finally:
        meter.end()


def _uncounted(_self: object) -> torch.Tensor:
    """Host memory is no memory of a device: the profiler shall not see it."""
    return torch.from_numpy(np.empty(BLOCK, np.uint8))
