"""Runs of the DeepSpeed-Chat baseline on real ranks, several in one process group: for `test_dschat`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

CHAT = Path(__file__).resolve().parents[2] / "DeepSpeedExamples" / "applications" / "DeepSpeed-Chat"
if str(CHAT) not in sys.path:
    sys.path.append(str(CHAT))


@dataclass(frozen=True)
class Case:
    """A run: configuration and ZeRO's settings as plain values, prompts, what ends a response.

    Where it is `spoiled`, generation gives other tokens than it draws.
    """

    config: dict[str, Any]
    zero: dict[str, Any]
    out: Path
    prompts: tuple[tuple[int, ...], ...]
    stop_ids: tuple[int, ...] = ()
    spoiled: bool = False


@dataclass
class Found:
    """Weights at the end by role and Hugging Face name."""

    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def run(rank: int, world_size: int, cases: Sequence[Case]) -> list[Found]:
    from puzzle.engine.runtime.world import World

    world = World(rank, world_size, torch.device("cpu"))
    return [_run(world, case) for case in cases]


def _run(world: Any, case: Case) -> Found:
    from dschat.options import ZeroOptions
    from dschat.ppo_step import ChatTrainer
    from dschat.ppo_step import run as run_chat

    from puzzle.config.resolve import resolve
    from puzzle.config.run import TrainConfig
    from puzzle.data.endings import Endings
    from puzzle.data.prepare import RunData
    from puzzle.data.prompts import Prompt, PromptSet, PromptStream

    config = TrainConfig.model_validate(case.config)
    prompts = tuple(Prompt(i, str(i), "", None, tokens) for i, tokens in enumerate(case.prompts))
    stream = PromptStream(PromptSet(prompts), config.batch, config.seed, shuffle=False)
    data = RunData(None, Endings(case.stop_ids, case.stop_ids), stream, None)
    generate = ChatTrainer._generate

    def wrong(*args: Any) -> Tensor:
        return (generate(*args) + 1) % 32

    with patch.object(ChatTrainer, "_generate", wrong if case.spoiled else generate):
        trainer = run_chat(resolve(config), ZeroOptions(**case.zero), case.out, data, world)
    models: dict[str, Any] = {"actor": trainer.models.actor, "critic": trainer.models.by_role["critic"]}
    return Found({role: _weights(model.engine.module) for role, model in models.items()})


def _weights(module: torch.nn.Module) -> dict[str, Tensor]:
    from deepspeed import zero

    found = {}
    for name, parameter in module.named_parameters():
        with zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            # The value model is a classifier inside a module.
            known = name.removeprefix("model.") if name.startswith(("model.model.", "model.score.")) else name
            found[known] = parameter.detach().clone()
    return found
