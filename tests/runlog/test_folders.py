"""The folder of a run: what stands in its way is one clear line, and nothing that was saved is replaced."""

import os
import shutil
from pathlib import Path

import pytest

from puzzle.errors import UserError
from puzzle.runlog import RunWriter, folders
from puzzle.runlog.record import Record
from puzzle.runlog.records import Checkpoint, End, Iteration
from tests.runlog import texts


def logged(out: Path, *records: Record) -> Path:
    """A run's folder whose log has these records."""
    with RunWriter(out, texts.header()) as writer:
        for record in records:
            writer.write(record)
    return out


def trained(index: int) -> Iteration:
    return Iteration(index, *texts.stages(1.0, 0.5, 2.0), {})


def model(out: Path, name: str) -> None:
    (out / "checkpoints" / name).mkdir(parents=True)
    (out / "checkpoints" / name / "config.json").write_text("{}")


def test_a_folder_is_made_with_its_parents_and_may_be_there(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    for _ in range(2):
        folders.check(out)
        assert out.is_dir()
    (tmp_path / "link").symlink_to(out)
    folders.check(tmp_path / "link")


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "to-file").symlink_to(tmp_path / "file")
    for name, what in (
        ("file", "is a file, not a folder"),
        ("to-file", "is a file, not a folder"),
        ("dangling", "is a link to nothing"),
        ("file/below", "cannot be made: "),
    ):
        with pytest.raises(UserError) as error:
            folders.check(tmp_path / name)
        assert str(error.value).startswith(f"--out {tmp_path / name}: {what}")
    assert (tmp_path / "file").read_text() == "kept"
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may not write or not enter; modes mean nothing to the administrator, who may run the tests."""
    (tmp_path / "plots").mkdir()
    for lacking in (os.W_OK, os.X_OK):
        monkeypatch.setattr(os, "access", lambda path, asked, lacking=lacking: not asked & lacking)
        with pytest.raises(UserError, match="cannot be written"):
            folders.check(tmp_path)
        with pytest.raises(UserError, match=r"plots: is no folder that can be written; move it away"):
            folders.prepare(tmp_path, resume=False, saves=False)


@pytest.mark.parametrize("name", [*folders.FILES, *folders.FOLDERS])
def test_what_stands_where_the_run_writes_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    file = name in folders.FILES
    words = "is no file; move it away" if file else "is no folder that can be written; move it away"
    wrong = path.mkdir if file else path.touch
    wrong()
    with pytest.raises(UserError) as error:
        folders.prepare(tmp_path, resume=file and name == "run.jsonl", saves=False)
    assert str(error.value) == f"{path}: {words}"
    path.rmdir() if file else path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError) as error:
        folders.prepare(tmp_path, resume=False, saves=False)
    assert str(error.value) == f"{path}: {words if file else 'leads nowhere; move it away'}"
    path.unlink()
    # What belongs there is left alone, the log of another run excepted.
    path.touch() if file else path.mkdir()
    if name == "run.jsonl":
        with pytest.raises(UserError, match="already holds a run"):
            folders.prepare(tmp_path, resume=False, saves=False)
    else:
        folders.prepare(tmp_path, resume=False, saves=False)
        assert path.exists()


@pytest.mark.parametrize("saves", [True, False])
def test_a_folder_of_checkpoints_is_made_where_the_run_saves(tmp_path: Path, saves: bool) -> None:
    folders.prepare(tmp_path, resume=False, saves=saves)
    assert (tmp_path / "checkpoints").is_dir() is saves


@pytest.mark.parametrize("saves", [True, False])
def test_what_a_killed_process_was_replacing_is_put_right(tmp_path: Path, saves: bool) -> None:
    """Left behind: what was being written, and what had made room for something that never came."""
    model(tmp_path, "final")
    shutil.move(tmp_path / "checkpoints" / "final", tmp_path / "checkpoints" / ".final.old")
    (tmp_path / "checkpoints" / ".final.partial").mkdir()
    folders.prepare(tmp_path, resume=False, saves=saves)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["final"]
    assert (tmp_path / "checkpoints" / "final" / "config.json").read_text() == "{}"


def test_states_are_those_to_go_on_from(tmp_path: Path) -> None:
    names = ["best", "state-10", "state-2", "state-3.copy", "state-x"]
    for name in names[::-1]:
        model(tmp_path, name)
    assert folders.states(tmp_path / "checkpoints") == {
        2: tmp_path / "checkpoints" / "state-2",
        10: tmp_path / "checkpoints" / "state-10",
    }
    (tmp_path / "checkpoints" / "empty").mkdir()
    assert folders.models(tmp_path / "checkpoints") == names


FINAL, FIRST = Checkpoint(2, "checkpoints/final"), Checkpoint(0, "checkpoints/final")
BEST, STATE = Checkpoint(0, "checkpoints/best"), Checkpoint(2, "checkpoints/state-2")


@pytest.mark.parametrize(
    ("records", "saved", "lost"),
    [
        ([], [], []),
        ([FINAL], ["final"], ["final"]),
        ([FIRST], ["final"], []),  # before anything was trained: the same is written again
        ([FIRST, FINAL], ["final"], ["final"]),  # the last one counts
        ([], ["final"], ["final"]),  # nobody says when it was saved
        ([trained(0)], ["final"], ["final"]),
        ([], ["best"], []),  # of a run that trained nothing there is no best one to lose
        ([trained(0)], ["best"], ["best"]),
        ([trained(0), BEST], ["best"], []),
        ([trained(0), STATE], ["best", "final"], ["best", "final"]),
    ],
)
@pytest.mark.parametrize("state", [False, True])
def test_models_that_a_run_would_replace_stop_it(
    tmp_path: Path, records: list[Record], saved: list[str], lost: list[str], state: bool
) -> None:
    """Without a state to go on from a resumed run begins again."""
    logged(tmp_path, *records)
    for name in saved:
        model(tmp_path, name)
    if state:
        (tmp_path / "checkpoints" / "state-2").mkdir(parents=True)
    if state or not lost:
        folders.prepare(tmp_path, resume=True, saves=True)
        return
    with pytest.raises(UserError) as error:
        folders.prepare(tmp_path, resume=True, saves=True)
    assert f"holds models ({', '.join(lost)}) but no state-N to go on from" in str(error.value)
    assert f"--actor.model {tmp_path / 'checkpoints' / lost[-1]} from that model" in str(error.value)


@pytest.mark.parametrize("status", ["completed", "failed", None])
def test_a_complete_run_without_states_does_not_begin_again(tmp_path: Path, status: str | None) -> None:
    logged(tmp_path, trained(0), *([] if status is None else [End(status)]))
    if status != "completed":
        folders.prepare(tmp_path, resume=True, saves=True)
        return
    with pytest.raises(UserError, match=r"is complete and left no checkpoint \(checkpoint.save false\)"):
        folders.prepare(tmp_path, resume=True, saves=True)
    (tmp_path / "checkpoints" / "state-1").mkdir(parents=True)
    folders.prepare(tmp_path, resume=True, saves=True)
