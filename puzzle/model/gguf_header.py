"""A GGUF file's header, walked within the bounds of the file before anything is made of it.

The reader of the `gguf` package believes what a header says: an array of 2**60 elements or 10**9 tensors keep
it busy for years, a type that it does not know ends it in a KeyError. Layout (versions 2 and 3,
little-endian): magic, uint32 version, uint64 tensors, uint64 fields; per field key, uint32 type and value;
per tensor name, uint32 dimensions, uint64 each, uint32 type, uint64 offset. A text is a uint64 length and
bytes.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import BinaryIO, NoReturn

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from puzzle.errors import UserError, describe

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by type: integers of 8, 16 and 32 bits, float32, bool, 64 bits, float64."""
MOST_FIELDS, MOST_TENSORS, MOST_ITEMS, MOST_NAME, MOST_TEXT = 1 << 16, 1 << 17, 1 << 24, 1 << 12, 1 << 28


class Header:
    """Walks the header of an open file. UserError naming the file and the place for what cannot be."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self._size = os.fstat(file.fileno()).st_size

    def check(self) -> None:
        """UserError unless every length, type and extent lies inside the file."""
        if self._bytes(4, "its first bytes") != MAGIC:
            raise UserError(f"{self.path}: not a readable GGUF file (it does not begin with GGUF)")
        version = self._number(4, "version")
        if version not in (2, 3):
            raise UserError(f"{self.path}: not a readable GGUF file (version {version}; 2 and 3 are read)")
        tensors = self._count("number of tensors", MOST_TENSORS)
        for _ in range(self._count("number of fields", MOST_FIELDS)):
            key = self._text("a field's key", MOST_NAME)
            self._value(f"field {key}", self._number(4, f"type of field {key}"))
        extents = [self._tensor() for _ in range(tensors)]
        begin = self._file.tell()
        for name, end in extents:
            if begin + end > self._size:
                raise UserError(
                    f"{self.path}: not a readable GGUF file ({name} goes beyond its end: is it cut?)"
                )

    def _tensor(self) -> tuple[str, int]:
        """Name and last byte, counted from the beginning of all tensors."""
        name = self._text("a tensor's name", MOST_NAME)
        dims = self._number(4, f"dimensions of tensor {name}")
        if dims > 4:
            self._refuse(f"tensor {name} of {dims} dimensions")
        shape = [self._number(8, f"shape of tensor {name}") for _ in range(dims)]
        kind, offset = self._number(4, f"type of tensor {name}"), self._number(8, f"offset of tensor {name}")
        if kind not in {item.value for item in GGMLQuantizationType}:
            self._refuse(f"tensor {name} of the unknown type {kind}")
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if not shape or 0 in shape or shape[0] % block:
            self._refuse(f"tensor {name} of the shape {shape}")
        return f"tensor {name}", offset + math.prod(shape) * width // block

    def _value(self, what: str, kind: int) -> None:
        if kind == STRING:
            self._text(what, MOST_TEXT)
        elif kind == ARRAY:
            item = self._number(4, f"type of {what}")
            count = self._count(f"length of {what}", MOST_ITEMS)
            if item == STRING:
                for _ in range(count):
                    self._text(what, MOST_TEXT)
            elif item in WIDTHS:
                self._skip(count * WIDTHS[item], what)
            else:
                self._refuse(f"{what}, an array of the type {item}")
        elif kind in WIDTHS:
            self._skip(WIDTHS[kind], what)
        else:
            self._refuse(f"{what} of the unknown type {kind}")

    def _count(self, what: str, most: int) -> int:
        count = self._number(8, what)
        if count > most:
            self._refuse(f"{what} is {count}; at most {most} is read")
        return count

    def _text(self, what: str, most: int) -> str:
        data = self._bytes(self._count(f"length of {what}", most), what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            self._refuse(f"{what} is not UTF-8")

    def _number(self, width: int, what: str) -> int:
        return int.from_bytes(self._bytes(width, what), "little")

    def _bytes(self, count: int, what: str) -> bytes:
        if self._file.tell() + count > self._size:
            self._refuse(f"it ends in {what}")
        return self._file.read(count)

    def _skip(self, count: int, what: str) -> None:
        if self._file.tell() + count > self._size:
            self._refuse(f"it ends in {what}")
        self._file.seek(count, os.SEEK_CUR)

    def _refuse(self, why: str) -> NoReturn:
        raise UserError(f"{self.path}: not a readable GGUF file (at byte {self._file.tell()}: {why})")


def check_header(path: Path) -> None:
    """UserError unless `path` is a regular file with a GGUF header whose extents lie inside it."""
    if not path.is_file():
        raise UserError(f"{path}: {'is no regular file' if path.exists() else 'no such file'}")
    try:
        with path.open("rb") as file:
            Header(path, file).check()
    except OSError as error:
        raise UserError(describe(error)) from None
