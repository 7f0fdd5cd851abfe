"""What only a GPU can do is refused where there turns out to be none, and not left out in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from puzzle.config.load import load_config
from puzzle.config.resolve import resolve
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.rlhf.policy_generator import build_policy_generator

RUN = ["--actor.init.preset", "350m", "--reward.init.preset", "350m", "--batch", "4"]
RUN += ["--data.random_tokens", "4", "--generation.max_new_tokens", "4", "--layout.dp", "2"]
OTHER = ["--generation.layout.tp", "2", "--generation.layout.dp", "1"]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--generation.keep_graphs", "true"], "generation.keep_graphs"),
        ([*OTHER, "--generation.keep_graphs", "true"], "generation.keep_graphs"),
        ([*OTHER, "--switch.overlap", "prefill"], "switch.overlap prefill"),
    ],
)
def test_device_auto_that_is_a_cpu(words: list[str], key: str) -> None:
    plan = resolve(load_config(None, [*RUN, *words]))
    unused: Any = None
    with pytest.raises(UserError, match=f"^{key}: there is no GPU here, and a CPU "):
        build_policy_generator(plan, World(0, 2, torch.device("cpu")), unused, unused)
