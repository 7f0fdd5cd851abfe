"""What a checkpoint holds: boxes of weights and moments, who writes each, and the file that lists them.

A checkpoint knows nothing of layouts but the boxes that its writers happened to own; a reader under any other
layout takes the intersections with its own boxes.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from puzzle.errors import UserError
from puzzle.files.jsonio import Fields, parse, shown
from puzzle.plan.layout import Coord, Layout, Placement
from puzzle.plan.shards import Box, Piece, local_params, sharers, zero_rows
from puzzle.spec.model import ModelSpec

FORMAT = 1
WEIGHT, EXP_AVG, EXP_AVG_SQ = "weight", "exp_avg", "exp_avg_sq"
_RANK_FILE = re.compile(r"rank-\d{5,}\.safetensors")
KINDS = (WEIGHT, EXP_AVG, EXP_AVG_SQ)


@dataclass(frozen=True)
class Owned:
    """A piece that a rank writes: `index` of its storage in `local_params`, inside the rank's ZeRO rows."""

    index: int
    piece: Piece
    transposed: bool


@dataclass(frozen=True)
class Entry:
    """A box of a tensor's weights or moments, under `key` of a safetensors `file`."""

    model: str
    tensor: str
    kind: str
    box: Box
    file: str
    key: str


@dataclass(frozen=True)
class SavedModel:
    """Identity of a model's shape, and how many optimizer steps it has made."""

    identity: str
    steps: int


@dataclass(frozen=True)
class SavedFile:
    """Size and CRC-32 of a file's bytes."""

    bytes: int
    crc: int


@dataclass(frozen=True)
class Manifest:
    """All of a checkpoint but its numbers. `state` is the caller's, plain JSON values."""

    state: Mapping[str, Any]
    models: Mapping[str, SavedModel]
    files: Mapping[str, SavedFile]
    entries: tuple[Entry, ...]
    versions: Mapping[str, str]

    def dumps(self) -> str:
        """As text; its first line is the checksum of the rest."""
        entries = [[e.model, e.tensor, e.kind, e.box.intervals, e.file, e.key] for e in self.entries]
        body = json.dumps(
            {
                "format": FORMAT,
                "versions": dict(self.versions),
                "state": dict(self.state),
                "models": {name: asdict(model) for name, model in self.models.items()},
                "files": {name: asdict(file) for name, file in self.files.items()},
                "boxes": entries,
            },
            allow_nan=False,
        )
        return f'{{"crc": {zlib.crc32(body.encode())}, "manifest":\n{body}\n}}\n'

    @classmethod
    def loads(cls, text: str) -> Manifest:
        """Read what `dumps` wrote; UserError, saying why, for anything else.

        The checksum is no proof: every value is taken as one that a person may have edited.
        """
        lines = text.split("\n")
        if len(lines) != 4 or not lines[0].startswith('{"crc": '):
            raise UserError("it is cut or no manifest")
        found = Fields(parse(text, "it"), "it")
        if zlib.crc32(lines[1].encode()) != found.integer("crc"):
            raise UserError("its checksum is wrong")
        body = found.section("manifest")
        if body.integer("format") != FORMAT:
            raise UserError(f"its format is {body.integer('format')}, this version reads {FORMAT}")
        files = {
            name: _saved_file(name, body.section("files").section(name)) for name in body.section("files")
        }
        models = {name: _saved_model(body.section("models").section(name)) for name in body.section("models")}
        boxes = body.values.get("boxes")
        if not isinstance(boxes, list):
            body.refuse("boxes", "a list")
        entries = tuple(_entry(number, box, files) for number, box in enumerate(boxes))
        return cls(body.section("state").values, models, files, entries, body.section("versions").values)

    def check_model(self, name: str, spec: ModelSpec) -> None:
        """UserError unless `name` was saved with the shape `spec`, completely."""
        if name not in self.models:
            raise UserError(f"{name}: the checkpoint holds no such model; it has {', '.join(self.models)}")
        if self.models[name].identity != identity(spec):
            adapters = spec.lora or any(e.model == name and ".lora_" in e.tensor for e in self.entries)
            kind = ", or with other adapters (lora.rank, alpha, targets)" if adapters else ""
            raise UserError(
                f"{name}: the checkpoint is of a model of another shape{kind}; resume with the model it had"
            )
        sizes: dict[tuple[str, str], int] = {}
        shapes = {tensor.name: tensor.shape for tensor in spec.tensors()}
        for entry in self.entries:
            if entry.model == name:
                shape = shapes.get(entry.tensor, ())
                if len(shape) != len(entry.box.intervals) or any(
                    stop > extent for (_, stop), extent in zip(entry.box.intervals, shape, strict=True)
                ):
                    raise UserError(f"{name}: the checkpoint has a box outside of {shown(entry.tensor)}")
                key = (entry.tensor, entry.kind)
                sizes[key] = sizes.get(key, 0) + entry.box.size
        wanted = {(t.name, kind): t.size for t in spec.tensors() if t.trained for kind in KINDS}
        if sizes != wanted:
            wrong = next(key for key in (*wanted, *sizes) if sizes.get(key) != wanted.get(key))
            raise UserError(f"{name}: the checkpoint does not hold {wrong[1]} of {wrong[0]} exactly once")


