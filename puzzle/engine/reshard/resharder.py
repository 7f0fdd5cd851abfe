"""Executes switch plans: the weights of a model go from the storages of one layout to those of another."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from puzzle.engine.reshard.transports import Messages, PeerCopies, Unreachable, rows_of
from puzzle.engine.reshard.verify import compare
from puzzle.engine.runtime.tracing import Instant
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.model.decoder import Decoder
from puzzle.model.rope import frequencies
from puzzle.plan.reshard.plan import SwitchPlan

ALIGN = 256
"""Bytes: every storage begins at a multiple, as device kernels like it."""


class Resharder:
    """Fills a decoder of the destination placement from one of the source placement, as often as asked.

    The destination decoder may live on the meta device: its parameters are made by `fill`, as views of source
    storages where the plan says so, and taken away by `drop`.
    """

    def __init__(
        self,
        plan: SwitchPlan,
        world: World,
        source: Decoder | None,
        destination: Decoder | None,
        *,
        timeout: float | None = None,
        transport: Literal["auto", "peer", "messages"] = "messages",
        beside: bool = False,
        keep: bool = False,
    ) -> None:
        """All ranks of the run make it together; decoders are None on ranks that a placement leaves out.

        `auto` copies out of peers' memory where every pair of devices that must talk can, else `declined`
        says why not; baseline strategies and CPUs use messages. `timeout` in seconds, by default a little
        less than the world's. With `beside`, a CUDA device goes on before all is there: a pass of the
        destination awaits each layer's weights when it comes to the layer. With `keep`, what the first fill
        allocates stays, so that every one brings the weights to the same addresses.
        UserError where ranks made different plans, and for `peer` where that cannot be.
        """
        _same_plan(plan.hash, world)
        limit = world.timeout.total_seconds() if world.timeout is not None else 600.0
        self.world, self.timeout = world, timeout or 0.9 * limit
        self.source, self.destination = source, destination
        self.declined: str | None = None
        self.transport = self._peer_copies(plan, transport) or Messages(plan, world, self.timeout)
        self.plan, self.part = self.transport.plan, self.transport.part
        self._homes: dict[str, tuple[nn.Module, str]] = {}
        if destination is not None:
            spec = destination.spec
            destination.freq = frequencies(spec.rope, spec.head_dim).to(world.device)
            self._homes = {s.name: _home(destination, s.name) for s in destination.storages}
        step = max(1, ALIGN // plan.itemsize)
        self._sizes = [-(-param.size // step) * step for param in self.part.allocate]
        self.filled, self.keep = False, keep
        self._arena: Tensor | None = None
        self.side = None
        self._filling: tuple[Instant, Instant] | None = None
        self._waits: list[tuple[Instant, Instant]] = []
        if beside and world.device.type == "cuda":
            self.side = torch.cuda.Stream()
            self.transport.watched = True
            if destination is not None:
                self._await_in(destination)

    def _peer_copies(self, plan: SwitchPlan, wanted: str) -> PeerCopies | None:
        """That transport, if it is wanted and possible."""
        sensible = plan.strategy == "planned" and self.world.device.type == "cuda"
        if wanted == "messages" or (wanted == "auto" and not sensible):
            return None
        try:
            return PeerCopies(plan.by_peer_copies(), self.world, self._have(), self.timeout)
        except Unreachable as error:
            if wanted == "peer":
                raise UserError(f"switch.transport peer: {error}; use auto or messages") from None
            self.declined = str(error)
            return None

    def _have(self) -> dict[str, Tensor]:
        return dict(self.source.named_parameters()) if self.source is not None else {}

    @torch.no_grad()
    def fill(self) -> float:
        """Make the destination's parameters; seconds of this rank until its device, or `beside` its host,
        was done.

        RuntimeError naming rows and peer of a transfer that failed or took too long; UserError where memory
        does not suffice.
        """
        if self.filled:
            raise RuntimeError("the destination of a switch is filled already")
        start = time.perf_counter()
        have = self._have()
        try:
            got = self._allocate()
            for alias in self.part.aliases:
                got[alias.destination.name] = rows_of(have, alias.source)
            if self.side is None:
                self.transport.carry(have, got)
            else:
                self.side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.side):
                    began = Instant(self.world.device)
                    self.transport.carry(have, got)
                    self._filling = (began, Instant(self.world.device))
        except torch.cuda.OutOfMemoryError:
            raise UserError(
                f"switch: rank {self.world.rank} needs {self.part.peak_extra} bytes beside the training"
                " weights, its device has less free; lower switch.staging_bytes, or choose a"
                " generation.layout whose tp is a multiple of the actor's"
            ) from None
        for name, storage in got.items():
            self._install(name, storage)
        self.filled = True
        if self.side is None:
            self._settle()
        return time.perf_counter() - start

    def _await_in(self, destination: Decoder) -> None:
        """Have passes await the embedding first, then each layer's weights, behind the layers all."""
        destination.register_forward_pre_hook(lambda *_: self._await(["embed"]))
        for number, layer in destination.layers.items():
            names = [f"layers.{number}.{name}" for name, _ in layer.named_parameters()]
            layer.register_forward_pre_hook(lambda *_, names=names: self._await(names))
        *_, last = destination.layers.values()
        last.register_forward_hook(lambda *_: self._await(list(self.transport.arrived)))

    def _await(self, names: Sequence[str]) -> None:
        """Let the current stream go on only when these storages are there."""
        arrived = self.transport.arrived
        events = [event for name in names for event in arrived.pop(name, ())]
        if events:
            began = Instant(self.world.device)
            for event in events:
                torch.cuda.current_stream().wait_event(event)
            self._waits.append((began, Instant(self.world.device)))

    def finish(self) -> None:
        """Wait until everything that `fill` began is there; nothing if it did not go on beside."""
        if self.side is not None:
            self.transport.arrived.clear()
            torch.cuda.current_stream().wait_stream(self.side)
            self._settle()

    def take_times(self) -> tuple[float, float]:
        """Of the last fill beside other work, which is over: seconds that it took, and that passes waited."""
        assert self._filling is not None
        waited = sum(end - began for began, end in self._waits)
        self._waits.clear()
        return self._filling[1] - self._filling[0], waited

    def drop(self) -> float:
        """Take the destination's parameters away; seconds of this rank.

        Their memory, unless it is kept, goes back to torch's allocator, and by it to the device where that
        cannot lend single pages: what training allocates for good would tear one large piece, which could
        then neither be filled again nor given back.
        """
        start = time.perf_counter()
        self.finish()
        if self.destination is not None:
            for storage in self.destination.storages:
                meta = torch.empty(storage.shape, dtype=self.destination.dtype, device="meta")
                self._install(storage.name, meta)
        self.filled = False
        if self.world.device.type == "cuda" and not lends_pages():
            torch.cuda.empty_cache()
        self.world.synchronize()
        return time.perf_counter() - start

    def verify(self) -> None:
        """Compare every copy of every logical tensor on both sides; RuntimeError naming what differs."""
        self.finish()
        compare(self.plan, self.world, self.source, self.destination)

    def _allocate(self) -> dict[str, Tensor]:
        """The plan's new storages, in one piece of memory; padding rows are zero."""
        if not self.part.allocate:
            return {}
        assert self.destination is not None
        arena = self._arena
        if arena is None:
            arena = torch.empty(sum(self._sizes), dtype=self.destination.dtype, device=self.world.device)
        self._arena = arena if self.keep else None
        got = {}
        for param, room in zip(self.part.allocate, arena.split(self._sizes), strict=True):
            storage = got[param.name] = room[: param.size].view(param.shape)
            covered = param.pieces[-1].stop if param.pieces else 0
            if covered < param.rows:
                storage[covered:].zero_()
        return got

    def _install(self, name: str, storage: Tensor) -> None:
        module, leaf = self._homes[name]
        module.register_parameter(leaf, nn.Parameter(storage, requires_grad=False))

    def _settle(self) -> None:
        """Wait for the device, but not for ever: NCCL's own time-out would end the process without a word."""
        if self.world.device.type != "cuda":
            return
        done = torch.cuda.Event()
        done.record()
        deadline = time.monotonic() + self.timeout
        while not done.query():
            if time.monotonic() > deadline:
                marks = self.transport.marks
                stuck = next((label for label, event in marks if not event.query()), "switch: local copies")
                raise RuntimeError(f"{stuck}: rank {self.world.rank} waited {self.timeout:g} s")


def lends_pages() -> bool:
    """Whether torch's allocator for devices maps memory page by page (expandable segments)."""
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    return "expandable_segments:True" in settings


def _same_plan(own: str, world: World) -> None:
    hashes = world.gather(own)
    others = [str(rank) for rank, found in enumerate(hashes) if found != hashes[0]]
    if others:
        raise UserError(
            f"switch: ranks {', '.join(others)} made another plan than rank 0 (hashes"
            f" {', '.join(sorted({found[:12] for found in hashes}))}): start every rank with the same"
            " configuration and the same version"
        )


def _home(decoder: Decoder, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and its name there."""
    path, _, leaf = name.rpartition(".")
    return decoder.get_submodule(path), leaf
