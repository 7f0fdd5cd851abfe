"""Weights and optimizer states that lie in pinned host memory between the stages that use them.

A tensor that is away keeps its identity, but its storage has no bytes. Copies run on a stream of their own,
beside what the device computes; events order them: a copy to the host starts when the device has done what it
was told before, and whoever reads a tensor waits until it has come back. On a CPU the same moves are made at
once. Values are never changed by it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import torch
from torch import Tensor, UntypedStorage

from puzzle.engine.runtime.tracing import Instant
from puzzle.engine.train.zero_adamw import ZeroAdamW
from puzzle.errors import UserError
from puzzle.model.decoder import Decoder

BLOCK = 1 << 26
"""Bytes of host memory taken at a time: torch rounds pinned memory up to a power of two."""

Parts = Callable[[], Sequence[Sequence[Tensor]]]
"""The tensors, in parts that are needed one after another."""


@dataclass
class _Held:
    """A storage that is or was on the host: its bytes, and the pieces of host memory that hold them."""

    storage: UntypedStorage
    nbytes: int
    home: list[Tensor]

    def pairs(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """(piece of host memory, bytes of the storage) all along it."""
        flat = torch.empty(0, dtype=torch.uint8, device=device).set_(self.storage)
        return list(zip(self.home, flat.split([len(piece) for piece in self.home]), strict=True))


class Offload:
    """Tensors that are here or away together. `constant` ones are copied to the host once."""

    def __init__(self, host: HostMemory, parts: Parts, constant: bool = False) -> None:
        self.device, self.constant = host.device, constant
        self._parts = parts
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._host = host
        self._held: dict[int, _Held] = {}
        self._coming: list[torch.cuda.Event | None] = []
        self.away = False
        self._moves: list[tuple[Instant, Instant]] = []
        self._waits: list[tuple[Instant, Instant]] = []
        self.moved = 0

    @torch.no_grad()
    def leave(self) -> None:
        """Copy all to the host and give the device memory back; nothing if they are away."""
        if self.away:
            return
        self.wait()
        with self._beside():
            for storage in self._storages():
                known = storage._cdata in self._held
                held = self._taken(storage)
                if not (known and self.constant):
                    self._copy(held, to_host=True)
                if self._stream is not None:
                    # Whoever gets the memory next may not write before the copy has read it.
                    torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage).record_stream(
                        self._stream
                    )
        for held in self._held.values():
            held.storage.resize_(0)
        self.away = True

    @torch.no_grad()
    def fetch(self) -> None:
        """Start to bring all back; nothing if they are here."""
        if not self.away:
            return
        parts = [self._held_of(part) for part in self._parts()]
        for held in (held for part in parts for held in part):
            held.storage.resize_(held.nbytes)
        self._coming = []
        with self._beside():
            for part in parts:
                for held in part:
                    self._copy(held, to_host=False)
                self._coming.append(None if self._stream is None else self._stream.record_event())
        self.away = False

    def wait(self, part: int | None = None) -> None:
        """Let the device go on only when a part (None: all) is back; fetches what is away."""
        self.fetch()
        indices = range(len(self._coming)) if part is None else (part,)
        events = [event for i in indices if i < len(self._coming) and (event := self._coming[i]) is not None]
        if not events:
            return
        began = Instant(self.device)
        for i in indices:
            self._coming[i] = None
        for event in events:
            torch.cuda.current_stream(self.device).wait_event(event)
        self._waits.append((began, Instant(self.device)))

    @torch.no_grad()
    def keep(self) -> None:
        """Copy to the host what was never there; all stays here, and may be changed from now on."""
        with self._beside():
            for storage in self._storages():
                if storage._cdata not in self._held:
                    self._copy(self._taken(storage), to_host=True)
        self._follow()

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what `keep` has copied."""
        with self._beside():
            for held in self._held.values():
                self._copy(held, to_host=False)
        self._follow()

    def _follow(self) -> None:
        """Let the device go on only behind the copies, whose times nobody asks for."""
        self._moves.clear()
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def take_times(self) -> tuple[float, float, int]:
        """Since the last call: seconds that this rank's device waited and that copies took, bytes moved."""
        if self._stream is not None:
            self._stream.synchronize()
            torch.cuda.current_stream(self.device).synchronize()
        copied = sum(end - start for start, end in self._moves)
        # On a CPU everything waits for every copy.
        waited = copied if self._stream is None else sum(end - start for start, end in self._waits)
        moved, self.moved = self.moved, 0
        self._moves.clear()
        self._waits.clear()
        return waited, copied, moved

    @contextlib.contextmanager
    def _beside(self) -> Generator[None]:
        """What is copied inside runs on the side stream, after all that the device was told before."""
        if self._stream is None:
            began = Instant(self.device)
            yield
            self._moves.append((began, Instant(self.device)))
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            began = Instant(self.device)
            yield
            self._moves.append((began, Instant(self.device)))

    def _copy(self, held: _Held, to_host: bool) -> None:
        for host, here in held.pairs(self.device):
            (host if to_host else here).copy_(here if to_host else host, non_blocking=True)
        self.moved += held.nbytes

    def _storages(self) -> list[UntypedStorage]:
        """All distinct storages with bytes in them."""
        found = {t.untyped_storage()._cdata: t.untyped_storage() for part in self._parts() for t in part}
        return [storage for storage in found.values() if storage.nbytes()]

    def _taken(self, storage: UntypedStorage) -> _Held:
        """The storage with its place on the host, made at the first time."""
        key = storage._cdata
        if key not in self._held:
            self._held[key] = _Held(storage, storage.nbytes(), self._host.take(storage.nbytes()))
        return self._held[key]

    def _held_of(self, part: Sequence[Tensor]) -> list[_Held]:
        keys = dict.fromkeys(t.untyped_storage()._cdata for t in part)
        return [self._held[key] for key in keys if key in self._held]


