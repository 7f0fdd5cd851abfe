"""Sums over tensor ranks out of peers' memory: numbers in Triton's interpreter, and any order of steps.

No step of any rank, whenever it comes, reads what is not written yet or is overwritten already: shown of a
model of the kernel in plain Python, whose steps hypothesis puts in any order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from puzzle.model import pointwise
from puzzle.model.peer_sums import MOST_READ, Part, PeerSums, most_rows

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="this host has a GPU: `puzzle bench sums` runs the kernel there",
)
EPS = 1e-5


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Group:
    """All tensor ranks in one process: when one is called, the others' parts are there and they have
    arrived."""

    def __init__(self, size: int, rows: int, width: int, programs: int, dtype: torch.dtype) -> None:
        # Behind the rows and between the halves, what must not be read would spoil a sum.
        self.buffers = [torch.full((2, rows, width), torch.nan, dtype=dtype) for _ in range(size)]
        self.counts = [torch.zeros(programs, dtype=torch.int64) for _ in range(size)]
        self.sums = [PeerSums(rank, self.buffers, self.counts) for rank in range(size)]
        self.calls = torch.zeros(programs, dtype=torch.int64)

    def call(self, x: Tensor, parts: Sequence[Tensor], weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What every rank has."""
        programs, size = len(self.calls), len(parts)
        rows = torch.arange(len(x))
        halves = self.calls[rows % programs] % 2
        for rank, sums in enumerate(self.sums):
            for other, part in enumerate(parts):
                own = other == rank
                self.buffers[other][halves, rows] = torch.full_like(part, torch.nan) if own else part
            before = [counts.clone() for counts in self.counts]
            self.counts[rank][: len(x)] += size - 1
            yield sums.add_norm(x, parts[rank], weight, EPS)
            for other, counts in enumerate(self.counts):
                added = counts - before[other]
                assert added.tolist() == [
                    (size if other == rank else 1) * (p < len(x)) for p in range(programs)
                ]
                counts.copy_(before[other])
        for counts in self.counts:
            counts[: len(x)] += size
        self.calls[: len(x)] += 1


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter truncates to bf16
@pytest.mark.parametrize(("size", "width"), [(2, 72), (3, 64), (4, 20)])
def test_sums_are_those_of_the_ranks_in_order(size: int, width: int, dtype: torch.dtype) -> None:
    """In float32, rounded once; all ranks have the same bits, also where programs have several rows."""
    group = Group(size, 9, width, 4, dtype)
    weight = random((width,), dtype, 1)
    for number, rows in enumerate((3, 9, 1, 4, 5)):
        x = random((rows, width), dtype, 10 * number)
        parts = [random((rows, width), dtype, 10 * number + 1 + r) * 7.0**r for r in range(size)]
        exact = parts[0].float()
        for part in parts[1:]:
            exact = exact + part.float()
        total = x + exact.to(dtype)
        norms = (pointwise.rms_norm(total.double(), weight.double(), EPS)).to(dtype)
        found = list(group.call(x, parts, weight))
        for made, normed in found:
            assert torch.equal(made, total)
            assert torch.equal(normed, found[0][1])
            torch.testing.assert_close(normed.float(), norms.float(), rtol=1e-3, atol=1e-6)
        # The norm of what is rounded: that of the sum before would often be rounded to another number.
        assert dtype == torch.float32 or float((found[0][1] == norms).double().mean()) > 0.95


@interpreted
def test_without_a_norm() -> None:
    group = Group(2, 3, 40, 4, torch.float32)
    x, *parts = (random((3, 40), torch.float32, seed) for seed in range(3))
    group.buffers[1][0] = parts[1]
    group.counts[0][:3] += 1
    assert torch.equal(Part(parts[0], group.sums[0]).add_to(x), x + (parts[0] + parts[1]))


def test_what_is_taken() -> None:
    assert most_rows(2, 4096, 2) * 4096 * 2 == MOST_READ
    assert most_rows(8, 4096, 2) == most_rows(2, 4096, 2) // 7
    sums = PeerSums(1, [torch.zeros(2, 5, 8)] * 2, [torch.zeros(4, dtype=torch.int64)] * 2)
    taken = [sums.takes(torch.zeros(shape)) for shape in ((1, 8), (5, 8), (6, 8), (0, 8), (5, 7), (5,))]
    assert taken == [True, True, False, False, False, False]
    assert not sums.takes(torch.zeros(5, 8, dtype=torch.bfloat16))


@dataclass
class Ranks:
    """Memory of `size` ranks for one program of each, and what went wrong."""

    size: int
    buffers: int = 2
    waits: bool = True
    writes_first: bool = True
    memory: dict[tuple[int, int], int] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def program(self, rank: int, calls: int) -> Iterator[bool]:
        """The kernel's steps, one for each access to memory; False where it waits and has to look again."""
        for call in range(calls):
            place = call % self.buffers

            def write(place: int = place, call: int = call) -> None:
                self.memory[rank, place] = call

            if self.writes_first:
                write()
                yield True
            for other in range(self.size):
                self.counts[other] = self.counts.get(other, 0) + 1
                yield True
            if not self.writes_first:
                write()
                yield True
            while self.waits and self.counts.get(rank, 0) < self.size * (call + 1):
                yield False
            for other in range(self.size):
                read = self.memory.get((other, place))
                if read != call:
                    self.wrong.append(f"rank {rank} reads {read} of rank {other} in call {call}")
                yield True


def interleaved(ranks: Ranks, calls: int, order: Sequence[int]) -> None:
    """Run all programs, the next step each time that of the rank which `order` says, then in turns."""
    programs = {rank: ranks.program(rank, calls) for rank in range(ranks.size)}
    idle = 0
    turns = iter(order)
    while programs:
        assert idle <= ranks.size, "all wait"
        ended = object()
        turn = next(turns, None)
        some = sorted(programs) if turn is None else [sorted(programs)[turn % len(programs)]]
        for rank in some:
            step = next(programs[rank], ended)
            if step is ended:
                del programs[rank]
            if turn is None:
                idle = idle + 1 if step is False else 0


# Long runs of one rank: the others fall behind by calls, not by steps.
ORDERS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 25)), max_size=40).map(
    lambda runs: [rank for rank, steps in runs for _ in range(steps)]
)


@given(st.integers(1, 4), st.integers(1, 6), ORDERS)
def test_in_any_order_every_read_is_of_its_call(size: int, calls: int, order: list[int]) -> None:
    ranks = Ranks(size)
    interleaved(ranks, calls, order)
    assert not ranks.wrong
    assert list(ranks.counts.values()) == [size * calls] * size


@pytest.mark.parametrize(
    "fault",
    [Ranks(2, buffers=1), Ranks(2, waits=False), Ranks(2, writes_first=False)],
    ids=["one buffer", "no wait", "counts first"],
)
def test_the_model_notices(fault: Ranks) -> None:
    """One buffer, no wait, or a count before what it counts: some order reads what is wrong."""
    found = []
    for ahead in range(1, 30):
        ranks = replace(fault, memory={}, counts={}, wrong=[])
        interleaved(ranks, 3, [0] * ahead + [1] * 40 + [0] * 4 + [1] * 40)
        found += ranks.wrong
    assert found
