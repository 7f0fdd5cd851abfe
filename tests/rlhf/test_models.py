"""The models of a run: which of them learn, what is said of their folders, what they offload, and what a
switch of weights tells the log."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from puzzle.config.resolve import RunPlan, resolve
from puzzle.engine.runtime.world import World
from puzzle.model.decoder import Decoder
from puzzle.rlhf import models as module
from puzzle.rlhf import policy_generator
from puzzle.rlhf.models import OffloadPolicy, build_models, load_model
from puzzle.rlhf.policy_generator import PolicyGenerator
from tests.reference.tiny import save_lm
from tests.rlhf.one_process import configured


@pytest.fixture
def world() -> World:
    return World(0, 1, torch.device("cpu"))


def planned(**sections: Any) -> RunPlan:
    plan = resolve(configured(**sections))
    assert isinstance(plan, RunPlan)
    return plan


def seen_loads(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """With which options each role's model is loaded."""
    seen: dict[str, dict[str, Any]] = {}

    def load(model: Any, *given: Any, **options: Any) -> Any:
        seen[model.role] = options
        return load_model(model, *given, **options)

    monkeypatch.setattr(module, "load_model", load)
    return seen


@pytest.mark.parametrize("recompute", [True, False])
def test_trained_models_alone_have_gradients_optimizers_and_recomputation(
    monkeypatch: pytest.MonkeyPatch, world: World, recompute: bool
) -> None:
    seen = seen_loads(monkeypatch)
    made = build_models(planned(recompute=recompute), world)
    assert list(made.by_role) == ["actor", "critic", "reference", "reward"]
    assert list(made.trained) == ["actor", "critic"]
    assert made.main is made.actor is made.by_role["actor"]
    assert made.generator.actor is made.actor
    for role, model in made.by_role.items():
        learns = role in ("actor", "critic")
        assert (model.optimizer is not None) == learns
        assert {p.requires_grad for p in model.decoder.parameters()} == {learns}
        assert seen[role]["recompute"] is (recompute and learns)
        assert seen[role]["compiled"] is False
    first, second = (dict(made.by_role[role].decoder.named_parameters()) for role in ("actor", "reference"))
    assert all(torch.equal(first[name], second[name]) for name in first), "the reference starts as the actor"
    heads = [made.by_role[role].decoder.state_dict() for role in ("critic", "reward")]
    assert not all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


@pytest.mark.parametrize("compiled", [None, False, True])
def test_layers_are_compiled_where_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, world: World, compiled: bool | None
) -> None:
    calls: list[Decoder] = []
    monkeypatch.setattr(Decoder, "compile_layers", lambda decoder: calls.append(decoder))
    plan = planned()
    options = {} if compiled is None else {"compiled": compiled}
    loaded = load_model(plan.models["actor"], plan.config.actor, world, "fp32", 0, **options)
    assert calls == ([loaded.decoder] if compiled else [])


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_says_what_of_a_folder_is_not_read(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    world: World,
    rank: int,
) -> None:
    folder = save_lm(tmp_path / "lm")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: torch.ones(3)}, folder / "model.safetensors")
    plan = planned(
        actor={"init": None, "model": str(folder)}, reward={"function": "puzzle.rlhf.rewards:letter_share"}
    )
    load = module.hf.load

    def loaded(*given: Any, **options: Any) -> Any:
        found = load(*given, **options)
        world.rank = rank  # of a run with several, whose part of the model is not what this is about
        return found

    monkeypatch.setattr(module.hf, "load", loaded)
    capsys.readouterr()
    load_model(plan.models["actor"], plan.config.actor, world, "fp32", 0)
    said = capsys.readouterr().err
    assert said.count("\n") == (rank == 0)
    assert (str(folder) in said and name in said) == (rank == 0)


class Part:
    """What can be offloaded; writes down what it is told."""

    def __init__(self, name: str, log: list[str], times: tuple[float, float, int]) -> None:
        self.name, self.log, self.times = name, log, times

    def leave(self) -> None:
        self.log.append(f"{self.name} leaves")

    def fetch(self) -> None:
        self.log.append(f"{self.name} comes")

    def take_times(self) -> tuple[float, float, int]:
        return self.times


