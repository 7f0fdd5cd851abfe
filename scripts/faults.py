"""Small faults of a source file, and a sample of them for scripts/mutate.py.

Libraries did not fit: mutmut rewrites all functions into switches that real ranks and kernels do not survive;
cosmic-ray knows no seed, no tests by file, and no swapped arguments, lost statements or lost keywords.
"""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

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
