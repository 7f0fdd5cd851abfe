"""Groups that go through the host beside plain gloo, in real processes, and what shares a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from puzzle.engine.runtime import shared_device
from puzzle.engine.runtime import world as worlds
from puzzle.engine.runtime.identity import Identity
from puzzle.engine.runtime.shared_device import LACKING, Staged
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.model.parallel import TensorGroup, all_gather_flat, reduce_scatter_flat
from tests.helpers import run_ranks

DTYPES = (torch.bfloat16, torch.float32, torch.int64)
SIZES = (0, 1, 7, 1000)


def staged_group() -> dist.ProcessGroup:
    shared_device.register()
    group = dist.new_group(backend=shared_device.BACKEND)
    assert isinstance(group, Staged)
    return group


def numbers(rank: int, size: int, dtype: torch.dtype, columns: int = 1) -> Tensor:
    """Other ones on every rank, of many sizes, so that the order of a sum shows."""
    generator = torch.Generator().manual_seed(100 * rank + size)
    draw = torch.randn((size, columns), generator=generator) * 10.0 ** (rank % 3)
    return (100 * draw).to(dtype)


def _ends(rank: int, world: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(from, to) of what a rank sends, and of what it receives."""
    return [(rank, other) for other in range(world)], [(other, rank) for other in range(world)]


def operations(rank: int, world: int, size: int, dtype: torch.dtype, group: Any) -> dict[str, Tensor]:
    """What all of them bring, but for the sums that gloo adds up in another order."""
    x = numbers(rank, size, dtype, 3)
    found: dict[str, Tensor] = {}
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
        dist.all_reduce(found.setdefault(f"all_reduce {op}", x.clone()), op=op, group=group)
    work = dist.all_reduce(found.setdefault("started", x.clone()), group=group, async_op=True)
    assert work is not None
    work.wait()
    for first in range(world):
        dist.broadcast(found.setdefault(f"from {first}", x.clone()), group_src=first, group=group)
    found["gathered"] = x.new_empty((world * size, 3))
    all_gather_flat(found["gathered"], x, group=group)
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x, group=group)
    found["in a list"] = torch.stack(parts)
    whole = numbers(rank, world * size, dtype, 2)
    found["exchanged"] = torch.empty_like(whole)
    dist.all_to_all_single(found["exchanged"], whole, group=group)
    there, here = ([size + (a + 2 * b) % 3 for a, b in ends] for ends in _ends(rank, world))
    found["by rows"] = x.new_empty((sum(here), 3))
    dist.all_to_all_single(found["by rows"], numbers(rank, sum(there), dtype, 3), here, there, group=group)
    after, before = (rank + 1) % world, (rank - 1) % world
    batch = []
    for tag in (5, 6):
        found[f"received {tag}"] = torch.empty_like(x)
        batch += [
            dist.P2POp(dist.isend, x + tag, after, group, tag),
            dist.P2POp(dist.irecv, found[f"received {tag}"], before, group, tag),
        ]
    for one in dist.batch_isend_irecv(batch):
        one.wait()
    if rank < 2:
        found["sent"] = x.clone()
        (dist.send if rank == 0 else dist.recv)(found["sent"], 1 - rank, group=group)
    dist.barrier(group=group)
    return found


def compare(rank: int, world: int) -> None:
    group = staged_group()
    for dtype in DTYPES:
        for size in SIZES:
            ours = operations(rank, world, size, dtype, group)
            theirs = operations(rank, world, size, dtype, dist.group.WORLD)
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                assert torch.equal(value, theirs[name]), f"{name} of {size} {dtype}"
            whole = numbers(rank, world * size, dtype, 2)
            everyone = torch.empty((world, *whole.shape), dtype=dtype)
            all_gather_flat(everyone.view(-1), whole.view(-1))
            mine = everyone.view(world, world, size, 2)[:, rank]
            in_order = mine[0].clone()
            for part in mine[1:]:
                in_order += part
            found = torch.empty((size, 2), dtype=dtype)
            reduce_scatter_flat(found, whole, group=group)
            assert torch.equal(found, in_order), f"reduce_scatter of {size} {dtype}"
    values: list[Any] = [None] * world
    dist.all_gather_object(values, {"rank": rank, "long": "x" * rank}, group=group)
    assert values == [{"rank": r, "long": "x" * r} for r in range(world)]
    box = [rank, "x" * rank]
    dist.broadcast_object_list(box, src=1, group=group)
    assert box == [1, "x"]


@pytest.mark.parametrize("world", [2, 4])
def test_every_operation_brings_what_gloo_brings(world: int) -> None:
    run_ranks(compare, world, world)


