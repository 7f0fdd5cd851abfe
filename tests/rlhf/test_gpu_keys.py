"""What only a GPU can do is refused where there turns out to be none, and not left out in silence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from puzzle.config.load import load_config
from puzzle.config.resolve import resolve
from puzzle.engine.generate.model_runner import Room
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.rlhf import policy_generator
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


def test_sums_that_peers_cannot_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was asked for is refused, what may be is told; what was not asked for is not tried."""
    asked: list[str] = []

    def declined(_: object, wanted: str) -> str | None:
        asked.append(wanted)
        return None if wanted == "collective" else "no peer access"

    world = World(0, 2, torch.device("cpu"))
    actor: Any = SimpleNamespace(world=world)
    monkeypatch.setattr(policy_generator, "share_sums", declined)
    monkeypatch.setattr(policy_generator, "room_of", lambda *_: Room())

    def build(*words: str) -> object:
        return build_policy_generator(resolve(load_config(None, [*RUN, *words])), world, actor, actor)

    with pytest.raises(UserError, match=r"^generation.tp_sums peer: no peer access; use auto or collective$"):
        build("--generation.tp_sums", "peer")
    build()
    assert not capsys.readouterr().err
    build("--generation.tp_sums", "auto")
    assert capsys.readouterr().err == "generation: collectives sum in decode passes: no peer access\n"
    assert asked == ["peer", "collective", "auto"]
