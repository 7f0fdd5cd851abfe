"""Plants small faults into one room, one at a time in a copy of the tree; says which ones no test notices.

    python scripts/mutate.py --room plan --count 50 --seed 1

Every fault is run against the tests of its room, and against those of others that import its file: nearest
first, those that start processes last, file by file until one fails. A file that takes three times as long as
without the fault, and half a minute more, counts as one that fails.

Answers are printed as they come. Where time is short, --seconds ends the run and --each a single fault; what
is then UNDECIDED, or has SURVIVED, `--again OUTPUT` plants once more.
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import pytest
from faults import Fault, faults, sample

ROOT = Path(__file__).resolve().parents[1]
DONE = os.WEXITED | os.WNOHANG | os.WNOWAIT
ROOMS = ("plan", "engine", "model", "spec", "rlhf", "runlog", "data", "launch", "plotting")
SURVIVED, UNDECIDED = "SURVIVED", "UNDECIDED"
ROW = re.compile(rf"^ *\d+ (?:{SURVIVED}|{UNDECIDED}) .*?\| (\S+?):\d+ [^:]+: (.*)$", re.MULTILINE)
NO_TESTS = int(pytest.ExitCode.NO_TESTS_COLLECTED)


@cache
def _imports(file: Path) -> frozenset[str]:
    """Dotted names that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