def order(rank: int) -> None:
    group, other = staged_group(), 1 - rank
    x, out = torch.full((3,), float(rank)), torch.full((6,), -1.0)
    work = all_gather_flat(out, x, group=group, async_op=True)
    x.fill_(9)
    dist.barrier()
    assert (out == -1).all()
    work.wait()
    assert out.tolist() == [0.0] * 3 + [1.0] * 3
    out.fill_(5)
    work.wait()
    assert (out == 5).all()
    # Into columns, out of columns.
    columns, wide = torch.arange(6.0).view(2, 3).t() + rank, torch.zeros(2, 6).t()
    all_gather_flat(wide, columns, group=group)
    assert torch.equal(wide, torch.cat([columns - rank + r for r in range(2)]))
    # What needs gradients, and what was made where there are none.
    leaf = torch.ones(2, requires_grad=True)
    with torch.inference_mode():
        drawn = torch.full((2,), float(rank))
    with torch.no_grad():
        dist.all_reduce(leaf, group=group)
    dist.all_reduce(drawn, group=group)
    assert leaf.tolist() == [2, 2]
    assert leaf.is_leaf
    assert drawn.tolist() == [1, 1]
    # The messages of two channels, each awaited when the other is under way.
    received = [torch.empty(2), torch.empty(2)]
    sends = [dist.isend(torch.full((2,), rank + 10.0 * tag), other, group=group, tag=tag) for tag in (0, 1)]
    waits = [dist.irecv(received[tag], other, group=group, tag=tag) for tag in (1, 0)]
    for work in (*waits, *sends):
        assert work is not None
        work.wait()
    assert [r.tolist() for r in received] == [[other + 10.0 * tag] * 2 for tag in (0, 1)]


def test_inputs_are_read_at_the_start_and_outputs_written_at_the_end_once() -> None:
    run_ranks(order, 2)


def refuse(_rank: int) -> None:
    group, x = staged_group(), torch.ones(4)
    refused: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (NotImplementedError, "^reduce: staged groups", lambda: dist.reduce(x, 0, group=group)),
        (NotImplementedError, "^recv_anysource: ", lambda: dist.recv(x, group=group)),
        (
            NotImplementedError,
            "sums alone",
            lambda: reduce_scatter_flat(x[:2], x, op=dist.ReduceOp.MAX, group=group),
        ),
        (ValueError, "float64", lambda: all_gather_flat(torch.empty(8).double(), x, group=group)),
        (
            ValueError,
            r"\(7,\) from .* \(4,\) in a group of 2",
            lambda: all_gather_flat(x.new_empty(7), x, group=group),
        ),
        (ValueError, "staged", lambda: reduce_scatter_flat(x[:1], x, group=group)),
    ]
    for kind, words, operation in refused:
        with pytest.raises(kind, match=words):
            operation()
    assert not TensorGroup(group).recordable
    assert not TensorGroup(dist.group.WORLD).recordable
    assert TensorGroup().recordable


def test_other_operations_are_refused_and_none_is_recorded_in_graphs() -> None:
    run_ranks(refuse, 2)


def test_nothing_of_torchs_groups_is_left_out() -> None:
    """A collective that a later torch adds would fall through to it."""
    known = {*shared_device.OPERATIONS, *LACKING}
    names = {name for name in dir(dist.ProcessGroup) if not name.startswith("__")}
    assert known & names
    talk = {
        name
        for name in names
        if any(word in name for word in ("gather", "reduce", "scatter", "to_all", "alltoall"))
    }
    assert talk <= known


@pytest.mark.parametrize(("processes", "devices"), [(1, 1), (4, 1), (4, 2), (5, 2), (3, 4)])
def test_devices_are_taken_in_turns(processes: int, devices: int) -> None:
    taken = [shared_device.share(local, processes, devices) for local in range(processes)]
    for device, ranks in taken:
        assert 0 <= device < devices
        assert ranks == [other for other, _ in taken].count(device)
    counts = [ranks for _, ranks in taken]
    assert max(counts) - min(counts) <= 1


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A host that says so; the devices that were made the current ones."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_a_process_without_a_gpu_shares_one_only_if_that_is_asked_for(two_gpus: list[torch.device]) -> None:
    assert worlds._device("cuda", Identity(1, 5, 1, 5), False) == (torch.device("cuda", 1), 1)
    with pytest.raises(
        UserError, match=r"^layout: process 2 of this host has no GPU \(2 here\); .*--share-device"
    ):
        worlds._device("cuda", Identity(2, 5, 2, 5), False)
    assert worlds._device("cuda", Identity(2, 5, 2, 5), True) == (torch.device("cuda", 0), 3)
    assert worlds._device("cuda", Identity(3, 5, 3, 5), True) == (torch.device("cuda", 1), 2)
    assert [device.index for device in two_gpus] == [1, 0, 1]
    assert worlds._device("cpu", Identity(2, 5, 2, 5), True) == (torch.device("cpu"), 1)


def test_memory_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1000 bytes 600 are free; of what this rank has taken 30 hold nothing."""

    class Properties:
        total_memory = 1000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (600, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 100)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 70)
    for ranks, whole, free, words in ((1, 1000, 630, "its device has free"), (4, 250, 180, "its part of a")):
        world = World(0, 1, torch.device("cuda", 0), per_device=ranks)
        assert world.device_memory == whole
        found = world.free_memory()
        assert found is not None
        assert found.bytes == free
        assert found.told.startswith(words)
