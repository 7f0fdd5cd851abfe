"""Plants small faults into one room, one at a time in a copy of the tree; says which ones no test notices.

    python scripts/mutate.py --room plan --count 50 --seed 1

Every fault is run against the tests of its room, and against those of others that import its file: nearest
first, those that start processes last, until one fails. A run that exceeds its limit counts as found.
Libraries did not fit: mutmut rewrites all functions into switches that real ranks and kernels do not survive;
cosmic-ray knows no seed, no tests by file, and no swapped arguments, lost statements or lost keywords.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DONE = os.WEXITED | os.WNOHANG | os.WNOWAIT
ROOMS = ("plan", "engine", "model", "spec", "rlhf", "runlog", "data", "launch", "plotting")

OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or,
    ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip
PAIRS = [("min", "max"), ("any", "all"), ("sum", "mean"), ("amax", "amin"), ("argmax", "argmin")]
PAIRS += [("ceil", "floor"), ("maximum", "minimum"), ("zeros", "ones")]
UNSEEN = ("strict", "non_blocking", "num_warps", "num_stages")
"""Keywords of calls that only guard against faults, or that change nothing but speed, and that on a GPU."""
SYMMETRIC = ("min", "max", "gcd", "lcm", "maximum", "minimum", "isclose", "equal", "isinstance")
NAMES = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
Change = tuple[str, Any, str]
"""The rule, the node that is replaced, its new text."""


@dataclass(frozen=True)
class Fault:
    """One changed place: `old` bytes from `start` in a file are `new`; `kind` names the rule."""

    file: str
    line: int
    kind: str
    start: int
    old: bytes
    new: bytes

    def planted(self, source: bytes) -> bytes:
        """The file's text with the fault."""
        return source[: self.start] + self.new + source[self.start + len(self.old) :]

    def key(self, source: bytes) -> str:
        """The file, its line before and after, without a number: how the list of equivalent ones names it."""
        lines = []
        for text, size in ((source, len(self.old)), (self.planted(source), len(self.new))):
            begin = text.rfind(b"\n", 0, self.start) + 1
            if self.start - begin + len(self.old) < 30:  # short lines come often: with the one before
                begin = text.rfind(b"\n", 0, max(0, begin - 1)) + 1
            end = text.find(b"\n", self.start + size)
            lines.append(" ".join(text[begin : len(text) if end < 0 else end].decode().split()))
        return f"{self.file}: {lines[0]} => {lines[1]}"


def changes(node: ast.AST) -> Iterator[Change]:
    """Every small fault of one node."""
    if isinstance(node, ast.Compare | ast.BoolOp | ast.BinOp):
        yield from _operators(node)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield "sign or not dropped", node, f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "flag", node, str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield from (("one off", node, str(node.value + by)) for by in (1, -1))
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield "constant", node, repr(2.0 * node.value if node.value else 1.0)
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        yield "negated", node.test, f"(not ({ast.unparse(node.test)}))"
        yield "condition dropped", node.test, "False" if isinstance(node, ast.While) else "True"
    elif isinstance(node, ast.comprehension):
        yield from (("condition dropped", test, "True") for test in node.ifs)
    elif isinstance(node, ast.Slice):
        yield from (("one off", end, f"({ast.unparse(end)}) + 1") for end in (node.lower, node.upper) if end)
    elif isinstance(node, ast.Call):
        yield from _calls(node)
    elif isinstance(node, ast.AugAssign) or _acts(node):
        yield "statement lost", node, "pass"
    elif isinstance(node, ast.Break | ast.Continue):
        yield "loop", node, "continue" if isinstance(node, ast.Break) else "break"


