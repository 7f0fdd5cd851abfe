"""Small faults in a project of three files: which are planted, which tests come first, who notices."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import faults
import mutate
import pytest

FILES = {
    "pyproject.toml": '[tool.pytest.ini_options]\naddopts = ["--import-mode=importlib"]\n',
    "puzzle/spec/__init__.py": "from puzzle.spec.count import count\n",
    "puzzle/spec/count.py": (
        "def count(n):\n"
        "    total = 0\n"
        "    while n > 0:\n"
        "        total += 2\n"
        "        n -= 1\n"
        "    return total if n == 0 else 0\n"
    ),
    "tests/spec/test_count.py": (
        "from puzzle.spec import count\n\ndef test_two():\n    assert count(2) == 4\n\n"
        "def test_that_always_fails():\n    assert count(1) == 3\n"
    ),
    "tests/spec/test_broken.py": "import puzzle.spec.absent\n",
    "tests/spec/test_program.py": "import subprocess\n\ndef test_nothing():\n    subprocess.run(['true'])\n",
    "tests/plan/test_other.py": "from puzzle.spec.count import count\n\ndef test():\n    assert not count(0)",
    "tests/plan/test_far.py": "def test_nothing():\n    pass\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        file = tmp_path / "tree" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "tree"


def fault_of(tree: Path, new: str) -> faults.Fault:
    """The one whose changed line ends so."""
    source = (tree / "puzzle/spec/count.py").read_bytes()
    (found,) = (fault for fault in faults.faults(tree, "spec") if fault.key(source).endswith(f" {new}"))
    return found


def test_tests_of_the_room_come_first_and_among_them_those_that_reach_the_file(tree: Path) -> None:
    room = [f"tests/spec/test_{name}.py" for name in ("count", "broken", "program")]
    assert mutate.Graph(tree).nearest("spec", "puzzle/spec/count.py") == [*room, "tests/plan/test_other.py"]


@pytest.mark.parametrize(
    ("new", "each", "by"),
    [
        ("total += 3", math.inf, "tests/spec/test_count.py::test_two"),
        ("else 1", math.inf, mutate.SURVIVED),
        ("total += 3", 0.0, mutate.UNDECIDED),
    ],
)
def test_who_notices(tree: Path, new: str, each: float, by: str, capfd: pytest.CaptureFixture[str]) -> None:
    """What fails without any fault notices none, nor does a file that cannot be imported."""
    fault = fault_of(tree, new)
    tests = mutate.Graph(tree).nearest("spec", fault.file)
    assert mutate.noticed(tree, fault, tests, mutate.Limits(math.inf, each))[0] == by
    said = capfd.readouterr().out
    assert "without any fault: tests/spec/test_count.py::test_that_always_fails" in said


def test_again_plants_what_an_earlier_output_left(tree: Path, tmp_path: Path) -> None:
    """Not what was found, nor what has been declared equivalent since."""
    keys = {}
    for new in ("total += 3", "else 1", "else -1"):
        fault = fault_of(tree, new)
        change = fault.key((tree / fault.file).read_bytes()).removeprefix(f"{fault.file}: ")
        keys[new] = f"{fault.file}:{fault.line} {fault.kind}: {change}"
    (tmp_path / "output").write_text(
        f"  1 tests/spec/test_count.py::test_two (1 s) | {keys['total += 3']}\n"
        f"  2 SURVIVED (3 s) | {keys['else 1']}\n 12 UNDECIDED (0 s) | {keys['else -1']}\nspec: 1 of 2\n"
    )
    (tmp_path / "equivalent").write_text("")
    options = argparse.Namespace(room="spec", again=tmp_path / "output", equivalent=tmp_path / "equivalent")
    assert {fault for fault, _ in mutate.choose(tree, options)} == {
        fault_of(tree, "else 1"), fault_of(tree, "else -1")
    }  # fmt: skip
    ((_, key),) = [one for one in mutate.choose(tree, options) if one[0] == fault_of(tree, "else 1")]
    (tmp_path / "equivalent").write_text(f"{key}  ## no reason\n")
    assert [fault for fault, _ in mutate.choose(tree, options)] == [fault_of(tree, "else -1")]
