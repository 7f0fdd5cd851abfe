"""Headers of GGUF files, byte by byte: every part of one that was cut, every type, every limit."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quantized
from gguf import GGUFValueType as Type

from puzzle.errors import UserError
from puzzle.model.gguf_header import check_header

SCALARS = {
    Type.UINT8: "B", Type.INT8: "b", Type.UINT16: "H", Type.INT16: "h", Type.UINT32: "I", Type.INT32: "i",
    Type.FLOAT32: "f", Type.BOOL: "?", Type.UINT64: "Q", Type.INT64: "q", Type.FLOAT64: "d",
}  # fmt: skip


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def field(kind: int, value: bytes, key: bytes = b"key") -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, data: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + data


def tensor(shape: tuple[int, ...], kind: int, offset: int, name: bytes = b"a") -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def header(
    fields: bytes = b"", tensors: bytes = b"", counts: tuple[int, int] = (0, 1), version: int = 3
) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + fields + tensors


def said(tmp_path: Path, data: bytes) -> str | None:
    """What is said of a file with these bytes; None if nothing."""
    path = tmp_path / "file.gguf"
    path.write_bytes(data)
    try:
        check_header(path)
    except UserError as error:
        found = str(error)
    else:
        return None
    assert found.startswith(f"{path}: not a readable GGUF file (")
    return found


@pytest.mark.parametrize("kind", SCALARS)
def test_a_value_is_as_wide_as_its_type(kind: int, tmp_path: Path) -> None:
    one = struct.pack(f"<{SCALARS[Type(kind)]}", 1)
    for value in (field(kind, one), field(Type.ARRAY, array(kind, 3, 3 * one))):
        assert said(tmp_path, header(value)) is None
        # A second field begins where the first ends, not a byte earlier or later.
        both = header(value + field(Type.STRING, text(b"next")), counts=(0, 2))
        assert said(tmp_path, both) is None
        assert "ends in" in (said(tmp_path, header(value)[:-1]) or "")


def test_what_the_library_writes_is_right_and_no_part_of_it_is(tmp_path: Path) -> None:
    """Cut anywhere in its header or its tensors, a file is refused."""
    path = tmp_path / "whole.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind, letter in SCALARS.items():
        one = struct.unpack(f"<{letter}", struct.pack(f"<{letter}", 1))[0]
        writer.add_key_value(f"scalar.{kind.name}", one, kind)
    writer.add_array("texts", ["a", "", "two words"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("flags", [True, False])
    writer.add_tensor("plain", np.ones((3, 4, 5), np.float32))
    quantised = gguf.quants.quantize(np.ones((2, 64), np.float32), Quantized.Q8_0)
    writer.add_tensor("quantised", quantised, raw_dtype=Quantized.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = path.read_bytes()
    assert said(tmp_path, whole) is None
    begins = gguf.GGUFReader(path).data_offset  # rounded up to 32 bytes, which the header does not say
    for length in range(begins):
        assert said(tmp_path, whole[:length]) is not None, length


def test_tensors_end_in_the_file(tmp_path: Path) -> None:
    """Of a type that packs 32 values into 34 bytes, and of float32."""
    for shape, kind, size in (
        ((64,), Quantized.Q8_0, 68),
        ((32, 3), Quantized.Q8_0, 102),
        ((3, 2), Quantized.F32, 24),
        ((1, 2, 3, 4), Quantized.F32, 96),
    ):
        for offset in (0, 32):
            data = header(tensors=tensor(shape, kind, offset), counts=(1, 0))
            assert said(tmp_path, data + bytes(size + offset)) is None
            assert "tensor a goes beyond its end" in (said(tmp_path, data + bytes(size + offset - 1)) or "")
    two = tensor((4,), Quantized.F32, 0, b"first") + tensor((4,), Quantized.F32, 16, b"second")
    assert said(tmp_path, header(tensors=two, counts=(2, 0)) + bytes(32)) is None
    assert "second goes beyond" in (said(tmp_path, header(tensors=two, counts=(2, 0)) + bytes(31)) or "")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GGUG" + header()[4:], "it does not begin with GGUF"),
        (header(field(0, b"\0"), version=1), "version 1; 2 and 3 are read"),
        (header(field(0, b"\0"), version=4), "version 4; 2 and 3 are read"),
        (header(field(0, b"\0"), version=2), None),
        (header(counts=(0, 0)), None),
        (header(counts=(0, 65537)), "number of fields is 65537; at most 65536 is read"),
        (header(counts=(131073, 0)), "number of tensors is 131073; at most 131072 is read"),
        (header(field(9, array(0, 16777217, b""))), "length of field key is 16777217; at most 16777216"),
        (header(field(9, array(0, 16777216, b""))), "it ends in field key"),
        (header(field(0, b"\0", b"k" * 4097)), "length of a field's key is 4097; at most 4096"),
        (header(field(0, b"\0", b"k" * 4096)), None),
        (header(field(8, struct.pack("<Q", 2**28 + 1))), "is 268435457; at most 268435456 is read"),
        (header(field(8, struct.pack("<Q", 2**28))), "it ends in field key"),
        (header(field(8, text(b"\xff"))), "field key is not UTF-8"),
        (header(field(13, b"\0" * 8)), "field key of the unknown type 13"),
        (header(field(9, array(9, 1, array(0, 1, b"\0")))), "an array of the type 9"),
        (header(field(9, array(8, 2, text(b"a") + text(b"b")))), None),
        (header(field(9, array(8, 2, text(b"a")))), "it ends in length of field key"),
        (header(tensors=tensor((1,) * 5, 0, 0), counts=(1, 0)) + b"\0" * 4, "tensor a of 5 dimensions"),
        (header(tensors=tensor((), 0, 0), counts=(1, 0)), "tensor a of the shape"),
        (header(tensors=tensor((4, 0), 0, 0), counts=(1, 0)), "tensor a of the shape"),
        (header(tensors=tensor((33,), 8, 0), counts=(1, 0)) + b"\0" * 99, "tensor a of the shape"),
        (header(tensors=tensor((32,), 999, 0), counts=(1, 0)), "of the unknown type 999"),
        (header(tensors=tensor((1,), 0, 0, b"n" * 4097), counts=(1, 0)) + b"\0" * 4, "at most 4096"),
    ],
)
def test_limits_and_refusals(data: bytes, words: str | None, tmp_path: Path) -> None:
    found = said(tmp_path, data)
    assert (found is None) == (words is None), found
    assert words is None or words in str(found)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        check_header(tmp_path / "absent")
    with pytest.raises(UserError, match="is no regular file"):
        check_header(tmp_path)
