"""Executes switch plans: the weights of a model go from the storages of one layout to those of another."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from puzzle.engine.verify import compare
from puzzle.engine.world import World
from puzzle.errors import UserError
from puzzle.model.decoder import Decoder
from puzzle.model.rope import frequencies
from puzzle.plan.switch import Bucket, Move, RowRange, SwitchPlan, Transfer

ALIGN = 256
"""Bytes: every storage begins at a multiple, as device kernels like it."""

Storages = Mapping[str, Tensor]


class Switcher:
    """Fills a decoder of the destination placement from one of the source placement, as often as asked.

    The destination decoder may live on the meta device: its parameters are made by `fill`, as views of source
    storages where the plan says so, and taken away by `drop`. With `keep`, what was allocated stays for the
    next fill, at the same addresses.
    """

    def __init__(
        self,
        plan: SwitchPlan,
        world: World,
        source: Decoder | None,
        destination: Decoder | None,
        *,
        keep: bool = False,
        timeout: float = 600.0,
    ) -> None:
        """All ranks of the run make it together; decoders are None on ranks that a placement leaves out.

        `timeout` in seconds. UserError where ranks made different plans.
        """
        _same_plan(plan.hash, world)
        self.plan, self.world, self.keep, self.timeout = plan, world, keep, timeout
        self.source, self.destination = source, destination
        self.part = plan.for_rank(world.rank)
        self.depth = plan.depth
        self.group = world.groups([plan.ranks], "switch")
        if self.group is not None:
            # The first use of a communicator is a handshake of all its ranks; a bucket is not.
            dist.all_reduce(torch.zeros(1, device=world.device), group=self.group)
        self._homes: dict[str, tuple[nn.Module, str]] = {}
        if destination is not None:
            spec = destination.spec
            destination.freq = frequencies(spec.rope, spec.head_dim).to(world.device)
            self._homes = {s.name: _home(destination, s.name) for s in destination.storages}
        step = max(1, ALIGN // plan.itemsize)
        self._starts = [0]
        for param in self.part.allocate:
            self._starts.append(self._starts[-1] + -(-param.size // step) * step)
        self._arena: Tensor | None = None
        self.filled = False

    @torch.no_grad()
    def fill(self) -> float:
        """Make the destination's parameters; seconds of this rank until its device was done.

        RuntimeError naming rows and peer of a transfer that failed or took too long; UserError where memory
        does not suffice.
        """
        if self.filled:
            raise RuntimeError("the destination of a switch is filled already")
        start = time.perf_counter()
        have = dict(self.source.named_parameters()) if self.source is not None else {}
        try:
            got = self._allocate()
            for alias in self.part.aliases:
                got[alias.destination.name] = _rows(have, alias.source)
            self._exchange(have, got)
        except torch.cuda.OutOfMemoryError:
            raise UserError(
                f"switch: rank {self.world.rank} needs {self.part.peak_extra} bytes beside the training"
                " weights, its device has less free; lower switch.staging_bytes, or choose a"
                " generation.layout whose tp is a multiple of the actor's"
            ) from None
        for name, storage in got.items():
            self._install(name, storage)
        self.filled = True
        self._settle()
        return time.perf_counter() - start

    def drop(self) -> float:
        """Take the destination's parameters away and give their memory back; seconds of this rank."""
        start = time.perf_counter()
        if self.destination is not None:
            for storage in self.destination.storages:
                meta = torch.empty(storage.shape, dtype=self.destination.dtype, device="meta")
                self._install(storage.name, meta)
        self.filled = False
        if not self.keep:
            self._arena = None
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()
        self.world.synchronize()
        return time.perf_counter() - start

    def verify(self) -> None:
        """Compare every copy of every logical tensor on both sides; RuntimeError naming what differs."""
        compare(self.plan, self.world, self.source, self.destination)

    def _allocate(self) -> dict[str, Tensor]:
        """The plan's new storages, in one piece of memory; padding rows are zero."""
        if self._arena is None and self.part.allocate:
            assert self.destination is not None
            total, dtype = self._starts[-1], self.destination.dtype
            self._arena = torch.empty(total, dtype=dtype, device=self.world.device)
        got = {}
        for param, start in zip(self.part.allocate, self._starts, strict=False):
            assert self._arena is not None
            storage = self._arena[start : start + param.size].view(param.shape)
            covered = param.pieces[-1].stop if param.pieces else 0
            if covered < param.rows:
                storage[covered:].zero_()
            got[param.name] = storage
        return got

    def _install(self, name: str, storage: Tensor) -> None:
        module, leaf = self._homes[name]
        module.register_parameter(leaf, nn.Parameter(storage, requires_grad=False))

    def _exchange(self, have: Storages, got: Storages) -> None:
        """All buckets, `depth` under way at a time; local copies while the first ones travel."""
        scratch = None
        shapes = [bucket.scratch for bucket in self.part.buckets if bucket.scratch is not None]
        if shapes:
            assert self.destination is not None
            largest = max(torch.Size(shape).numel() for shape in shapes)
            scratch = torch.empty(largest, dtype=self.destination.dtype, device=self.world.device)
        tags: Counter[tuple[int, bool]] = Counter()
        waiting = deque(enumerate(self.part.buckets))
        under_way: deque[_Flight] = deque()
        copies: Sequence[Move] = self.part.copies
        while waiting or under_way:
            while waiting and len(under_way) < self.depth:
                flight = _Flight(self, *waiting.popleft(), have, got, scratch)
                flight.start(tags)
                under_way.append(flight)
            _copy(have, got, copies)
            copies = ()
            under_way.popleft().land(self.timeout)
        _copy(have, got, copies)

    def _settle(self) -> None:
        """Wait for the device, but not for ever: NCCL's own time-out would end the process without a word."""
        if self.world.device.type != "cuda":
            return
        done = torch.cuda.Event()
        done.record()
        deadline = time.monotonic() + self.timeout
        while not done.query():
            if time.monotonic() > deadline:
                peers = sorted({m.peer for b in self.part.buckets for m in (*b.sends, *b.receives)})
                names = [m.parts[0].name for b in self.part.buckets for m in (*b.sends, *b.receives)]
                raise RuntimeError(
                    f"switch: rank {self.world.rank}'s transfers ({names[0]} to {names[-1]}) with ranks"
                    f" {', '.join(map(str, peers))} were not done in {self.timeout:g} s"
                )


