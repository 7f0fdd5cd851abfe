"""Switches of tiny models on real ranks, run by `test_switcher`: what they found comes back as text."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import profile

from puzzle.engine.reshard import ipc
from puzzle.engine.reshard.resharder import ALIGN, Resharder
from puzzle.engine.reshard.transports import PeerCopies
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.model.decoder import Decoder
from puzzle.model.parallel import TensorGroup
from puzzle.model.weights import fill, random_tensor
from puzzle.plan.cluster import Cluster
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.reshard.plan import MIB, SwitchPlan, plan_switch
from puzzle.plan.reshard.routing import Strategy
from puzzle.spec.model import ModelSpec

WORLD = 8
LAYERS = 4
LM = ModelSpec(
    "qwen2",
    vocab_size=37,
    hidden_size=16,
    intermediate_size=32,
    num_layers=LAYERS,
    num_heads=8,
    num_kv_heads=2,
    head_dim=4,
    qkv_bias=True,
)
SPECS = {
    "lm": LM,
    "tied": replace(LM, tie_embeddings=True),
    "value": replace(LM, head="value", vocab_size=40),
    "qk-norm": replace(LM, family="qwen3", qkv_bias=False, qk_norm=True),
}
CLUSTER = Cluster(4, 4, 1)


@dataclass(frozen=True)
class Case:
    """One switch; placements begin at rank 0, or with `last` the destination ends at the last rank."""

    spec: str
    source: tuple[int, int, int]
    destination: tuple[int, int, int]
    strategy: Strategy = "planned"
    last: bool = False
    small: bool = False  # many buckets, everything packed
    dtype: torch.dtype = torch.float32
    transport: Literal["messages", "peer"] = "messages"
    keep: bool = False  # every fill to the same addresses
    zero: bool = False  # other replicas' rows are not there yet

    def plan(self) -> SwitchPlan:
        spec = SPECS[self.spec]
        sides = [Layout.even(*numbers, LAYERS) for numbers in (self.source, self.destination)]
        first = WORLD - sides[1].world if self.last else 0
        return plan_switch(
            spec,
            Placement.default(sides[0]),
            Placement.default(sides[1], first),
            CLUSTER,
            strategy=self.strategy,
            itemsize=self.dtype.itemsize,
            staging_bytes=4096 if self.small else MIB,
            zero=self.zero,
        )


def stage(
    plan: SwitchPlan, placement: Placement, rank: int, device: str, dtype: torch.dtype
) -> Decoder | None:
    """The rank's decoder of a placement; nothing is computed, so its tensor group need not work."""
    if rank not in placement:
        return None
    group, coord = TensorGroup(), placement.coord_of(rank)
    group.rank, group.size = coord.t, placement.layout.tp
    return Decoder(plan.spec, placement.layout, coord, group, dtype, device)


def filled(decoder: Decoder | None, seed: int) -> None:
    """Fill a stage from whole random tensors that no switch has touched."""
    if decoder is not None:
        tensors = {tensor.name: tensor for tensor in decoder.spec.tensors()}
        fill(decoder, lambda name: random_tensor(tensors[name], seed, torch.device("cpu")) + 0.01)


