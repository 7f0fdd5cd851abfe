"""Checkpoints: loaded under other layouts, damaged in every file, killed while they are written."""

from __future__ import annotations

import json
import random
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from puzzle.engine.checkpoint.boxfiles import checksum
from puzzle.engine.checkpoint.checkpoint import Checkpoints
from puzzle.errors import UserError
from puzzle.plan.layout import Layout
from tests.engine import saving
from tests.helpers import RankError, run_ranks
from tests.reference.tiny import save_lm, save_value

SOURCE = Layout(2, 2, 1, (3, 1))
TARGETS = [
    Layout.even(1, 1, 1, 4),
    Layout.even(1, 1, 3, 4),
    Layout.even(4, 1, 1, 4),
    Layout(1, 3, 1, (1, 1, 2)),
    Layout.even(2, 1, 2, 4),
]
Wholes = dict[tuple[str, str, str], Tensor]


def models(folder: Path) -> None:
    save_lm(folder / "lm", tie_word_embeddings=True)
    save_value(folder / "value")


def wholes(ranks: list[saving.Held], shapes: dict[tuple[str, str], tuple[int, ...]]) -> Wholes:
    """Logical tensors put together from what ranks hold; copies of a box must agree to the bit."""
    found: Wholes = {}
    for held in ranks:
        for model, tensor, kind, intervals, values in held:
            key = (model, tensor, kind)
            whole = found.setdefault(key, torch.full(shapes[model, tensor], torch.nan))
            part = whole[tuple(slice(a, b) for a, b in intervals)]
            known = ~part.isnan()
            assert torch.equal(part[known], values.float()[known]), key
            part.copy_(values)
    assert not any(bool(whole.isnan().any()) for whole in found.values())
    return found


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("checkpoint")
    models(folder)
    ranks = run_ranks(saving.save, 4, str(folder), SOURCE, request.param, 2, [1, 4, 10])
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    for held, _ in ranks:
        for model, tensor, _, intervals, _ in held:
            known = shapes.get((model, tensor), (0,) * len(intervals))
            shapes[model, tensor] = tuple(max(n, b) for n, (_, b) in zip(known, intervals, strict=True))
    return folder, request.param, shapes, wholes([held for held, _ in ranks], shapes), ranks[0][1]


def test_files_hold_what_was_there_when_the_save_began(case) -> None:
    folder, _, _, before, _ = case
    assert sorted(p.name for p in (folder / "saved").iterdir()) == ["state-10", "state-4"]
    state = folder / "saved" / "state-10"
    manifest = json.loads((state / "manifest.json").read_text())["manifest"]
    assert manifest["state"] == {"number": 10, "score": 0.1}
    assert manifest["models"]["actor"]["steps"] == 6
    assert set(manifest["files"]) | {"manifest.json"} == {p.name for p in state.iterdir()}
    seen = {
        key: torch.zeros(whole.shape, dtype=torch.int64)
        for key, whole in before.items()
        if key[2] != "compute"
    }
    for model, tensor, kind, intervals, file, key in manifest["boxes"]:
        place = tuple(slice(a, b) for a, b in intervals)
        with safe_open(state / file, framework="pt") as opened:
            values = opened.get_tensor(key)
        assert values.dtype == torch.float32
        assert torch.equal(values, before[model, tensor, kind][place])
        seen[model, tensor, kind][place] += 1
    assert all(bool((count == 1).all()) for count in seen.values())


@pytest.mark.parametrize("layout", TARGETS, ids=lambda layout: f"{layout} {layout.stage_layers}")
def test_any_layout_loads_the_same_bits_and_goes_on(case, layout: Layout) -> None:
    folder, dtype, shapes, before, losses = case
    if dtype == "bfloat16" and layout is not TARGETS[-1]:
        pytest.skip("one layout shows that masters and their bf16 copies are restored")
    ranks = run_ranks(saving.load, layout.world, str(folder), layout, dtype)
    after = wholes([held for held, *_ in ranks], shapes)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    for _, found, state, notes in ranks:
        assert found == pytest.approx(losses, rel=1e-5 if dtype == "float32" else 2e-2)
        assert state == {"number": 10, "score": 0.1}
        assert notes == ()


