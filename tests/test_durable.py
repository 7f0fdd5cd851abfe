"""What bears its name is whole and on the disk, whenever the process or the power went."""

import os
from pathlib import Path

import pytest

from puzzle.files import durable


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What the operating system was asked for, in order: names by the time of the call."""
    found: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(descriptor: int) -> None:
        found.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def seen_replace(source: Path, target: Path) -> None:
        found.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    return found


def model(folder: Path, text: str) -> Path:
    (folder / "inner").mkdir(parents=True)
    (folder / "weights").write_text(text)
    (folder / "inner" / "more").write_text(text)
    return folder


def test_contents_are_on_the_disk_before_the_name_and_the_name_after(tmp_path: Path, events) -> None:
    durable.write_text(tmp_path / "note", "all of it")
    assert events == [("fsync", ".partial-note"), ("rename", "note"), ("fsync", tmp_path.name)]
    events.clear()
    durable.put(model(tmp_path / "new", "2"), tmp_path / "last")
    at = events.index(("rename", "last"))
    assert {name for what, name in events[:at]} == {"weights", "more", "inner", "new"}
    assert events[at + 1 :] == [("fsync", tmp_path.name)]
    durable.make_folder(tmp_path / "a" / "b")
    assert events[-2:] == [("fsync", "a"), ("fsync", tmp_path.name)]


@pytest.mark.parametrize("at", range(2))
def test_a_folder_is_old_or_new_wherever_a_replacement_ends(tmp_path: Path, monkeypatch, at: int) -> None:
    model(tmp_path / "last", "1")
    renames = 0
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        nonlocal renames
        if renames == at:
            raise KeyboardInterrupt
        renames += 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        durable.put(model(tmp_path / "new", "2"), tmp_path / "last")
    monkeypatch.setattr(os, "replace", replace)
    model(tmp_path / ".next.partial", "half")
    durable.settle(tmp_path)
    assert (tmp_path / "last" / "weights").read_text() == "1"
    durable.put(tmp_path / "new", tmp_path / "last")
    assert (tmp_path / "last" / "weights").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_failed_writer_leaves_what_was_there(tmp_path: Path) -> None:
    def fails(part: Path) -> None:
        part.write_text("half")
        raise OSError("disk full")

    (tmp_path / "note").write_text("before")
    with pytest.raises(OSError, match="disk full"):
        durable.write(tmp_path / "note", fails)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"note": "before"}


def test_modes_are_those_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        durable.write_text(tmp_path / "note", "")
    finally:
        os.umask(before)
    assert (tmp_path / "note").stat().st_mode & 0o777 == 0o640
