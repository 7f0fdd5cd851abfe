"""What ranks list of a checkpoint, and manifests that somebody cut or edited, with the right checksum."""

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from puzzle.engine.checkpoint.manifest import (
    KINDS,
    Manifest,
    SavedFile,
    SavedModel,
    covering,
    entries,
    identity,
    owned,
)
from puzzle.errors import UserError
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.shards import Box, local_params, zero_rows
from puzzle.spec.model import ModelSpec

SHAPE = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
SPEC = ModelSpec.from_hf(SHAPE)
FILE = "rank-00000.safetensors"
MODEL = SavedModel(identity(SPEC), 3)
WHOLE = Manifest(
    {"step": 1},
    {"actor": MODEL},
    {FILE: SavedFile(10, 7)},
    tuple(entries("actor", SPEC, Placement.default(Layout.even(1, 1, 1, 1)))),
    {"puzzle": "1"},
)


def edited(change: Callable[[dict[str, Any]], object]) -> str:
    """The manifest with a change, and the checksum of what it then is."""
    body = json.loads(WHOLE.dumps())["manifest"]
    change(body)
    text = json.dumps(body)
    return f'{{"crc": {zlib.crc32(text.encode())}, "manifest":\n{text}\n}}\n'


def test_nobody_may_change_how_a_model_is_identified() -> None:
    """Checkpoints of older versions carry it."""
    assert identity(SPEC) == "e9e33d1d494b4bb4490bbab2841f7ae0"
    assert identity(replace(SPEC, num_layers=2)) != identity(SPEC)


def test_a_cut_or_changed_manifest_is_none() -> None:
    text = WHOLE.dumps()
    for end in range(0, len(text), 7):
        with pytest.raises(UserError):
            Manifest.loads(text[:end])
    crc = json.loads(text)["crc"]
    for wrong, words in (
        *((text.replace(str(crc), str(crc + by), 1), "its checksum is wrong") for by in (-1, 1)),
        (text + "\n", "cut or no manifest"),
        (text.replace('{"crc": ', '{"crc":  ', 1), None),
        (text.replace('{"crc": ', '{"CRC": ', 1), "cut or no manifest"),
        (text.replace('"step": 1', '"step": 2'), "its checksum is wrong"),
        (edited(lambda b: b.update(format=2)), "its format is 2, this version reads 1"),
        (edited(lambda b: b["files"].update({"rank-1.safetensors": {"bytes": 1, "crc": 1}})), "rank's file"),
        (edited(lambda b: b["files"][FILE].update(crc=1 << 32)), "crc must be"),
        (edited(lambda b: b["files"][FILE].update(crc=(1 << 32) - 1, bytes=0)), None),
        (edited(lambda b: b["files"].update({"rank-123456.safetensors": {"bytes": 1, "crc": 1}})), None),
        (edited(lambda b: b["boxes"][0].__setitem__(3, [[4, 4], [0, 8]])), None),
    ):
        if words is None:
            assert Manifest.loads(wrong).versions == WHOLE.versions
        else:
            with pytest.raises(UserError, match=words):
                Manifest.loads(wrong)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (4, 1, 3), (1, 4, 2), (4, 2, 1)])
