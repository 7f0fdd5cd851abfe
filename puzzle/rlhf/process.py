"""What a launcher runs as every process of a run; it loads all that ranks need."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from puzzle.config.run import TrainConfig
from puzzle.config.supervised import SupervisedConfig, config_of
from puzzle.rlhf.rewards.weighted import unpickled_function
from puzzle.rlhf.supervised.trainer import learn
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
    config = config_of(resolved)
    if isinstance(config, SupervisedConfig):
        learn(config, Path(out), resume, note, given, moment)
        return
    assert isinstance(config, TrainConfig), "the other kind of run"
    function = unpickled_function(base64.b64decode(reward)) if isinstance(reward, str) else reward
    train(config, Path(out), resume, note, given, moment, function)
