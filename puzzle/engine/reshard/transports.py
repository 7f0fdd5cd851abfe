"""How rows of weights get from rank to rank: by messages, or by copies out of the peers' memory."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from puzzle.engine.reshard import ipc
from puzzle.engine.runtime.world import World
from puzzle.plan.reshard.plan import SwitchPlan
from puzzle.plan.reshard.rank_plan import Bucket, Move, Pull, RowRange, Transfer

Storages = Mapping[str, Tensor]
Line = tuple[int, bool]
"""A peer, and whether messages go there."""

LANES = 4
"""Communicators that share the messages of a bucket: one alone leaves links idle (docs/performance.md)."""


class Unreachable(Exception):
    """Peers' memory cannot be read; says why in a few words. Raised on all ranks alike."""


class Transport(ABC):
    """Brings rows into destination storages. `marks` of the last use say what the device is at, in order;
    if `watched`, `arrived` by name when a destination storage is there."""

    def __init__(self, plan: SwitchPlan, world: World, timeout: float) -> None:
        """All ranks of the run together; gloo waits for no message longer than `timeout` seconds."""
        self.plan, self.world, self.timeout = plan, world, timeout
        self.part = plan.for_rank(world.rank)
        self.cuda = world.device.type == "cuda"
        self.marks: list[tuple[str, torch.cuda.Event]] = []
        self.watched = False
        self.arrived: defaultdict[str, list[torch.cuda.Event]] = defaultdict(list)

    @abstractmethod
    def carry(self, have: Storages, got: Storages) -> None:
        """Start, and on a CPU finish, everything but aliases; RuntimeError naming what failed."""

    def wait(self, work: dist.Work | None, label: str) -> None:
        """NCCL: have the device wait. gloo: wait, not longer than the time-out."""
        assert work is not None
        try:
            with self.world.progress.waiting(label):
                if self.cuda:
                    work.wait()
                else:
                    work.wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            raise _failed(label, error) from error

    def mark(self, label: str) -> None:
        """Remember where the device's current stream is."""
        if self.cuda:
            event = torch.cuda.Event()
            event.record()
            self.marks.append((label, event))

    def note(self, ranges: Iterable[RowRange]) -> None:
        """These rows are there when the current stream has done what it was told."""
        if self.watched:
            event = torch.cuda.current_stream().record_event()
            for name in {where.name for where in ranges}:
                self.arrived[name].append(event)

    def copy(self, have: Storages, got: Storages) -> None:
        """What this rank has itself."""
        _copy(have, got, self.part.copies)
        self.note(move.destination for move in self.part.copies)


class Messages(Transport):
    """Batches of sends and receives, each bucket's on several communicators."""

    def __init__(self, plan: SwitchPlan, world: World, timeout: float) -> None:
        """All ranks of the run together."""
        super().__init__(plan, world, timeout)
        self.groups = [world.groups([plan.ranks], f"switch {lane}") for lane in range(LANES)]
        for group in self.groups:
            # The first use of a communicator is a handshake of all its ranks; a bucket is not.
            if group is not None:
                dist.all_reduce(torch.zeros(1, device=world.device), group=group)

    def carry(self, have: Storages, got: Storages) -> None:
        """All buckets, `depth` under way at a time; local copies while the first ones travel."""
        self.marks = []
        scratch = None
        shapes = [bucket.scratch for bucket in self.part.buckets if bucket.scratch is not None]
        if shapes:
            largest = max(torch.Size(shape).numel() for shape in shapes)
            scratch = next(iter(got.values())).new_empty(largest)
        tags: Counter[Line] = Counter()
        loads: defaultdict[Line, list[int]] = defaultdict(lambda: [0] * LANES)
        waiting = deque(enumerate(self.part.buckets))
        under_way: deque[_Flight] = deque()

        def start() -> None:
            while waiting and len(under_way) < self.plan.depth:
                flight = _Flight(self, *waiting.popleft(), have, got, scratch)
                flight.start(tags, loads)
                under_way.append(flight)

        start()
        self.copy(have, got)
        while under_way:
            under_way.popleft().land()
            start()


