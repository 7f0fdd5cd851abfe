"""Manifests that somebody edited, with the right checksum."""

import json
import zlib
from collections.abc import Callable
from typing import Any

import pytest

from puzzle.engine.checkpoint.manifest import Manifest, SavedFile, SavedModel, entries, identity
from puzzle.errors import UserError
from puzzle.plan.layout import Layout, Placement
from puzzle.spec.model import ModelSpec

SPEC = ModelSpec.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
)
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