def test_each_stage_has_what_it_needs_and_no_more() -> None:
    log: list[str] = []
    states, weights = Part("states", log, (1.0, 4.0, 100)), Part("weights", log, (0.5, 0.25, 20))

    class Others(SimpleNamespace):
        """Two ranks: the other one has waited for three seconds, copied for one, and moved as many bytes."""

        def max(self, x: torch.Tensor) -> torch.Tensor:
            return torch.maximum(x, torch.tensor([3.0, 1.0], dtype=torch.float64))

        def sum(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    world: Any = Others(device=torch.device("cpu"))
    policy = OffloadPolicy(world, [states], [weights])  # ty: ignore[invalid-argument-type]
    for stage, expected in (
        (policy.for_generation, ["weights leaves", "states leaves"]),
        (policy.for_inference, ["weights comes"]),
        (policy.for_training, ["weights leaves", "states comes"]),
    ):
        log.clear()
        stage()
        assert log == expected
    record = policy.record(7)
    assert record is not None
    assert (record.iteration, record.seconds, record.copy_seconds, record.bytes) == (7, 3.0, 4.25, 240)
    assert OffloadPolicy(world).record(7) is None
    for one in (OffloadPolicy(world, [states]), OffloadPolicy(world, [], [weights])):  # ty: ignore[invalid-argument-type]
        assert one.record(7) is not None


class Switcher:
    """In the place of a Resharder; `log` has the order of calls."""

    def __init__(self, log: list[str], side: Any, zero: bool) -> None:
        self.log, self.side = log, side
        self.plan = SimpleNamespace(
            zero=zero,
            ranks=(0, 1),
            traffic=lambda rank: ((4e9, 1e9), (2e9, 6e9))[rank],
            for_rank=lambda rank: SimpleNamespace(peak_extra=(30, 50)[rank]),
            bytes_received=9,
            lower_bound_bytes=8,
            local_share=0.25,
            strategy="balanced",
            transport="messages",
            itemsize=4,
            hash="abc",
        )

    def fill(self) -> float:
        self.log.append("fill")
        return 2.0

    def drop(self) -> float:
        self.log.append("drop")
        return 0.5

    def verify(self) -> None:
        self.log.append("verify")

    def take_times(self) -> tuple[float, float]:
        return 7.0, 3.0


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("side", [None, "stream"])
@pytest.mark.parametrize("zero", [True, False])
def test_a_switch_fills_checks_generates_and_drops_in_this_order(
    monkeypatch: pytest.MonkeyPatch, verify: bool, side: Any, zero: bool
) -> None:
    """What its record says of times is by hand: a fill beside generation is awaited later."""
    log: list[str] = []
    moments = iter(range(100))

    class Instant:
        def __init__(self, _device: Any) -> None:
            self.at = float(next(moments))

        def __sub__(self, other: Any) -> float:
            return self.at - other.at

    optimizer = SimpleNamespace(
        wait_gather=lambda: log.append("wait"),
        start_gather=lambda: log.append("gather"),
        gather_pending=False,
        defer_gather=False,
    )
    world = SimpleNamespace(device=torch.device("cpu"), max=lambda x: x)
    actor: Any = SimpleNamespace(optimizer=optimizer, world=world, spec=None, placement=None)
    monkeypatch.setattr(policy_generator, "Instant", Instant)
    monkeypatch.setattr(policy_generator, "gathered_bytes", lambda *_: {0: 100, 1: 20})
    runtime: Any = SimpleNamespace(decoder=None)
    switcher: Any = Switcher(log, side, zero)
    generator = PolicyGenerator(actor, runtime, switcher, verify, saved_bytes=77)
    passes = SimpleNamespace(rest=lambda: log.append("rest"), release=lambda: log.append("release"))
    monkeypatch.setattr(policy_generator, "ModelRunner", lambda *_, **__: passes)
    clock: Any = SimpleNamespace(end=lambda stage: log.append(f"end of {stage}"))
    generator.before_last_step()
    assert optimizer.defer_gather is zero
    generator.end_training()
    assert optimizer.defer_gather is False
    assert log == ["wait"]
    log.clear()
    with generator, generator.weights(clock) as lent:
        assert lent is runtime
        log.append("use")
    assert log == [
        "fill",
        *(["end of switch"] if side is None else []),
        *(["wait", "verify", "end of other"] if verify else []),
        *["gather", "use", "rest", "end of generation", "drop", "wait", "end of switch", "release"],
    ]
    record = generator.record(world, 4)  # ty: ignore[invalid-argument-type]
    assert record is not None
    fill, awaited = (2.0, 2.0) if side is None else (7.0, 5.0)
    gather = 3.0 if verify else 2.0  # a second for each time that it was awaited
    assert (record.iteration, record.seconds) == (4, awaited + 0.5 + (gather if zero else 0.0))
    told = record.fields
    times = {"fill": fill, "awaited": awaited, "drop": 0.5, "gather": gather}
    assert {name: told[f"{name}_seconds"] for name in times} == times
    assert told["filled_from"] == ("shards" if zero else "gathered")
    assert (told["gather_bytes"], told["saved_bytes"], told["bytes"], told["peak_bytes"]) == (120, 77, 9, 50)
    assert (told["lower_bound_bytes"], told["local_share"], told["hash"]) == (8, 0.25, "abc")
    assert told["gbs_per_rank"] == pytest.approx([4.0 / fill, 6.0 / fill])
    assert (told["strategy"], told["transport"]) == ("balanced", "messages")
    again = generator.record(world, 5)  # ty: ignore[invalid-argument-type]
    assert again is not None
    assert again.fields["gather_seconds"] == 0.0
    assert PolicyGenerator(actor).record(world, 4) is None  # ty: ignore[invalid-argument-type]