class Graph:
    """Which files of the project import which."""

    def __init__(self, root: Path) -> None:
        self.root = root
        names = {
            ".".join((*within, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__"): path
            for folder, within in (("puzzle", ()), ("plotting", ("puzzle",)), ("tests", ()))
            for path in (root / folder).rglob("*.py")
        }
        self.imports = {
            path.relative_to(root).as_posix(): {
                names[name].relative_to(root).as_posix() for name in _imports(path) if name in names
            }
            for path in names.values()
        }
        self.tests = [file for file in self.imports if Path(file).name.startswith("test_")]

    def distances(self, file: str) -> dict[str, int]:
        """How many imports lie between a file and those that reach it; a package is as near as its parts."""
        found, edge, step = {file: 0}, {file}, 0
        while edge:
            step += 1
            while handed := {f for f in self._above(edge) - found.keys() if f.endswith("/__init__.py")}:
                found |= dict.fromkeys(handed, step - 1)
                edge |= handed
            edge = self._above(edge) - found.keys()
            found |= dict.fromkeys(edge, step)
        return found

    def _above(self, edge: set[str]) -> set[str]:
        return {file for file, others in self.imports.items() if others & edge}

    def reached(self, test: str) -> set[str]:
        """All files that a test imports, and that these import."""
        found, new = {test}, {test}
        while new:
            new = set().union(*(self.imports[file] for file in new)) - found
            found |= new
        return found

    @cache  # noqa: B019 - one graph lives as long as the run
    def cost(self, test: str) -> tuple[bool, int]:
        """Whether a test or its helpers start processes, and how many files it reaches: roughly its time."""
        reached = self.reached(test)
        own = [self.root / file for file in reached if file.startswith("tests/")]
        starts = any(re.search(r"run_ranks\(|subprocess\.|Popen|main\(", path.read_text()) for path in own)
        return starts, len(reached)

    def nearest(self, room: str, file: str) -> list[str]:
        """Test files for a source file: the room's, by how many imports lie between and by what they cost;
        then others that import it and start no processes."""
        distance = self.distances(file)
        own = {test for test in self.tests if test.startswith(f"tests/{room}/")}
        others = {test for test in self.tests if distance.get(test) == 1 and not self.cost(test)[0]}

        def order(test: str) -> tuple[bool, int, tuple[bool, int], str]:
            return test not in own, distance.get(test, 99), self.cost(test), test

        return sorted(own | others, key=order)


@dataclass(frozen=True)
class Alone:
    """What one file of tests does without any fault: which of them fail, and the seconds that it takes."""

    failed: list[str]
    seconds: float

    @property
    def usable(self) -> bool:
        """Whether there are tests to run: neither the whole file failed nor did it find no end."""
        return all("::" in test for test in self.failed)


class OutOfTimeError(Exception):
    """The time of a run, or of one fault, is used up."""


@dataclass(frozen=True)
class Limits:
    """`end` on the monotonic clock, for all; `each` in seconds, for one fault."""

    end: float
    each: float


def run_tests(root: Path, words: list[str], limit: float, end: float) -> list[str]:
    """The tests that failed of pytest with these words, or "no end" after `limit` seconds.

    Runs in a fork, which has the large libraries already; all that it starts ends with it. Raises
    OutOfTimeError if `end` comes before.
    """
    with tempfile.TemporaryFile("w+") as output:
        if (child := os.fork()) == 0:
            try:
                os._exit(_pytest(root, words, output.fileno()))
            finally:
                os._exit(70)  # whatever happens, a child never goes on as its parent
        try:
            until, over = min(time.monotonic() + limit, end), None
            while over is None and time.monotonic() < until:
                time.sleep(0.05)
                over = os.waitid(os.P_PID, child, DONE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        output.seek(0)
        text = output.read()
    if over is None:
        if until == end:
            raise OutOfTimeError
        return ["no end"]
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.MULTILINE)
    return [] if os.waitstatus_to_exitcode(status) in (0, NO_TESTS) else failed or [text[-300:]]


def _pytest(root: Path, words: list[str], output: int) -> int:
    """Its exit code, of tests of the copy."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)  # whatever they were
    os.chdir(root)
    # A fault may leave a file's size and time as they were: byte code is neither read nor written.
    sys.dont_write_bytecode, sys.pycache_prefix = True, str(root / "byte-code")
    os.environ |= {"PYTHONPATH": str(root), "CI": "1", "OMP_NUM_THREADS": "1"}
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": sys.pycache_prefix}
    sys.path[:] = [str(root), *(path for path in sys.path if Path(path) not in (ROOT, ROOT / "scripts"))]
    for name in [name for name in sys.modules if name.split(".")[0] in ("puzzle", "plotting", "tests")]:
        del sys.modules[name]  # the checkout's, if whoever called has them
    return int(pytest.main(["-q", "-p", "no:cacheprovider", "--tb=no", *words]))


def alone(tree: Path, test: str, end: float) -> Alone:
    """One file of tests without any fault; measured once, by the process that needs it first."""
    with (tree.parent / f"{test.replace('/', '-')}.json").open("a+") as known:
        fcntl.flock(known, fcntl.LOCK_EX)
        known.seek(0)
        if text := known.read():
            return Alone(**json.loads(text))
        began = time.monotonic()
        with copied(tree) as root:
            failed = run_tests(root, [test], 3600, end)
        found = Alone(failed, time.monotonic() - began)
        json.dump(asdict(found), known)
    for name in found.failed:
        print(f"left out, because it fails without any fault: {name}", flush=True)
    return found


def noticed(tree: Path, fault: Fault, tests: list[str], limits: Limits) -> tuple[str, float]:
    """What fails first in a copy of `tree` with the fault, SURVIVED or UNDECIDED; and the seconds it took."""
    spent = 0.0
    if time.monotonic() > limits.end:
        return UNDECIDED, spent
    try:
        with copied(tree) as root:
            (root / fault.file).write_bytes(fault.planted((root / fault.file).read_bytes()))
            for test in tests:
                without = alone(tree, test, limits.end)
                if not without.usable:
                    continue
                began = time.monotonic()
                words = ["-x", *(f"--deselect={name}" for name in without.failed), test]
                end = min(limits.end, began + limits.each - spent)
                try:
                    failed = run_tests(root, words, 30 + 3 * without.seconds, end)
                finally:
                    spent += time.monotonic() - began
                if failed:
                    return (failed[0] if "::" in failed[0] else f"{test}: {failed[0]}"), spent
    except OutOfTimeError:
        return UNDECIDED, spent
    return SURVIVED, spent


@contextmanager
def copied(tree: Path) -> Generator[Path]:
    """A copy of `tree` that goes with the block."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        root = Path(folder) / "tree"
        shutil.copytree(
            tree, root, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", ".hypothesis", "shared")
        )
        yield root


def main() -> int:
    """Exit code 0 if all faults are found, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--room", choices=ROOMS, required=True)
    parser.add_argument("--count", type=int, default=50, help="faults to plant (default 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", type=Path, metavar="OUTPUT",
                        help="no sample: what SURVIVED or is UNDECIDED in an earlier output")  # fmt: skip
    parser.add_argument("--equivalent", type=Path, default=ROOT / "tests/equivalent_faults.txt",
                        help="lines `FILE: BEFORE => AFTER  ## REASON`, or `FILE: *  ## REASON`")  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="time for all (default: no limit)"
    )
    parser.add_argument("--each", type=float, default=float("inf"), help="seconds for one fault (likewise)")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time, each in a copy of its own")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    with copied(ROOT) as tree:  # which goes on changing under its owner's hands
        return plant(tree, choose(tree, options), Limits(end, options.each), options)


def choose(tree: Path, options: argparse.Namespace) -> list[tuple[Fault, str]]:
    """The faults of a run, and how the list of equivalent ones would name them."""
    lines = options.equivalent.read_text().splitlines() if options.equivalent.exists() else []
    equivalent = {line.split("  ## ")[0] for line in lines if "  ## " in line}
    every = faults(tree, options.room)
    sources = {fault.file: (tree / fault.file).read_bytes() for fault in every}
    keys = {fault: fault.key(sources[fault.file]) for fault in every}
    found = [fault for fault in every if not {f"{fault.file}: *", keys[fault]} & equivalent]
    if options.again:
        wanted = {f"{file}: {change}" for file, change in ROW.findall(options.again.read_text())}
        chosen = list({keys[fault]: fault for fault in found if keys[fault] in wanted}.values())
    else:
        chosen = sample(found, options.count, options.seed)
    return [(fault, keys[fault]) for fault in chosen]


@contextmanager
def workers(jobs: int) -> Generator[ProcessPoolExecutor]:
    """Processes that end with the block, and with them what they have started, also where it ends early."""
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork"))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    pool.shutdown()


def plant(tree: Path, chosen: list[tuple[Fault, str]], limits: Limits, options: argparse.Namespace) -> int:
    """Plant the faults of a run into copies of `tree`, and print who notices; the exit code."""
    graph = Graph(tree)
    tests = [graph.nearest(options.room, fault.file) for fault, _ in chosen]
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read at torch's import; as tests/conftest.py has it
    for library in ("torch", "transformers", "hypothesis"):
        importlib.import_module(library)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends, too
    number = {SURVIVED: 0, UNDECIDED: 0}
    with workers(options.jobs) as pool:
        answers = {
            pool.submit(noticed, tree, fault, files, limits): at
            for at, ((fault, _), files) in enumerate(zip(chosen, tests, strict=True))
        }
        for answer in as_completed(answers):
            (by, seconds), at = answer.result(), answers[answer]
            fault, key = chosen[at]
            if by in number:
                number[by] += 1
            place = f"{fault.file}:{fault.line} {fault.kind}"
            change = key.removeprefix(f"{fault.file}: ")
            print(f"{at + 1:3} {by} ({seconds:.0f} s) | {place}: {change}", flush=True)
    decided = len(chosen) - number[UNDECIDED]
    words = f"; {number[UNDECIDED]} undecided" if number[UNDECIDED] else ""
    seed = f" (seed {options.seed})" if not options.again else ""
    print(f"{options.room}: {decided - number[SURVIVED]} of {decided} found{seed}{words}")
    return int(decided - number[SURVIVED] < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
