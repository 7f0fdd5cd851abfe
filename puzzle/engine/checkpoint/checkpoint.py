"""Checkpoints of trained models: `state-N/` with one safetensors file per rank and a manifest written last.

Every rank copies the rows it owns to host memory (on a GPU beside the passes: the next optimizer step alone
awaits it), then a thread writes them while training goes on. Readers under any layout take what intersects
their own boxes. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle import __version__
from puzzle.engine.checkpoint import manifest
from puzzle.engine.checkpoint.boxfiles import Logical, Reader, checksum, write_boxes
from puzzle.engine.checkpoint.manifest import KINDS, Entry, Manifest, SavedFile, SavedModel
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.train.zero_adamw import ZeroAdamW
from puzzle.errors import UserError, describe
from puzzle.files import durable
from puzzle.files.reading import read_text
from puzzle.model.weights import fill

MANIFEST = "manifest.json"
POLL_SECONDS = 0.02
PATIENCE_SECONDS = 1800.0
"""How long rank 0 waits for the files of the others."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete: its folder, the seconds it took from the call on, its bytes."""

    number: int
    folder: Path
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Restored:
    """What was loaded; `notes` name newer checkpoints that were damaged."""

    number: int
    folder: Path
    state: Mapping[str, Any]
    notes: tuple[str, ...]


