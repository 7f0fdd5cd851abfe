"""What a launcher runs as every process of `puzzle train`; it loads all that ranks need."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from puzzle.config.run import TrainConfig
from puzzle.rlhf.rewards.weighted import unpickled_function
from puzzle.rlhf.trainer import train


def process(
    resolved: dict[str, Any],
    given: dict[str, Any] | None,
    out: str,
    moment: str,
    resume: bool = False,
    note: str = "",
    reward: Any = None,
) -> None:
    """One process of the run; its arguments are JSON values, which any launcher can bring to any host.

    `resolved` is the configuration, `given` the part of it that the user gave, `out` the run's folder,
    `moment` when it began, at first (ISO 8601), `reward` the callable that the configuration calls `given`,
    as `pickled_function` in base64; where this is the process that started the run, the callable itself.
    """
    function = unpickled_function(base64.b64decode(reward)) if isinstance(reward, str) else reward
    train(TrainConfig.model_validate(resolved), Path(out), resume, note, given, moment, function)