@dataclass
class _Flight:
    """One bucket under way."""

    owner: Messages
    index: int
    bucket: Bucket
    have: Storages
    got: Storages
    scratch: Tensor | None
    works: list[tuple[dist.Work, Sequence[str]]] = field(default_factory=list)
    packed: list[tuple[Tensor, Transfer]] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape = self.bucket.scratch
        if shape is not None:
            assert self.scratch is not None
            self.into: Storages = {"scratch": self.scratch[: torch.Size(shape).numel()].view(shape)}
        else:
            self.into = self.got

    def start(self, tags: Counter[Line], loads: Mapping[Line, list[int]]) -> None:
        """Pack, then start the messages of each lane as one batch: no order of sends and receives blocks it.

        Each message takes the lane with the fewest bytes of its pair so far: both ends agree on it.
        """
        groups, moved = self.owner.groups, self.owner.world.moved
        lanes: list[tuple[list[dist.P2POp], list[str]]] = [([], []) for _ in groups]
        for sending, messages in ((True, self.bucket.sends), (False, self.bucket.receives)):
            for message in messages:
                kind: Callable[..., dist.Work | None] = dist.isend if sending else dist.irecv
                tensor = self._packed(message) if sending else self._landing(message)
                line = (message.peer, sending)
                lane, tag = loads[line].index(min(loads[line])), tags[line]
                loads[line][lane] += message.nbytes
                tags[line] += 1
                operations, labels = lanes[lane]
                operations.append(dist.P2POp(kind, tensor, message.peer, groups[lane], tag))
                labels.append(self._label(message, sending))
                moved["switch"] += message.nbytes if sending else 0
        for operations, labels in lanes:
            if operations:
                try:
                    works = dist.batch_isend_irecv(operations)
                except RuntimeError as error:
                    raise _failed(labels[0], error) from error
                # NCCL ends a batch as one.
                self.works += zip(
                    works, [[one] for one in labels] if len(works) > 1 else [labels], strict=True
                )
        _copy(self.have, self.into, self.bucket.gathers)

    def land(self) -> None:
        """Wait for the messages, then put in place what came packed or whole."""
        for work, labels in self.works:
            self.owner.wait(work, labels[0])
            self.owner.mark(f"{labels[0]} ({len(labels)} messages)")
        targets, values = [], []
        for buffer, message in self.packed:
            rows = [rows_of(self.into, part) for part in message.parts]
            targets += rows
            pieces = buffer.split([r.numel() for r in rows])
            values += [piece.view_as(r) for piece, r in zip(pieces, rows, strict=True)]
        if targets:
            torch._foreach_copy_(targets, values)
        _copy(self.into, self.got, self.bucket.slices)
        self.owner.note(part for message in self.bucket.receives for part in message.parts)
        self.owner.note(move.destination for move in self.bucket.slices)

    def _packed(self, message: Transfer) -> Tensor:
        rows = [rows_of(self.have, part) for part in message.parts]
        return rows[0] if len(rows) == 1 else torch.cat([r.reshape(-1) for r in rows])

    def _landing(self, message: Transfer) -> Tensor:
        if len(message.parts) == 1:
            return rows_of(self.into, message.parts[0])
        sample = next(iter(self.into.values()))
        buffer = sample.new_empty(message.nbytes // sample.element_size())
        self.packed.append((buffer, message))
        return buffer

    def _label(self, message: Transfer, sending: bool) -> str:
        first, last = message.parts[0], message.parts[-1]
        rows = f"{first.name}[{first.start}:{first.start + first.rows}]"
        rows += f" to {last.name}" if len(message.parts) > 1 else ""
        kind = "send" if sending else "receive"
        return f"switch, bucket {self.index}: {kind} {rows}, peer rank {message.peer}"


class PeerCopies(Transport):
    """Every rank copies the rows that it needs out of its peers' source storages, opened once: one peer after
    another, at each time another reader for every peer.

    rank 0 reads   1 1 1 2 2 2 3 3 3
    rank 1 reads   2 2 2 3 3 3 0 0 0
    rank 2 reads   3 3 3 0 0 0 1 1 1      time ->
    rank 3 reads   0 0 0 1 1 1 2 2 2

    If `watched`, rows come by unit, from all peers side by side: the first layers are wanted first.
    """

    def __init__(self, plan: SwitchPlan, world: World, have: Storages, timeout: float) -> None:
        """All ranks of the run together. Unreachable where some pair that must talk cannot."""
        super().__init__(plan, world, timeout)
        self.group = world.groups([plan.ranks], "switch 0") if plan.pairs else None
        self.token = torch.zeros(1, device=world.device)
        peers = open_peers(plan.pairs, world, have)
        self.addresses = {name: tensor.data_ptr() for name, tensor in have.items()}
        self.values = {pull: rows_of(peers[pull.peer], pull.source) for pull in self.part.pulls}
        turns = sorted({pull.peer for pull in self.values}, key=lambda peer: (peer - world.rank) % world.size)
        self.by_peer = {peer: [pull for pull in self.values if pull.peer == peer] for peer in turns}
        self.streams = {peer: torch.cuda.Stream() for peer in turns if self.cuda}
        self._meet("switch: handshake")

    def carry(self, have: Storages, got: Storages) -> None:
        """Copy everything; peers wait for each other before (weights are there) and after (none is read)."""
        if {name: tensor.data_ptr() for name, tensor in have.items()} != self.addresses:
            raise RuntimeError("switch: training weights have moved since peers opened them")
        self.marks = []
        ranks = ", ".join(map(str, self.plan.ranks))
        self._meet(f"switch: wait until the weights of ranks {ranks} are ready to be copied")
        for stream in self.streams.values():
            stream.wait_stream(torch.cuda.current_stream())
        if self.watched:
            for pull in self.values:
                self._pull([pull], got, self.streams[pull.peer])
        else:
            one = next(iter(self.streams.values()), None)
            for pulls in self.by_peer.values():
                self._pull(pulls, got, one)
        self.copy(have, got)
        for stream in self.streams.values():
            torch.cuda.current_stream().wait_stream(stream)
        self.world.moved["switch"] += sum(pull.nbytes for pull in self.part.pulls)
        self._meet(f"switch: wait until ranks {ranks} have copied")

    def _pull(self, pulls: Sequence[Pull], got: Storages, stream: torch.cuda.Stream | None) -> None:
        """Rows of one peer."""
        with torch.cuda.stream(stream):
            for pull in pulls:
                rows_of(got, pull.destination).copy_(self.values[pull], non_blocking=True)
            self.note(pull.destination for pull in pulls)
            first, last = pulls[0], pulls[-1]
            self.mark(f"switch: copy {first.source.name} to {last.source.name} of peer rank {last.peer}")

    def _meet(self, label: str) -> None:
        if self.group is not None:
            self.wait(dist.all_reduce(self.token, group=self.group, async_op=True), label)
            self.mark(label)


def open_peers(
    pairs: Collection[tuple[int, int]],
    world: World,
    have: Storages,
    what: str = "weights",
    counts: bool = False,
) -> dict[int, dict[str, Tensor]]:
    """By rank and name, tensors that ranks have and this rank may read, or, if it `counts` there, add to;
    `pairs` are (owner, reader). `what` they are called in refusals.

    All ranks of the run together. Unreachable where some pair cannot.
    """
    device, offers, peers, problem = world.device, {}, {}, None
    if device.type == "cuda" and os.environ.get("NCCL_P2P_DISABLE", "0") not in ("", "0"):
        problem = "NCCL_P2P_DISABLE is set"
    try:
        for source, destination in pairs if problem is None else ():
            if source == world.rank:
                offers[destination] = ipc.offer(have, device)
    except RuntimeError as error:
        problem = f"rank {world.rank} cannot share its {what}: {_first_line(error)}"
    everyone = world.gather((problem, offers))
    _agree([said for said, _ in everyone])
    for source in [source for source, destination in pairs if destination == world.rank]:
        offered = everyone[source][1][world.rank]
        why = ipc.unreachable(offered, device, counts)
        try:
            peers[source] = ipc.opened(offered, device) if why is None else {}
        except RuntimeError as error:
            why = _first_line(error)
        if why is not None:
            problem = f"rank {world.rank} cannot read rank {source}'s {what}: {why}"
            break
    _agree(world.gather(problem))
    return peers


def _agree(problems: Sequence[str | None]) -> None:
    found = [problem for problem in problems if problem is not None]
    if found:
        raise Unreachable(found[0])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _failed(label: str, error: RuntimeError) -> RuntimeError:
    return RuntimeError(f"{label} failed: {' '.join(str(error).split())}")


def rows_of(storages: Storages, where: RowRange) -> Tensor:
    """A view of those rows."""
    return storages[where.name].detach().narrow(0, where.start, where.rows)


def _copy(source: Storages, destination: Storages, moves: Sequence[Move]) -> None:
    if moves:
        values = [rows_of(source, move.source) for move in moves]
        torch._foreach_copy_([rows_of(destination, move.destination) for move in moves], values)