class Checkpoints:
    """The checkpoints of `models` in `folder`. All ranks make the same calls in the same order."""

    def __init__(
        self, folder: Path, models: Sequence[ModelRuntime], keep: int = 2, asynchronous: bool = True
    ) -> None:
        """Half-written checkpoints of earlier processes are removed. Every model has an optimizer."""
        self.folder, self.models, self.keep, self.asynchronous = folder, models, keep, asynchronous
        self.world = models[0].world
        self._host: dict[tuple[str, str, int], Tensor] = {}
        self._stream = torch.cuda.Stream(self.world.device) if self.world.device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._saved: list[Saved] = []
        if self.world.rank == 0:
            for left in folder.glob("state-*.partial"):
                shutil.rmtree(left, ignore_errors=True)
        self.world.share(None)
        self._entries = self._all_entries() if self.world.rank == 0 else ()

    def _all_entries(self) -> tuple[Entry, ...]:
        return tuple(
            entry
            for model in self.models
            for entry in manifest.entries(model.name, model.spec, model.placement)
        )

    def save(self, number: int, state: Mapping[str, Any]) -> None:
        """Begin to save what is now as `state-<number>`, with `state` (JSON values); waits for the last save.

        UserError if that one failed, or, not asynchronous, if this one does.
        """
        self.wait()
        began = time.perf_counter()
        self._snapshot()
        steps = {model.name: _optimizer(model).steps for model in self.models}
        work = (number, dict(state), steps, began)
        if not self.asynchronous:
            self._write(*work)
            return self._raise()
        self._thread = threading.Thread(target=self._write, args=work, daemon=True, name="checkpoint")
        self._thread.start()

    @property
    def under_way(self) -> bool:
        """Whether this rank still writes; rank 0 does until the checkpoint is complete."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Until no save is under way. UserError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    def finished(self) -> list[Saved]:
        """Saves completed since the last call (rank 0 alone has any). UserError if one failed."""
        self._raise()
        found, self._saved = self._saved, []
        return found

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _snapshot(self) -> None:
        """Copy masters and moments to host memory, which later saves use again.

        On a GPU the copies run on a stream of their own, after what the device has to do now and before the
        next optimizer step changes anything.
        """
        pairs: list[tuple[Tensor, Tensor]] = []
        for model in self.models:
            optimizer = _optimizer(model)
            for i in range(len(optimizer.slots)):
                for kind, values in zip(KINDS, (optimizer.masters[i], *optimizer.moments(i)), strict=True):
                    key = (model.name, kind, i)
                    if key not in self._host:
                        self._host[key] = torch.empty(values.shape, pin_memory=values.is_cuda)
                    pairs.append((self._host[key], values))
        if self._stream is None:
            for host, values in pairs:
                host.copy_(values)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.world.device))
        with torch.cuda.stream(self._stream):
            for host, values in pairs:
                host.copy_(values, non_blocking=True)
                if values.is_cuda:
                    values.record_stream(
                        self._stream
                    )  # whoever frees it: the memory is not used again too early
            self._copied = self._stream.record_event()
        for model in self.models:
            _optimizer(model).unchanged_until = self._copied

    def _write(self, number: int, state: dict[str, Any], steps: dict[str, int], began: float) -> None:
        """Write this rank's file; on rank 0 complete the checkpoint too. Keeps what goes wrong for `wait`."""
        partial = self.folder / f"state-{number}.partial"
        note = partial / f"rank-{self.world.rank:05d}.json"
        try:
            if self._copied is not None:
                self._copied.synchronize()
            partial.mkdir(parents=True, exist_ok=True)
            path = partial / manifest.rank_file(self.world.rank)
            file = write_boxes(path, list(self._boxes()), self.world.progress.tick)
            durable.write_text(note, json.dumps(asdict(file)))
            if self.world.rank == 0:
                self._complete(partial, number, state, steps, began)
        except OSError as error:
            self._error = UserError(
                f"checkpoint {number} failed: {describe(error)}; free space or permit writing"
            )
        except Exception as error:  # noqa: BLE001 - `wait` raises it in the thread that asked for the save
            self._error = error
        if self._error is not None and self.world.rank > 0:
            _report(note, str(self._error))

    def _boxes(self) -> Iterator[tuple[str, Tensor]]:
        """(key, values in host memory) of every box that this rank owns."""
        for model in self.models:
            storages = {storage.name: i for i, storage in enumerate(model.stage.storages)}
            slots = {storages[s.local.name]: (n, s) for n, s in enumerate(_optimizer(model).slots)}
            for own in manifest.owned(model.spec, model.placement.layout, model.coord):
                index, slot = slots[own.index]
                rows = slice(own.piece.start - slot.low, own.piece.stop - slot.low)
                for kind in KINDS:
                    values = self._host[model.name, kind, index][rows]
                    key = manifest.box_key(model.name, own.piece.tensor, kind, own.piece.box)
                    yield key, values.t() if own.transposed else values

    def _complete(
        self, partial: Path, number: int, state: dict[str, Any], steps: dict[str, int], began: float
    ) -> None:
        files = {manifest.rank_file(rank): self._file_of(partial, rank) for rank in range(self.world.size)}
        models = {m.name: SavedModel(manifest.identity(m.spec), steps[m.name]) for m in self.models}
        versions = {"puzzle": __version__, "torch": torch.__version__}
        text = Manifest(state, models, files, self._entries, versions).dumps()
        for rank in range(self.world.size):
            (partial / f"rank-{rank:05d}.json").unlink()
        durable.write_text(partial / MANIFEST, text)
        final = partial.with_suffix("")
        # One that stands there is unusable, from before a resume.
        durable.put(partial, final, self.world.progress.writing)
        size = sum(file.bytes for file in files.values())
        self._saved.append(Saved(number, final, time.perf_counter() - began, size))
        for old in self._numbers()[: -self.keep]:
            shutil.rmtree(self._state(old), ignore_errors=True)

    def _file_of(self, partial: Path, rank: int) -> SavedFile:
        """What a rank says about its file, once it is whole."""
        note = partial / f"rank-{rank:05d}.json"
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not note.exists():
            if time.monotonic() > deadline:
                raise UserError(f"{partial}: rank {rank} wrote no file; all ranks must see one file system")
            time.sleep(POLL_SECONDS)
        told = json.loads(note.read_text())
        if "error" in told:
            raise UserError(told["error"])
        return SavedFile(**told)

    def _state(self, number: int) -> Path:
        return self.folder / f"state-{number}"

    def _numbers(self) -> list[int]:
        """The numbers of all that bear a checkpoint's name, ascending."""
        return list(durable.numbered(self.folder, "state"))

    def restore(self) -> Restored | None:
        """Load the newest undamaged checkpoint into the models; None if there never was one.

        UserError if all are damaged, or if one is of other models.
        """
        notes: list[str] = []
        for number in reversed(self.world.share(self._numbers())):
            folder = self._state(number)
            found, problem = _read_manifest(folder)
            problem = self._first(problem)
            if problem is None:
                assert found is not None
                for model in self.models:
                    found.check_model(model.name, model.spec)
                problem = self._first(self._damage(folder, found))
            if problem is None:
                assert found is not None
                with torch.no_grad():
                    self._load(folder, found)
                return Restored(number, folder, found.state, tuple(notes))
            notes.append(f"{folder} is damaged: {problem}")
        if notes:
            raise UserError(f"{notes[0]}; no earlier checkpoint is whole: start a new run")
        return None

    def _first(self, problem: str | None) -> str | None:
        """The first problem that any rank has."""
        return next((p for p in self.world.gather(problem) if p is not None), None)

    def _damage(self, folder: Path, found: Manifest) -> str | None:
        """What is wrong with this rank's share of the files."""
        for index, (name, file) in enumerate(found.files.items()):
            if index % self.world.size != self.world.rank:
                continue
            try:
                size, crc = checksum(folder / name, self.world.progress.tick)
            except OSError as error:
                return describe(error)
            if size != file.bytes:
                return f"{name} has {size} bytes instead of {file.bytes}"
            if crc != file.crc:
                return f"the checksum of {name} is wrong"
        return None

    def _load(self, folder: Path, found: Manifest) -> None:
        with Reader(folder, found.entries) as reader:
            for model in self.models:
                optimizer, name = _optimizer(model), model.name
                fill(model.decoder, lambda tensor, name=name: Logical(reader, name, tensor), frozen=False)
                optimizer.set_steps(found.models[name].steps)
                for i, slot in enumerate(optimizer.slots):
                    for kind, target in zip(
                        KINDS, (optimizer.masters[i], *optimizer.moments(i)), strict=True
                    ):
                        for piece in slot.local.clip(slot.low, slot.high):
                            values = reader.read(name, piece.tensor, kind, piece.box)
                            rows = target[piece.start - slot.low : piece.stop - slot.low]
                            rows.copy_(values.t() if slot.local.transposed else values)
                            self.world.progress.tick()


def _optimizer(model: ModelRuntime) -> ZeroAdamW:
    assert model.optimizer is not None, f"{model.name} is not trained"
    return model.optimizer


def _read_manifest(folder: Path) -> tuple[Manifest | None, str | None]:
    """The manifest, or what is wrong with it."""
    try:
        return Manifest.loads(read_text(folder / MANIFEST)), None
    except UserError as error:
        return None, f"{MANIFEST}: {error}"


def _report(note: Path, error: str) -> None:
    """Let rank 0 know; where not even that can be written, this rank's own failure ends the run."""
    try:
        durable.write_text(note, json.dumps({"error": error}))
    except OSError:
        return