class HostMemory:
    """Host memory in blocks, of which `ahead` bytes are taken by a thread at once.

    Pinning costs about half a second per GiB, which a run spends beside the loading of its models and its
    first iteration, not when a tensor has to leave. `tick` is called after every block.
    """

    def __init__(self, device: torch.device, ahead: int = 0, tick: Callable[[], None] = lambda: None) -> None:
        self.device, self._tick = device, tick
        self._rest = torch.empty(0, dtype=torch.uint8)
        self._ready: SimpleQueue[Tensor | Exception] = SimpleQueue()
        self._coming = -(-ahead // BLOCK)
        if self._coming:
            threading.Thread(target=self._take_ahead, args=(self._coming,), name="host memory").start()

    def take(self, size: int) -> list[Tensor]:
        """Pieces (uint8) of `size` bytes together. UserError if the host has none left."""
        pieces = []
        while size:
            if not len(self._rest):
                self._rest = self._next()
            piece, self._rest = self._rest[:size], self._rest[size:]
            pieces.append(piece)
            size -= len(piece)
        return pieces

    def _next(self) -> Tensor:
        if not self._coming:
            return self._block()
        found = self._ready.get()
        if isinstance(found, Exception):
            self._coming = 0
            raise found
        self._coming -= 1
        return found

    def _take_ahead(self, count: int) -> None:
        """Not a daemon, which the end of the process would tear out of the driver: it ends by itself then."""
        try:
            with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
                for _ in range(count):
                    if not threading.main_thread().is_alive():
                        return
                    self._ready.put(self._block())
        except Exception as error:  # noqa: BLE001 - raised in the thread that needs the memory
            self._ready.put(error)

    def _block(self) -> Tensor:
        try:
            made = torch.empty(BLOCK, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"offload: the host has no more memory to pin ({reason}); offload less") from None
        self._tick()
        return made


class MergedAdapters:
    """Adds a model's adapters to its weights, and puts these back as they were, bit for bit: in bf16,
    subtracting would not. Meanwhile they lie on the host."""

    def __init__(self, host: HostMemory, decoder: Decoder) -> None:
        self._pairs = list(decoder.adapted())
        self._weights = Offload(host, lambda: [[weight for weight, _ in self._pairs]])

    def merge(self) -> None:
        """The weights are now those of base and adapters together."""
        self._weights.keep()
        for weight, adapter in self._pairs:
            adapter.merge_into(weight)

    def restore(self) -> None:
        """The weights are the base's again."""
        self._weights.restore()


def offload_states(host: HostMemory, optimizer: ZeroAdamW) -> Offload:
    """The masters and moments of an optimizer, which waits for them when it needs them."""
    made = Offload(host, lambda: [optimizer.state_tensors()])
    optimizer.before_use = made.wait
    return made


def offload_weights(host: HostMemory, decoder: Decoder) -> Offload:
    """The weights of a model that is not trained; a pass waits for a layer's when it comes to the layer."""
    modules = [module for module in decoder.modules() if list(module.parameters(recurse=False))]
    parts = [list(module.parameters(recurse=False)) for module in modules]
    made = Offload(host, lambda: parts, constant=True)
    for index, module in enumerate(modules):
        module.register_forward_pre_hook(lambda *_, index=index: made.wait(index))
    return made
