"""The house rules that a program can check (docs/architecture.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from rooms import PAGE, ROOMS, allowed, around, page, room_of

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("puzzle", "plotting")
FILES = sorted(file.relative_to(ROOT) for package in PACKAGES for file in (ROOT / package).rglob("*.py"))


def inside(name: str, parents: tuple[str, ...]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def imports(file: Path) -> Iterator[str]:
    """Dotted names that a file imports, functions' own imports included, relative ones resolved."""
    package = file.with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"


def arrows(room: str) -> Iterator[tuple[Path, str]]:
    """Files of a room, not of rooms inside it, with the names of the project that they import."""
    for file in FILES:
        if room_of(file.as_posix()) == room:
            yield from ((file, name) for name in imports(file) if inside(name, PACKAGES))


def with_those_around(name: str) -> set[str]:
    room = room_of(name)
    return set() if room is None else {room, *around(room)}


def test_every_file_has_a_room() -> None:
    outside = [str(file) for file in FILES if room_of(file.as_posix()) is None]
    assert outside == ["puzzle/__init__.py"]


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room: str) -> None:
    wrong = [
        (str(file), name)
        for file, name in arrows(room)
        if name != "puzzle.__version__" and not allowed(room) & with_those_around(name)
    ]
    assert wrong == []


def test_rooms_lie_on_floors() -> None:
    """No room may import one from which it can be reached: whatever the table allows has an order."""
    standing: set[str] = set()
    while ready := [r for r in ROOMS if r not in standing and allowed(r) - {r} <= standing | around(r)]:
        standing.update(ready)
    assert standing == set(ROOMS)


def test_what_is_allowed_is_used() -> None:
    """An arrow that nothing draws any more leaves the table."""
    for room, listed in ROOMS.items():
        if any(other != room and other.startswith(room + "/") for other in ROOMS):
            continue  # what rooms inside it import, they import for it
        drawn = set().union(*(with_those_around(name) for _, name in arrows(room)))
        assert set(listed.may) <= drawn, room


def test_the_page_shows_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(text), "run python scripts/rooms.py"


@pytest.mark.parametrize("room", [room for room, listed in ROOMS.items() if listed.never])
def test_rooms_never_import(room: str) -> None:
    wrong = [
        (str(file), name)
        for file in FILES
        if room in with_those_around(file.as_posix())
        for name in imports(file)
        if inside(name, ROOMS[room].never)
    ]
    assert wrong == []


def test_files_stay_below_400_lines_and_functions_below_60() -> None:
    wrong = []
    for file in FILES:
        text = (ROOT / file).read_text()
        if text.count("\n") >= 400:
            wrong.append(f"{file}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines >= 60:
                    wrong.append(f"{file}:{node.lineno} {node.name}: {lines} lines")
    assert wrong == []


def test_no_process_group_or_layout_in_a_module_global() -> None:
    """No `global` statement: state lives in objects that are passed in."""
    wrong = [
        f"{file}:{node.lineno}"
        for file in FILES
        for node in ast.walk(ast.parse((ROOT / file).read_text()))
        if isinstance(node, ast.Global)
    ]
    assert wrong == []