@pytest.mark.parametrize("tied", [False, True])
def test_all_ranks_together_write_every_number_once(sizes: tuple[int, int, int], tied: bool) -> None:
    """Each under its own key, in the file of the rank whose row of ZeRO it is; any box is covered by them."""
    shape = {**SHAPE, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    spec = ModelSpec.from_hf({**shape, "hidden_size": 16, "tie_word_embeddings": tied})
    layout = Layout.even(*sizes, 4)
    placement = Placement(layout, tuple(reversed(range(layout.world))))
    found = list(entries("actor", spec, placement))
    count = {(t.name, kind): np.zeros(t.shape, int) for t in spec.tensors() for kind in KINDS}
    for entry in found:
        count[entry.tensor, entry.kind][entry.box.slices] += 1
        place = ",".join(f"{a}:{b}" for a, b in entry.box.intervals)
        assert entry.key == f"actor/{entry.tensor}/{entry.kind}[{place}]"
    assert all((times == 1).all() for times in count.values())
    assert len({(entry.file, entry.key) for entry in found}) == len(found)
    for coord in layout.coords():
        mine = {
            (e.tensor, e.box) for e in found if e.file == f"rank-{placement.rank_of(coord):05d}.safetensors"
        }
        params = local_params(spec, layout, coord)
        own = owned(spec, layout, coord)
        assert mine == {(o.piece.tensor, o.piece.box) for o in own}
        for o in own:
            low, high = zero_rows(params[o.index], layout.dp, coord.d)
            assert low <= o.piece.start < o.piece.stop <= high
            assert o.transposed == params[o.index].transposed
    down = [e for e in found if (e.tensor, e.kind) == ("model.layers.1.mlp.down_proj.weight", "exp_avg")]
    for box in (Box(((0, 16), (0, 12))), Box(((3, 9), (1, 2))), Box(((15, 16), (11, 12)))):
        parts = covering(down, box)
        written = np.zeros((16, 12), int)
        for entry, both in parts:
            assert entry.box.intersect(both) == both
            written[both.slices] += 1
        assert written[box.slices].all()
        assert written.sum() == box.size
    with pytest.raises(UserError, match=r"does not hold \[0:16, 0:13\] exactly once"):
        covering(down, Box(((0, 16), (0, 13))))
    with pytest.raises(UserError, match="exactly once"):
        covering(down[1:], Box(((0, 16), (0, 12))))


def test_what_was_written_comes_back() -> None:
    found = Manifest.loads(WHOLE.dumps())
    assert found == WHOLE
    found.check_model("actor", SPEC)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "format": lambda b: b.update(format="1"),
    "no format": lambda b: b.pop("format"),
    "state": lambda b: b.update(state=[1]),
    "versions": lambda b: b.update(versions=None),
    "models": lambda b: b.update(models=[]),
    "steps text": lambda b: b["models"]["actor"].update(steps="3"),
    "steps negative": lambda b: b["models"]["actor"].update(steps=-3),
    "steps huge": lambda b: b["models"]["actor"].update(steps=10**30),
    "steps true": lambda b: b["models"]["actor"].update(steps=True),
    "identity": lambda b: b["models"]["actor"].pop("identity"),
    "model of nothing": lambda b: b["models"].update(actor=None),
    "files": lambda b: b.update(files={FILE: 3}),
    "file elsewhere": lambda b: b["files"].update({"../../rank-00000.safetensors": {"bytes": 1, "crc": 1}}),
    "file a device": lambda b: b["files"].update({"/dev/zero": {"bytes": 1, "crc": 1}}),
    "bytes": lambda b: b["files"][FILE].update(bytes=-1),
    "crc": lambda b: b["files"][FILE].update(crc="x"),
    "boxes": lambda b: b.update(boxes={"a": 1}),
    "box short": lambda b: b["boxes"][0].pop(),
    "box text": lambda b: b["boxes"].__setitem__(0, "box"),
    "box of an unknown file": lambda b: b["boxes"][0].__setitem__(4, "rank-00009.safetensors"),
    "box of a file that is none": lambda b: b["boxes"][0].__setitem__(4, ["x"]),
    "box of no key": lambda b: b["boxes"][0].__setitem__(5, None),
    "box of no tensor": lambda b: b["boxes"][0].__setitem__(1, 3),
    "interval": lambda b: b["boxes"][0].__setitem__(3, [[0]]),
    "interval of texts": lambda b: b["boxes"][0].__setitem__(3, [["0", "4"], [0, 8]]),
    "interval backwards": lambda b: b["boxes"][0].__setitem__(3, [[4, 0], [0, 8]]),
    "interval negative": lambda b: b["boxes"][0].__setitem__(3, [[-4, 4], [0, 8]]),
    "deep": lambda b: b.update(state={"a": json.loads("[" * 900 + "]" * 900)}),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_edited_values_are_refused(kind: str) -> None:
    text = edited(CHANGES[kind])
    if kind == "deep":
        assert Manifest.loads(text).state["a"]
        text = text.replace("[" * 900, "[" * 100_000)
    with pytest.raises(UserError) as caught:
        Manifest.loads(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b["boxes"][0].__setitem__(3, [[0, 12], [0, 8]]), "outside"),
        (lambda b: b["boxes"][0].__setitem__(3, [[0, 88]]), "outside"),
        (lambda b: b["boxes"][0].__setitem__(1, "model.other.weight"), "outside"),
        (lambda b: b["boxes"][0].__setitem__(2, "momentum"), "exactly once"),
        (lambda b: b["boxes"].pop(), "exactly once"),
        (lambda b: b["boxes"].append(b["boxes"][0]), "exactly once"),
        (lambda b: b["models"].clear(), "no such model"),
        (lambda b: b["models"]["actor"].update(identity="x"), "another shape"),
    ],
)
def test_boxes_that_do_not_make_the_model_are_refused(change, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Manifest.loads(edited(change)).check_model("actor", SPEC)