@torch.no_grad()
def forget_others(decoder: Decoder | None) -> None:
    """Spoil the rows that another replica steps, but not padding."""
    if decoder is None:
        return
    dp, d = decoder.layout.dp, decoder.coord.d
    for storage in decoder.storages:
        chunk = -(-storage.rows // dp)
        weight = decoder.get_parameter(storage.name)
        for other in set(range(dp)) - {d}:
            for piece in storage.clip(other * chunk, (other + 1) * chunk):
                weight[piece.start : piece.stop] = -3.0


def peak_memory(events) -> int:
    """Largest sum of bytes allocated and not yet freed, from the profiler's own record."""
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    return max(itertools.accumulate(sizes), default=0)


def one(rank: int, world: World, case: Case, measure: bool) -> list[str]:
    """Two fills with other weights between them; everything that is wrong."""
    plan = case.plan()
    source = stage(plan, plan.source, rank, "cpu", case.dtype)
    destination = stage(plan, plan.destination, rank, "meta", case.dtype)
    expected = stage(plan, plan.destination, rank, "cpu", case.dtype)
    how: dict[str, Any] = {"timeout": 60.0, "transport": case.transport, "keep": case.keep}
    switcher = Resharder(plan, world, source, destination, **how)
    wrong, lay = [], []
    for seed in (1, 2):
        filled(source, seed)
        filled(expected, seed)
        if plan.zero:
            forget_others(source)
        if measure and seed == 2:
            with profile(profile_memory=True) as profiler:
                switcher.fill()
            wrong += extra(switcher, peak_memory(profiler.profiler.kineto_results.events()))
        else:
            switcher.fill()
        if destination is not None and expected is not None:
            wrong += [f"{what}, fill {seed}" for what in differences(destination, expected)]
            wrong += aliases(case, switcher, source, destination)
        if plan.zero:
            filled(source, seed)  # as a gather does, which leaves what is there as it is
        switcher.verify()
        own = [] if source is None else [p.untyped_storage().data_ptr() for p in source.parameters()]
        made = [] if destination is None else [p.untyped_storage() for p in destination.parameters()]
        gone = [StorageWeakRef(storage) for storage in made if storage.data_ptr() not in own]
        lay.append([] if destination is None else [p.data_ptr() for p in destination.parameters()])
        del made
        switcher.drop()
        if any(memory.expired() == case.keep for memory in gone):
            wrong.append("memory ends with its drop" if case.keep else "memory outlives its drop")
    if case.keep and lay[0] != lay[1]:
        wrong.append("weights came to other addresses")
    return [f"{case}, rank {rank}: {what}" for what in wrong]


def differences(destination: Decoder, expected: Decoder) -> list[str]:
    return [
        f"{name} is not what it was"
        for name, weight in expected.named_parameters()
        if not torch.equal(destination.get_parameter(name), weight)
        or destination.get_parameter(name).requires_grad
    ]


def extra(switcher: Resharder, measured: int) -> list[str]:
    promised = switcher.part.peak_extra
    # Beside alignment, torch allocates a few words of its own for flags and sizes.
    slack = ALIGN * len(switcher.part.allocate) + 64
    ok = promised <= measured <= promised + slack
    return [] if ok else [f"peak extra {measured}, promised {promised}"]


def aliases(case: Case, switcher: Resharder, source: Decoder | None, destination: Decoder) -> list[str]:
    """Aliased storages lie in training memory; where tp grows by a factor, whatever a rank has is aliased.

    Except qkv with key/value heads newly shared by tensor ranks (no longer neighbouring rows), and the
    vocabulary where it cannot be cut evenly.
    """
    wrong, aliased = [], {alias.destination.name for alias in switcher.part.aliases}
    spans = []
    if source is not None:
        spans = [(p.data_ptr(), p.data_ptr() + p.nbytes) for p in source.parameters()]
    for name, weight in destination.named_parameters():
        inside = any(
            low <= weight.data_ptr() and weight.data_ptr() + weight.nbytes <= high for low, high in spans
        )
        if inside != (name in aliased):
            wrong.append(f"{name}: in training memory is {inside}")
    multiple = case.destination[0] % case.source[0] == 0
    if multiple and case.strategy != "gather-all":
        copied = {move.destination.name.rpartition(".")[2] for move in switcher.part.copies}
        allowed = {"qkv", "qkv_bias"} if case.destination[0] > LM.num_kv_heads else set()
        if LM.vocab_size % case.destination[0] and case.spec != "value":
            allowed |= {"embed", "head"}
        if copied - allowed:
            wrong.append(f"copies where only aliases are needed: {copied - allowed}")
    return wrong


def matrix(rank: int, cases: list[Case], measured: int) -> list[str]:
    """All cases in turn; the first `measured` ones under the memory profiler."""
    world = World(rank, WORLD, torch.device("cpu"))
    found = []
    for number, case in enumerate(cases):
        found += one(rank, world, case, number < measured)
    return found


def flipped(rank: int, case: Case, which: str) -> str:
    """What `verify` says after one bit of one rank's copy of a storage was flipped."""
    world = World(rank, WORLD, torch.device("cpu"))
    plan = case.plan()
    source = stage(plan, plan.source, rank, "cpu", case.dtype)
    destination = stage(plan, plan.destination, rank, "meta", case.dtype)
    filled(source, 1)
    switcher = Resharder(plan, world, source, destination)
    switcher.fill()
    switcher.verify()
    if destination is not None and which in dict(destination.named_parameters()):
        coord = plan.destination.coord_of(rank)
        if coord.d == plan.destination.layout.dp - 1 and coord.t == plan.destination.layout.tp - 1:
            bits = destination.get_parameter(which).detach().view(-1)[3:4].view(torch.int32)
            bits ^= 1
    try:
        switcher.verify()
    except RuntimeError as error:
        return str(error)
    return ""


def mismatched(rank: int) -> str:
    """The error where one rank made another plan."""
    world = World(rank, 2, torch.device("cpu"))
    strategy: Strategy = "fixed-order" if rank else "planned"
    plan = Case("lm", (1, 2, 1), (2, 1, 1), strategy).plan()
    try:
        Resharder(plan, world, stage(plan, plan.source, rank, "cpu", LM_DTYPE), None)
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return ""


LM_DTYPE = torch.float32


def deserted(rank: int, transport: Literal["messages", "peer"]) -> str:
    """The error of a rank whose peer never comes."""
    world = World(rank, 2, torch.device("cpu"), timeout=2.0)
    plan = Case("lm", (1, 2, 1), (2, 1, 1)).plan()
    source = stage(plan, plan.source, rank, "cpu", LM_DTYPE)
    made = stage(plan, plan.destination, rank, "meta", LM_DTYPE)
    switcher = Resharder(plan, world, source, made, transport=transport)
    if rank == 1:
        time.sleep(5.0)
        return ""
    try:
        switcher.fill()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was missed"


def unreadable(rank: int) -> list[str]:
    """What is said of peers on other hosts, of a strategy without peer copies, of weights that have moved."""
    world = World(rank, 2, torch.device("cpu"))
    plan = Case("lm", (1, 2, 1), (2, 1, 1)).plan()
    source = stage(plan, plan.source, rank, "cpu", LM_DTYPE)
    made = stage(plan, plan.destination, rank, "meta", LM_DTYPE)
    whole = Case("lm", (1, 2, 1), (2, 1, 1), "gather-all").plan()
    said = []
    with mock.patch.object(ipc, "_host", return_value=f"host {rank}"):
        for asked in (plan, whole):
            try:
                Resharder(asked, world, source, made, transport="peer")
            except UserError as error:
                said.append(str(error))
    assert source is not None
    switcher = Resharder(plan, world, source, made, transport="peer")
    name, weight = next(iter(source.named_parameters()))
    source.register_parameter(name, torch.nn.Parameter(weight.detach().clone()))
    try:
        switcher.fill()
    except RuntimeError as error:
        said.append(str(error))
    return said


def peers_in_turn(rank: int, source: tuple[int, int, int], destination: tuple[int, int, int]) -> list[int]:
    """The peer of every copy of a fill, in the order in which they were made."""
    world = World(rank, 4, torch.device("cpu"))
    plan = Case("lm", source, destination).plan()
    have = stage(plan, plan.source, rank, "cpu", LM_DTYPE)
    made = stage(plan, plan.destination, rank, "meta", LM_DTYPE)
    switcher = Resharder(plan, world, have, made, transport="peer")
    transport = switcher.transport
    assert isinstance(transport, PeerCopies)
    read: list[int] = []
    plain = transport._pull

    def pulled(pulls: Any, *args: Any) -> None:
        read.extend(pull.peer for pull in pulls)
        plain(pulls, *args)

    with mock.patch.object(transport, "_pull", pulled):
        switcher.fill()
    assert len(read) == len(transport.part.pulls)
    return read
