"""Sums out of peers' memory in real processes, in Triton's interpreter: kernels wait for each other there."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from puzzle.engine.generate.decode_ring import generate
from puzzle.engine.generate.model_runner import ModelRunner
from puzzle.engine.generate.peers import mapped, peer_sums, share_sums
from puzzle.engine.generate.requests import Request
from puzzle.engine.generate.sampling import SamplingParams
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.reshard.transports import Unreachable
from puzzle.engine.runtime.world import World
from puzzle.model import hf, pointwise
from puzzle.model.peer_sums import PeerSums
from puzzle.plan.layout import Layout, Placement
from tests.helpers import PATIENCE, run_ranks
from tests.model.tiny import save_variant, stage

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="this host has a GPU: `puzzle bench sums` runs the kernel there",
)
EPS = 1e-5


def runtime_of(rank: int, layout: Layout, folder: Path, parts: int | None = None) -> ModelRuntime:
    world = World(rank, layout.world, torch.device("cpu"), timeout=PATIENCE)
    spec = hf.read_spec(folder)
    # Tensor ranks are not in the order of ranks.
    placement = Placement(layout, tuple(reversed(range(layout.world))))
    runtime = ModelRuntime("model", spec, placement, world, parts=parts)
    if parts is None:
        hf.load(runtime.decoder, folder)
    return runtime


def drawn(call: int, rank: int, rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * call + rank)
    return 5.0**rank * torch.randn((rows, width), generator=generator)


def summed(rank: int, size: int, folder: Path) -> list[str]:
    """Calls of various sizes, in which one rank or another comes late: what they found wrong."""
    runtime = runtime_of(rank, Layout.even(size, 1, 1, 4), folder)
    sums, width, wrong = mapped(runtime, 5), runtime.spec.hidden_size, []
    weight = drawn(99, 0, 1, width)[0]
    for call, rows in enumerate((2, 5, 1, 5, 3, 4)):
        if (call + rank) % 3 == 0:
            time.sleep(0.05)
        x, parts = drawn(call, 7, rows, width), [drawn(call, t, rows, width) for t in range(size)]
        found = sums.add_norm(x, parts[runtime.coord.t], weight, EPS)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        if not torch.equal(found[0], x + total):
            wrong.append(f"call {call} on rank {rank}")
        torch.testing.assert_close(found[1], pointwise.add_norm(x, total, weight, EPS)[1])
    return wrong


@interpreted
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_come_late_are_waited_for(size: int, tmp_path: Path) -> None:
    folder = save_variant(tmp_path / "model", "llama")
    assert run_ranks(summed, size, size, folder) == [[]] * size


def answered(rank: int, layout: Layout, folder: Path) -> list[Any]:
    """Responses by collectives, then by peers' memory, and how often that was read."""
    runtime = runtime_of(rank, layout, folder)
    requests = [Request(prompt, n) for n, prompt in enumerate(([5, 7, 9], [11, 3], [200, 8, 1, 4]))]
    found: list[Any] = []
    for way in ("collective", "peer"):
        if way == "peer":
            # As many rows as two of three requests: a pass of three goes the other way.
            runtime.tensor.sums = mapped(runtime, 2)
        for most in (2, 3):
            params = SamplingParams(max_new_tokens=4, seed=5)
            made = generate(runtime.decoder, requests, params, runtime.executor, most=most, graphs=False)
            found.append([(one.tokens, one.logprobs) for one in made])
    sums = runtime.tensor.sums
    assert sums is not None
    return [*found, int(sums._calls.sum())]


@interpreted
@pytest.mark.parametrize("layout", [(2, 1, 1), pytest.param((2, 2, 1), marks=pytest.mark.long)])
def test_responses_are_the_same(layout: tuple[int, int, int], tmp_path: Path) -> None:
    """Two ranks sum to the same bits either way; norms are rounded by other steps."""
    folder = save_variant(tmp_path / "model", "llama")
    layers = hf.read_spec(folder).num_layers
    for *found, calls in run_ranks(
        answered, Layout.even(*layout, layers).world, Layout.even(*layout, layers), folder
    ):
        assert calls
        for by_collectives, by_peers in zip(found[:2], found[2:], strict=True):
            for (tokens, logprobs), (others, theirs) in zip(by_collectives, by_peers, strict=True):
                assert tokens == others
                torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(theirs), rtol=0, atol=2e-5)


def declined(rank: int, folder: Path) -> list[str | None]:
    two, one = Layout.even(2, 1, 1, 4), Layout.even(1, 1, 2, 4)
    fast, exact, alone = (
        runtime_of(rank, two, folder),
        runtime_of(rank, two, folder, 2),
        runtime_of(rank, one, folder),
    )
    with pytest.raises(Unreachable):
        peer_sums(fast)
    told = [share_sums(fast, "collective"), share_sums(fast, "auto"), share_sums(exact, "auto")]
    told.append(share_sums(alone, "peer"))
    assert fast.tensor.sums is exact.tensor.sums is alone.tensor.sums is None
    return told


def test_why_collectives_sum(tmp_path: Path) -> None:
    folder = save_variant(tmp_path / "model", "llama")
    told = [None, "kernels need a GPU and Triton", "invariant numerics add parts in a tree", None]
    assert run_ranks(declined, 2, folder) == [told, told]


def test_a_recording_is_of_one_way_to_sum(tmp_path: Path) -> None:
    """A graph holds what it was recorded with, so another way to sum has another graph."""
    decoder = stage(save_variant(tmp_path / "model", "llama"))
    passes = ModelRunner(decoder)
    passes.start((2,), 4, 16, 3, SamplingParams())
    plain = passes._recording(0, 2)
    decoder.group.sums = PeerSums(0, [torch.zeros(2, 2, 8)], [torch.zeros(1)])
    assert passes._recording(0, 2) is not plain
    decoder.group.sums = None
    assert passes._recording(0, 2) is plain
