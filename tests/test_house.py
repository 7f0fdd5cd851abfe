"""The house rules that a program can check (docs/architecture.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("puzzle", "plotting")
FILES = sorted(file.relative_to(ROOT) for package in PACKAGES for file in (ROOT / package).rglob("*.py"))

# Room -> what of the project it may import; rooms not listed may import anything.
MAY_IMPORT = {
    "puzzle/errors.py": (),
    "puzzle/limits.py": (),
    "puzzle/reading.py": ("puzzle.errors",),
    "puzzle/durable.py": (),
    "puzzle/identity.py": ("puzzle.errors",),
    "puzzle/path.py": (),
    "puzzle/jsonio.py": ("puzzle.reading", "puzzle.errors"),
    "puzzle/spec": ("puzzle.spec", "puzzle.jsonio", "puzzle.errors"),
    "puzzle/plan": ("puzzle.plan", "puzzle.jsonio", "puzzle.spec", "puzzle.limits", "puzzle.errors"),
    "puzzle/model": (
        "puzzle.model",
        "puzzle.jsonio",
        "puzzle.plan",
        "puzzle.spec",
        "puzzle.durable",
        "puzzle.errors",
    ),
    "puzzle/engine": (
        "puzzle.engine",
        "puzzle.model",
        "puzzle.plan",
        "puzzle.spec",
        "puzzle.durable",
        "puzzle.jsonio",
        "puzzle.reading",
        "puzzle.identity",
        "puzzle.errors",
    ),
    "puzzle/runlog": ("puzzle.runlog", "puzzle.limits", "puzzle.jsonio", "puzzle.durable", "puzzle.errors"),
    "plotting": (
        "plotting",
        "puzzle.path",
        "puzzle.runlog",
        "puzzle.jsonio",
        "puzzle.durable",
        "puzzle.errors",
    ),
}
NEVER = {
    "puzzle/spec": ("torch", "transformers"),
    "puzzle/plan": ("torch", "transformers"),
    "puzzle/runlog": ("torch", "transformers", "numpy", "pandas", "scipy", "yaml", "pydantic"),
    "plotting": ("torch", "transformers"),
    "puzzle/rlhf": ("torch.distributed",),
}


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


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_what_they_may(room: str) -> None:
    wrong = [
        (str(file), name)
        for file in FILES
        if inside(file.as_posix().replace("/", "."), (room.replace("/", "."),))
        for name in imports(file)
        if inside(name, PACKAGES) and not inside(name, MAY_IMPORT[room]) and name != "puzzle.__version__"
    ]
    assert wrong == []


@pytest.mark.parametrize("room", NEVER)
def test_rooms_never_import(room: str) -> None:
    wrong = [
        (str(file), name)
        for file in FILES
        if file.as_posix().startswith(room + "/")
        for name in imports(file)
        if inside(name, NEVER[room])
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