@pytest.fixture
def saved(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints 1 and 2 of two ranks."""
    models(tmp_path)
    run_ranks(saving.save, 2, str(tmp_path), Layout.even(2, 1, 1, 4), "float32", 1, [1, 2])
    return tmp_path


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def test_damage_is_named_and_the_former_checkpoint_used(saved: Path) -> None:
    last, alone = saved / "saved" / "state-2", Layout.even(1, 1, 1, 4)
    shutil.copytree(last, saved / "whole")

    def check(*words: str) -> None:
        _, _, state, notes = saving.load(0, str(saved), alone, "float32")
        assert state["number"] == 1
        assert len(notes) == 1
        assert all(word in notes[0] for word in ("state-2", *words)), notes
        shutil.rmtree(last)
        shutil.copytree(saved / "whole", last)

    for name in ("rank-00000.safetensors", "rank-00001.safetensors"):
        for place in (0.0, 0.01, 0.7, 1.0):
            flip(last / name, place)
            check(name, "checksum")
        (last / name).write_bytes((last / name).read_bytes()[:-100])
        check(name, "bytes instead of")
        (last / name).unlink()
        check(name, "No such file")
    for place in (0.0, 0.001, 0.5, 1.0):
        flip(last / "manifest.json", place)
        check("manifest.json")
    (last / "manifest.json").write_text((last / "manifest.json").read_text()[:-20])
    check("manifest.json")
    (last / "manifest.json").unlink()
    check("manifest.json")
    flip(last / "manifest.json", 0.5)
    flip(saved / "saved" / "state-1" / "manifest.json", 0.5)
    line = saving.refused(0, str(saved), alone)
    assert "state-2 is damaged" in line
    assert "no earlier checkpoint is whole" in line
    assert "\n" not in line


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_newest_are_kept_by_number_and_nothing_else_is_touched(tmp_path: Path, keep: int) -> None:
    """9 comes before 10; what another wrote beside them stays."""
    save_lm(tmp_path / "lm")
    save_value(tmp_path / "value")
    models = saving.build(0, str(tmp_path), Layout.even(1, 1, 1, 4), "float32", 1)[1:]
    folder = tmp_path / "saved"
    (folder / "notes").mkdir(parents=True)
    checkpoints = Checkpoints(folder, models, keep=keep, asynchronous=False)
    numbers = [2, 8, 9, 10, 11]
    for done, number in enumerate(numbers, 1):
        checkpoints.save(number, {"number": number})
        kept = numbers[max(0, done - keep) : done]
        assert {path.name for path in folder.iterdir()} == {"notes", *(f"state-{n}" for n in kept)}
    (*_, last) = checkpoints.finished()
    assert (last.number, last.folder) == (11, folder / "state-11")
    assert last.bytes == sum(f.stat().st_size for f in last.folder.glob("*.safetensors"))
    assert checkpoints.finished() == []
    restored = checkpoints.restore()
    assert restored is not None
    assert (restored.number, dict(restored.state)) == (11, {"number": 11})


def test_another_model_is_refused_and_not_an_older_checkpoint_tried(saved: Path) -> None:
    save_lm(saved / "lm", tie_word_embeddings=True, rms_norm_eps=1e-4)
    line = saving.refused(0, str(saved), Layout.even(1, 1, 1, 4))
    assert line.startswith("actor: the checkpoint is of a model of another shape")


def test_a_folder_that_cannot_be_written_ends_the_run_with_one_line(tmp_path: Path) -> None:
    models(tmp_path)
    (tmp_path / "saved").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"^checkpoint 1 failed: .*saved.*; free space or permit writing$"):
        saving.save(0, str(tmp_path), Layout.even(1, 1, 1, 4), "float32", 1, [1])


def test_a_half_written_checkpoint_is_nothing(saved: Path) -> None:
    """All stages of writing: a file cut short, all files but no manifest, a manifest under its first name."""
    last, alone = saved / "saved" / "state-2", Layout.even(1, 1, 1, 4)
    partial = saved / "saved" / "state-3.partial"
    for kept in (("rank-00000.safetensors",), tuple(p.name for p in last.glob("rank-*")), ("manifest.json",)):
        shutil.copytree(last, partial)
        for path in partial.iterdir():
            if path.name not in kept:
                path.unlink()
        (partial / kept[0]).write_bytes((last / kept[0]).read_bytes()[:1000])
        _, _, state, notes = saving.load(0, str(saved), alone, "float32")
        assert (state["number"], notes) == (2, ())
        assert not partial.exists()


@pytest.mark.parametrize("room", [0, 1000, 100_000])
def test_a_full_disk_ends_the_run_with_one_line_and_harms_no_checkpoint(saved: Path, room: int) -> None:
    """`room` bytes per file are left to one of two ranks."""
    with pytest.raises(
        RankError, match=r"checkpoint 3 failed: .*File too large; free space or permit writing\n"
    ):
        run_ranks(saving.without_room, 2, str(saved), Layout.even(2, 1, 1, 4), 3, room)
    _, _, state, notes = saving.load(0, str(saved), Layout.even(1, 1, 1, 4), "float32")
    assert (state["number"], notes) == (2, ())


@pytest.mark.parametrize("tries", [3, pytest.param(20, marks=pytest.mark.long)])
def test_a_kill_while_saving_leaves_the_last_whole_checkpoint(tmp_path: Path, tries: int) -> None:
    models(tmp_path)
    dice, last, layout = random.Random(tries), 0, Layout.even(1, 1, 2, 4)
    for _ in range(tries):
        with pytest.raises(RankError):
            run_ranks(saving.killed, 2, str(tmp_path), layout, last + 1, dice.uniform(0.0, 0.5))
        held, _, state, notes = saving.load(0, str(tmp_path), Layout.even(1, 1, 1, 4), "float32")
        assert notes == ()
        assert state["number"] > last
        last = state["number"]
        weights = [values for _, _, kind, _, values in held if kind == "weight"]
        assert all(bool((values == last).all()) for values in weights)


def test_numbers_that_somebody_edited_are_refused_though_the_checksums_hold(saved: Path) -> None:
    """A file of other shapes, dtypes or numbers, boxes that overlap: the manifest agrees with all of them."""
    last, alone = saved / "saved" / "state-2", Layout.even(1, 1, 1, 4)
    shutil.rmtree(saved / "saved" / "state-1")
    shutil.copytree(last, saved / "whole")
    name = "rank-00000.safetensors"

    def change(tensors: dict[str, Tensor], key: str, kind: str) -> None:
        if kind == "shape":
            tensors[key] = tensors[key][:-1].clone()
        elif kind == "dtype":
            tensors[key] = tensors[key].double()
        elif kind == "number":
            tensors[key].view(-1)[-1] = torch.inf
        else:
            del tensors[key]

    for kind, words in (
        ("shape", "another shape or dtype"),
        ("dtype", "another shape or dtype"),
        ("number", "missing or not finite"),
        ("key", "weight of model.norm.weight"),
    ):
        shutil.rmtree(last)
        shutil.copytree(saved / "whole", last)
        tensors = load_file(last / name)
        change(
            tensors, next(key for key in tensors if key.startswith("actor/model.norm.weight/weight")), kind
        )
        save_file(tensors, last / name)
        body = json.loads((last / "manifest.json").read_text())["manifest"]
        size, crc = checksum(last / name)
        body["files"][name] = {"bytes": size, "crc": crc}
        text = json.dumps(body)
        (last / "manifest.json").write_text(
            f'{{"crc": {zlib.crc32(text.encode())}, "manifest":\n{text}\n}}\n'
        )
        line = saving.refused(0, str(saved), alone)
        assert words in line
        assert "\n" not in line
