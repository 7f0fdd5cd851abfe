"""What a launcher runs as every process of `puzzle train`; it loads all that ranks need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from puzzle.config.run import TrainConfig
from puzzle.rlhf.trainer import train


def process(
    resolved: dict[str, Any],
    given: dict[str, Any] | None,
    out: str,
    moment: str,
    resume: bool = False,
    note: str = "",
) -> None:
    """One process of the run; its arguments are JSON values, which any launcher can bring to any host.

    `resolved` is the configuration, `given` the part of it that the user gave, `out` the run's folder,
    `moment` when it began, at first (ISO 8601).
    """
    train(TrainConfig.model_validate(resolved), Path(out), resume, note, given, moment)