def _acts(node: ast.AST) -> bool:
    """A call for its effect, or an assignment to an item."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript)


def _operators(node: ast.Compare | ast.BoolOp | ast.BinOp) -> Iterator[Change]:
    ops = node.ops if isinstance(node, ast.Compare) else [node.op]
    for i, op in enumerate(ops):
        if (other := OPERATORS.get(type(op))) is None:
            continue
        changed: Any = copy.copy(node)
        if isinstance(node, ast.Compare):
            changed.ops = [*node.ops[:i], other(), *node.ops[i + 1 :]]
        else:
            changed.op = other()
        yield "operator", node, f"({ast.unparse(changed)})"
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            rest = f" {'and' if isinstance(node.op, ast.And) else 'or'} ".join(
                f"({ast.unparse(v)})" for v in node.values if v is not value
            )
            yield "condition dropped", node, f"({rest})"


def _calls(node: ast.Call) -> Iterator[Change]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
    if name in NAMES:
        func = NAMES[name]
        if isinstance(node.func, ast.Attribute):
            func = f"{ast.unparse(node.func.value)}.{func}"
        yield "swapped function", node.func, func
    for a, b in pairwise(node.args) if name not in SYMMETRIC else ():
        if isinstance(a, ast.Name | ast.Attribute) and isinstance(b, ast.Name | ast.Attribute):
            order = [b if arg is a else a if arg is b else arg for arg in node.args]
            text = ast.unparse(ast.Call(node.func, order, node.keywords))
            yield "swapped arguments", node, text
    for keyword in (k for k in node.keywords if k.arg not in UNSEEN):
        rest = [k for k in node.keywords if k is not keyword]
        yield "keyword dropped", node, ast.unparse(ast.Call(node.func, node.args, rest))


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that do something: no annotations, decorators, imports, messages of errors."""
    if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "msg", "bases"):
            continue
        if isinstance(node, ast.keyword) and node.arg in UNSEEN:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _walk(child)


def faults(root: Path, room: str) -> list[Fault]:
    """All small faults of a room's files, in the order of files and places."""
    found = []
    folder = root / room if (root / room).is_dir() else root / "puzzle" / room
    for path in sorted(folder.rglob("*.py")):
        source = path.read_bytes()
        starts = [0]
        for line in source.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        for node in _walk(ast.parse(source)):
            for kind, where, new in changes(node):
                begin = starts[where.lineno - 1] + where.col_offset
                end = starts[where.end_lineno - 1] + where.end_col_offset
                file = path.relative_to(root).as_posix()
                found.append(Fault(file, where.lineno, kind, begin, source[begin:end], new.encode()))
    return found


def sample(found: list[Fault], count: int, seed: int) -> list[Fault]:
    """At most `count` faults, one of a line, all kinds as evenly as there are enough of them."""
    pools: dict[str, list[Fault]] = {}
    for fault in random.Random(seed).sample(found, len(found)):
        pools.setdefault(fault.kind, []).append(fault)
    chosen: dict[tuple[str, int], Fault] = {}
    while len(chosen) < count and any(pools.values()):
        for pool in pools.values():
            while pool and (pool[-1].file, pool[-1].line) in chosen:
                pool.pop()
            if pool and len(chosen) < count:
                fault = pool.pop()
                chosen[fault.file, fault.line] = fault
    return list(chosen.values())


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


def _starts(test: Path) -> bool:
    """Whether a test file starts processes."""
    return re.search(r"run_ranks|subprocess|Popen|main\(", test.read_text()) is not None


def nearest(root: Path, room: str, file: str) -> list[str]:
    """Test files for a source file: the room's by how many imports lie between and without processes first;
    then others that import it and start none."""
    modules = {
        path.relative_to(root).as_posix(): ".".join((*within, *path.relative_to(root).with_suffix("").parts))
        for folder, within in (("puzzle", ()), ("plotting", ("puzzle",)), ("tests", ()))
        for path in (root / folder).rglob("*.py")
    }
    distance, edge = {file: 0}, {file}
    while edge:
        names = {modules[path].removesuffix(".__init__") for path in edge}
        step = max(distance.values()) + 1
        edge = {path for path in modules if path not in distance and _imports(root / path) & names}
        distance |= dict.fromkeys(edge, step)

    def order(test: str) -> tuple[bool, int, bool, str]:
        return test not in own, distance.get(test, 99), _starts(root / test), test

    tests = [path for path in modules if Path(path).name.startswith("test_")]
    own = {test for test in tests if test.startswith(f"tests/{room}/")}
    return sorted(own | {t for t in tests if distance.get(t) == 1 and not _starts(root / t)}, key=order)


