"""Tensors that leave for the host and come back: memory given back, bits kept, waits in the right places."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.pipeline.pipeline import Pipeline, PipelineInput
from puzzle.engine.runtime.world import World
from puzzle.engine.train import offload
from puzzle.engine.train.offload import HostMemory, Offload, offload_states, offload_weights
from puzzle.engine.train.zero_adamw import AdamWSettings
from puzzle.errors import UserError
from puzzle.model.packing import pack
from puzzle.model.weights import initialise
from puzzle.plan.layout import Layout, Placement
from puzzle.spec.model import ModelSpec

SPEC = ModelSpec.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
)


@pytest.fixture
def world() -> World:
    return World(0, 1, torch.device("cpu"))


def held(tensors: list[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


def runtime(world: World, dtype: torch.dtype) -> ModelRuntime:
    made = ModelRuntime("actor", SPEC, Placement.default(Layout.even(1, 1, 1, 3)), world, dtype)
    initialise(made.stage, 0)
    return made


def test_storages_are_given_back_and_refilled(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "BLOCK", 100)  # storages end and begin anywhere in a block
    first, second = torch.randn(7, 9), torch.arange(50, dtype=torch.bfloat16)
    parts = [[first, first[2:4]], [second, torch.empty(0)]]
    before = [first.clone(), second.clone()]
    made = Offload(HostMemory(world.device), lambda: parts)
    for _ in range(2):
        made.leave()
        made.leave()
        assert made.away
        assert held([first, second]) == 0
        made.fetch()
        made.wait()
        assert held([first, second]) == 7 * 9 * 4 + 50 * 2
        assert all(map(torch.equal, (first, second), before))
        assert torch.equal(parts[0][1], first[2:4])
        first += 1
        before[0] += 1
    waited, copied, moved = made.take_times()
    assert moved == 4 * (7 * 9 * 4 + 50 * 2)
    assert waited == copied > 0
    assert made.take_times() == (0, 0, 0)


def test_weights_that_nobody_trains_are_copied_out_once(world: World) -> None:
    decoder = runtime(world, torch.float32).decoder
    made = offload_weights(HostMemory(world.device), decoder)
    for _ in range(2):
        made.leave()
        made.fetch()
    size = sum(weight.nbytes for weight in decoder.parameters())
    assert made.take_times()[2] == 3 * size


def test_what_is_constant_is_copied_out_once(world: World) -> None:
    x = torch.randn(30)
    made = Offload(HostMemory(world.device), lambda: [[x]], constant=True)
    for _ in range(3):
        made.leave()
        made.fetch()
    assert made.take_times()[2] == 4 * x.nbytes


def test_a_pass_waits_for_weights_layer_by_layer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    model = runtime(world, torch.float32)
    model.freeze()
    made = offload_weights(HostMemory(world.device), model.stage)
    waits: list[int | None] = []
    wait = Offload.wait
    monkeypatch.setattr(Offload, "wait", lambda self, part=None: (waits.append(part), wait(self, part))[1])
    batch = pack([[1, 2, 3], [4, 5]])
    with torch.no_grad():
        expected = model.stage(batch.tokens_T, batch)
        made.leave()
        waits.clear()
        assert held(list(model.stage.parameters())) == 0
        # Nobody fetched them: the pass does.
        assert torch.equal(model.stage(batch.tokens_T, batch), expected)
    assert waits == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_fetches_what_it_needs(world: World, dtype: torch.dtype) -> None:
    batch = pack([[1, 2, 3], [4, 5]])

    def stepped(away: bool) -> list[Tensor]:
        model = runtime(world, dtype)
        model.attach_optimizer(AdamWSettings(lambda step: 1e-2))
        optimizer = model.optimizer
        assert optimizer is not None

        def loss_fn(index: int, hidden: Tensor) -> Tensor:
            return model.stage.logits(hidden).square().mean()

        states = offload_states(HostMemory(world.device), optimizer) if away else None
        for _ in range(3):
            if states is not None:
                states.leave()
                assert held(optimizer.state_tensors()) == 0
            Pipeline([model]).train([PipelineInput(model, [batch], loss_fn)])
        if states is not None:
            states.leave()
            assert states.away
        found = [t.clone() for i in range(len(optimizer.slots)) for t in optimizer.moments(i)]
        assert states is None or not states.away
        weights = sum(p.nbytes for p in model.stage.parameters())
        count = sum(p.numel() for p in model.stage.parameters())
        # Masters of float32 weights are the weights themselves: they stay.
        assert held(optimizer.state_tensors()) == count * (8 if dtype is torch.float32 else 12)
        assert held(list(model.stage.parameters())) == weights
        return [*found, *(m.clone() for m in optimizer.masters), *model.stage.parameters()]

    assert all(map(torch.equal, stepped(False), stepped(True)))


def test_host_memory_is_taken_ahead_by_a_thread(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "BLOCK", 100)
    takers: list[str] = []
    block = HostMemory._block

    def noted(self: HostMemory) -> Tensor:
        takers.append(threading.current_thread().name)
        if len(takers) == 5:
            raise UserError("the host has no more")
        return block(self)

    monkeypatch.setattr(HostMemory, "_block", noted)
    host = HostMemory(world.device, 250)
    assert [len(piece) for piece in host.take(330)] == [100, 100, 100, 30]
    assert takers == ["host memory"] * 3 + ["MainThread"]
    beside = HostMemory(world.device, 100)
    with pytest.raises(UserError, match="has no more"):
        beside.take(1)
    assert [len(piece) for piece in beside.take(1)] == [1]  # and no wait for a thread that has ended
    assert takers[4:] == ["host memory", "MainThread"]


def test_no_memory_to_pin_is_told_in_a_line(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Tensor:
        raise RuntimeError("CUDA error: out of memory\nmore")

    made = Offload(HostMemory(world.device), lambda: [[x]])
    x = torch.ones(3)
    monkeypatch.setattr(offload.torch, "empty", full)
    with pytest.raises(UserError, match=r"offload: the host has no more memory to pin \(CUDA error: out of"):
        made.leave()