@dataclass
class _Flight:
    """One bucket under way."""

    switcher: Switcher
    index: int
    bucket: Bucket
    have: Storages
    got: Storages
    scratch: Tensor | None
    works: list[dist.Work] = field(default_factory=list)
    packed: list[tuple[Tensor, Transfer]] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape = self.bucket.scratch
        if shape is not None:
            assert self.scratch is not None
            self.into: Storages = {"scratch": self.scratch[: torch.Size(shape).numel()].view(shape)}
        else:
            self.into = self.got

    def start(self, tags: Counter[tuple[int, bool]]) -> None:
        """Pack, then start all messages as one batch: no order of sends and receives can block it."""
        operations = []
        group, moved = self.switcher.group, self.switcher.world.moved
        for message in self.bucket.sends:
            operations.append(self._operation(dist.isend, message, self._packed(message), tags))
            moved["switch"] += message.nbytes
        for message in self.bucket.receives:
            operations.append(self._operation(dist.irecv, message, self._landing(message), tags))
        if operations:
            assert group is not None
            try:
                self.works = dist.batch_isend_irecv(operations)
            except RuntimeError as error:
                raise self._failed(0, error) from error
        _copy(self.have, self.into, self.bucket.gathers)

    def land(self, timeout: float) -> None:
        """Wait for the messages, then put in place what came packed or whole."""
        for number, work in enumerate(self.works):
            try:
                if self.switcher.world.device.type == "cuda":
                    work.wait()
                else:
                    work.wait(timedelta(seconds=timeout))
            except RuntimeError as error:
                raise self._failed(number, error) from error
        targets, values = [], []
        for buffer, message in self.packed:
            rows = [_rows(self.into, part) for part in message.parts]
            targets += rows
            pieces = buffer.split([r.numel() for r in rows])
            values += [piece.view_as(r) for piece, r in zip(pieces, rows, strict=True)]
        if targets:
            torch._foreach_copy_(targets, values)
        _copy(self.into, self.got, self.bucket.slices)

    def _packed(self, message: Transfer) -> Tensor:
        rows = [_rows(self.have, part) for part in message.parts]
        return rows[0] if len(rows) == 1 else torch.cat([r.reshape(-1) for r in rows])

    def _landing(self, message: Transfer) -> Tensor:
        if len(message.parts) == 1:
            return _rows(self.into, message.parts[0])
        sample = next(iter(self.into.values()))
        buffer = sample.new_empty(message.nbytes // sample.element_size())
        self.packed.append((buffer, message))
        return buffer

    def _operation(
        self,
        kind: Callable[..., dist.Work | None],
        message: Transfer,
        tensor: Tensor,
        tags: Counter[tuple[int, bool]],
    ) -> dist.P2POp:
        sending = kind is dist.isend
        tag = tags[message.peer, sending]
        tags[message.peer, sending] += 1
        return dist.P2POp(kind, tensor, message.peer, self.switcher.group, tag)

    def _failed(self, number: int, error: RuntimeError) -> RuntimeError:
        """Names the message: NCCL ends a batch as one, then it is the first."""
        message = (*self.bucket.sends, *self.bucket.receives)[number]
        first, last = message.parts[0], message.parts[-1]
        rows = f"{first.name}[{first.start}:{first.start + first.rows}]"
        rows += f" to {last.name}" if len(message.parts) > 1 else ""
        kind = "send" if number < len(self.bucket.sends) else "receive"
        label = f"{kind} {rows}, peer rank {message.peer}"
        said = " ".join(str(error).split())
        return RuntimeError(f"switch, bucket {self.index}: {label} failed: {said}")


def _same_plan(own: str, world: World) -> None:
    hashes = world.gather(own)
    others = [str(rank) for rank, found in enumerate(hashes) if found != hashes[0]]
    if others:
        raise UserError(
            f"switch: ranks {', '.join(others)} made another plan than rank 0 (hashes"
            f" {', '.join(sorted({found[:12] for found in hashes}))}): start every rank with the same"
            " configuration and the same version"
        )


def _rows(storages: Storages, where: RowRange) -> Tensor:
    return storages[where.name].detach()[where.start : where.start + where.rows]


def _copy(source: Storages, destination: Storages, moves: Sequence[Move]) -> None:
    if moves:
        values = [_rows(source, move.source) for move in moves]
        torch._foreach_copy_([_rows(destination, move.destination) for move in moves], values)


def _home(decoder: Decoder, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and its name there."""
    path, _, leaf = name.rpartition(".")
    return decoder.get_submodule(path), leaf