def run_tests(root: Path, words: list[str], limit: float) -> list[str]:
    """The tests that failed of pytest with these words, or "no end" after `limit` seconds.

    Runs in a fork, which has the large libraries already; all that it starts ends with it.
    """
    with tempfile.TemporaryFile("w+") as output:
        if (child := os.fork()) == 0:
            try:
                os._exit(_pytest(root, words, output.fileno()))
            finally:
                os._exit(70)  # whatever happens, a child never goes on as its parent
        try:
            end, over = time.monotonic() + limit, None
            while over is None and time.monotonic() < end:
                time.sleep(0.05)
                over = os.waitid(os.P_PID, child, DONE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        output.seek(0)
        text = output.read()
    if over is None:
        return ["no end"]
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.MULTILINE)
    return [] if status == 0 else failed or [text[-300:]]


def _pytest(root: Path, words: list[str], output: int) -> int:
    """Its exit code, of tests of the copy."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(root)
    os.environ |= {"PYTHONPATH": str(root), "CI": "1", "OMP_NUM_THREADS": "1"}
    sys.path[:] = [str(root), *(path for path in sys.path if Path(path) not in (ROOT, ROOT / "scripts"))]
    return int(pytest.main(["-q", "-p", "no:cacheprovider", "--tb=no", *words]))


def fails_alone(tree: Path, test: str) -> tuple[list[str], float]:
    """What fails of one file of tests without any fault, and the seconds that it takes."""
    began = time.monotonic()
    with copied(tree) as root:
        return run_tests(root, [test], 3600), time.monotonic() - began


def noticed(tree: Path, fault: Fault, tests: list[str], left_out: list[str], limit: float) -> list[str]:
    """What fails in a copy of `tree` with the fault: the nearest file of tests first, then the others."""
    with copied(tree) as root:
        (root / fault.file).write_bytes(fault.planted((root / fault.file).read_bytes()))
        words = ["-x", *(f"--deselect={test}" for test in left_out)]
        found = run_tests(root, [*words, tests[0]], limit)
        return found or (run_tests(root, [*words, *tests[1:]], limit) if tests[1:] else [])


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
    """Exit code 0 if nothing survives, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--room", choices=ROOMS, required=True)
    parser.add_argument("--count", type=int, default=50, help="faults to plant (default 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--equivalent", type=Path, default=ROOT / "tests/equivalent_faults.txt",
                        help="lines `FILE: BEFORE => AFTER  ## REASON`, or `FILE: *  ## REASON`")  # fmt: skip
    parser.add_argument("--limit", type=float, help="seconds per fault (default: 3 runs of its tests)")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time, each in a copy of its own")
    options = parser.parse_args()
    with copied(ROOT) as tree:  # which goes on changing under its owner's hands
        return planted(tree, options)


def planted(tree: Path, options: argparse.Namespace) -> int:
    """Plant the faults of a run into copies of `tree`, and print who notices; the exit code."""
    lines = options.equivalent.read_text().splitlines() if options.equivalent.exists() else []
    equivalent = {line.split("  ## ")[0] for line in lines if "  ## " in line}
    sources = {fault.file: (tree / fault.file).read_bytes() for fault in faults(tree, options.room)}
    found = [
        fault
        for fault in faults(tree, options.room)
        if not {f"{fault.file}: *", fault.key(sources[fault.file])} & equivalent
    ]
    chosen = sample(found, options.count, options.seed)
    tests = [nearest(tree, options.room, fault.file) for fault in chosen]
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read at torch's import; as tests/conftest.py has it
    for library in ("torch", "transformers", "hypothesis"):
        importlib.import_module(library)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends, too
    survivors, context = 0, multiprocessing.get_context("fork")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        every = sorted({test for files in tests for test in files})
        alone = dict(zip(every, pool.map(fails_alone, repeat(tree), every), strict=True))
        left_out = [test for failed, _ in alone.values() for test in failed]
        for test in left_out:
            print(f"left out, because it fails without any fault: {test}", flush=True)
        limits = [options.limit or 30 + 3 * sum(alone[test][1] for test in files) for files in tests]
        answers = pool.map(noticed, repeat(tree), chosen, tests, repeat(left_out), limits)
        for number, (fault, by) in enumerate(zip(chosen, answers, strict=True), 1):
            survivors += not by
            change = fault.key(sources[fault.file]).removeprefix(f"{fault.file}: ")
            place = f"{fault.file}:{fault.line} {fault.kind}"
            print(f"{number:3} {by[0] if by else 'SURVIVED'} | {place}: {change}", flush=True)
    print(f"{options.room}: {len(chosen) - survivors} of {len(chosen)} found (seed {options.seed})")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
