"""Boxes of tensors in safetensors files: written one by one with a checksum, read by what intersects them."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from puzzle.engine.checkpoint import manifest
from puzzle.engine.checkpoint.manifest import WEIGHT, Entry, SavedFile
from puzzle.errors import UserError
from puzzle.plan.shards import Box


class Reader:
    """Reads boxes of tensors out of the files of a checkpoint."""

    def __init__(self, folder: Path, entries: Sequence[Entry]) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._held: dict[tuple[str, str, str], list[Entry]] = {}
        for entry in entries:
            self._held.setdefault((entry.model, entry.tensor, entry.kind), []).append(entry)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.__exit__(None, None, None)

    def read(self, model: str, tensor: str, kind: str, box: Box) -> Tensor:
        """float32 values of `box`. UserError naming the tensor if the files do not hold it."""
        values = torch.full(box.shape, torch.nan)
        try:
            for entry, part in manifest.covering(self._held[model, tensor, kind], box):
                found = self._open(entry.file).get_slice(entry.key)
                if (tuple(found.get_shape()), found.get_dtype()) != (entry.box.shape, "F32"):
                    raise UserError(f"{entry.file} holds another shape or dtype of it")
                values[_relative(part, box)] = found[_relative(part, entry.box)]
            # Nor is anything left open where boxes overlap and their sizes happen to add up.
            if not values.isfinite().all():
                raise UserError("it has numbers that are missing or not finite")
        except (SafetensorError, OSError, UserError) as error:
            raise UserError(f"{self.folder}: {model}, {kind} of {tensor}: {error}") from None
        return values

    def _open(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(self.folder / name, framework="pt").__enter__()
        return self._files[name]


@dataclass(frozen=True)
class Logical:
    """A tensor's weights in a checkpoint, read box by box."""

    reader: Reader
    model: str
    tensor: str

    def __getitem__(self, slices: tuple[slice, ...], /) -> Tensor:
        """The box cut out by one slice per dimension."""
        box = Box(tuple((s.start, s.stop) for s in slices))
        return self.reader.read(self.model, self.tensor, WEIGHT, box)


def _relative(part: Box, whole: Box) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(part.intervals, whole.intervals, strict=True))


def write_boxes(
    path: Path, boxes: Sequence[tuple[str, Tensor]], tick: Callable[[], None] = lambda: None
) -> SavedFile:
    """A safetensors file of float32 tensors on the host, one in memory at a time; its size and checksum.

    `tick` is called after every tensor.
    """
    header, end = {}, 0
    for key, values in boxes:
        start, end = end, end + values.nbytes
        header[key] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    crc = zlib.crc32(head)
    with path.open("wb") as file:
        file.write(head)
        for _, values in boxes:
            data = memoryview(values.contiguous().numpy()).cast("B")
            file.write(data)
            crc = zlib.crc32(data, crc)
            tick()
        file.flush()
        os.fsync(file.fileno())
    return SavedFile(len(head) + end, crc)


def checksum(path: Path, tick: Callable[[], None] = lambda: None) -> tuple[int, int]:
    """Size and CRC-32 of a file. `tick` is called after every piece."""
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
            tick()
    return size, crc