def _saved_file(name: str, fields: Fields) -> SavedFile:
    """A file beside the manifest: a path that leads elsewhere could be a device, which never ends."""
    if not _RANK_FILE.fullmatch(name):
        raise UserError(f"{fields.place}: is no name of a rank's file")
    return SavedFile(fields.integer("bytes"), fields.integer("crc", most=(1 << 32) - 1))


def _saved_model(fields: Fields) -> SavedModel:
    return SavedModel(fields.text("identity"), fields.integer("steps"))


def _entry(number: int, box: Any, files: Mapping[str, SavedFile]) -> Entry:
    place = f"its box {number}"
    if not isinstance(box, list) or len(box) != 6 or not isinstance(box[3], list):
        raise UserError(f"{place} must list model, tensor, kind, intervals, file and key, found {shown(box)}")
    fields = Fields(dict(zip(("model", "tensor", "kind", "box", "file", "key"), box, strict=True)), place)
    intervals = []
    for interval in box[3]:
        if not isinstance(interval, list) or len(interval) != 2:
            fields.refuse("box", "a list of [start, stop]")
        pair = Fields({"start": interval[0], "stop": interval[1]}, place)
        start = pair.integer("start")
        intervals.append((start, pair.integer("stop", least=start)))
    file = fields.text("file")
    if file not in files:
        raise UserError(f"{place}: its file {shown(file)} is none of the checkpoint's")
    texts = (fields.text(name) for name in ("model", "tensor", "kind"))
    return Entry(*texts, Box(tuple(intervals)), file, fields.text("key"))


def identity(spec: ModelSpec) -> str:
    """A digest of everything that determines a model's tensors and arithmetic."""
    values = asdict(spec)
    if spec.lora is None:
        del values["lora"]  # checkpoints from before there were adapters say nothing of them
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def owned(spec: ModelSpec, layout: Layout, coord: Coord) -> list[Owned]:
    """What one coordinate writes: trained pieces of its ZeRO rows of which it is the owner among the
    sharers."""
    owners = {t.name: sharers(t, layout, coord)[0] == coord for t in spec.tensors()}
    return [
        Owned(index, piece, param.transposed)
        for index, param in enumerate(local_params(spec, layout, coord))
        for piece in param.clip(*zero_rows(param, layout.dp, coord.d))
        if param.trained and owners[piece.tensor]
    ]


def rank_file(rank: int) -> str:
    """The file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def box_key(model: str, tensor: str, kind: str, box: Box) -> str:
    """Name of a box inside a file."""
    place = ",".join(f"{start}:{stop}" for start, stop in box.intervals)
    return f"{model}/{tensor}/{kind}[{place}]"


def entries(model: str, spec: ModelSpec, placement: Placement) -> Iterator[Entry]:
    """Every box of a model's checkpoint under a placement, by rank."""
    for coord in placement.layout.coords():
        file = rank_file(placement.rank_of(coord))
        for own in owned(spec, placement.layout, coord):
            tensor, box = own.piece.tensor, own.piece.box
            for kind in KINDS:
                yield Entry(model, tensor, kind, box, file, box_key(model, tensor, kind, box))


def covering(held: Iterable[Entry], box: Box) -> list[tuple[Entry, Box]]:
    """The entries of one tensor and kind that `box` needs, each with what it gives.

    UserError unless they cover it exactly.
    """
    parts = [(entry, both) for entry in held if (both := entry.box.intersect(box)) is not None]
    if sum(both.size for _, both in parts) != box.size:
        place = ", ".join(f"{start}:{stop}" for start, stop in box.intervals)
        raise UserError(f"the checkpoint does not hold [{place}] exactly once")
    return parts
