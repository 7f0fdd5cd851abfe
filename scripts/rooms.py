#!/usr/bin/env python
"""The rooms of the house: what each knows, and which others it may import.

`python scripts/rooms.py` writes the table into docs/architecture.md; tests/test_house.py holds the code to
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms: written by scripts/rooms.py -->\n", "<!-- end of rooms -->\n"
HEAVY = ("torch", "transformers")


@dataclass(frozen=True)
class Room:
    """A package or module of the project: what it knows, the rooms that it may import, libraries it never
    does.

    Who may import a room may import the rooms inside it. A room inside another may import what that one may,
    and the neighbours that it lists.
    """

    knows: str
    may: tuple[str, ...] = ()
    never: tuple[str, ...] = ()


ROOMS = {
    "puzzle/errors.py": Room("`UserError`, the one-line error message; exit codes", (), HEAVY),
    "puzzle/files": Room(
        "reading and writing files: typed JSON, size limits, write-then-rename, locks",
        ("puzzle/errors.py",),
        HEAVY,
    ),
    "puzzle/spec": Room(
        "`ModelSpec`, `TensorSpec`, published model sizes, FLOPs", ("puzzle/errors.py", "puzzle/files"), HEAVY
    ),
    "puzzle/plan": Room(
        "pure values: layouts, shards, memory, parts of the `RunPlan` (`run.py`); schedules (`pipeline/`),"
        " switches (`reshard/`), virtual time (`simulate/`)",
        ("puzzle/errors.py", "puzzle/files", "puzzle/spec"),
        HEAVY,
    ),
    "puzzle/plan/predict": Room(
        "what a run would take: closed forms and costs of passes, stages and switches; calibrations",
        ("puzzle/plan",),
    ),
    "puzzle/config": Room(
        "configuration: schema, files and command lines, `resolve` to a `RunPlan`, the memory report",
        ("puzzle/errors.py", "puzzle/files", "puzzle/spec", "puzzle/plan"),
        HEAVY,
    ),
    "puzzle/data": Room(
        "prompts, examples and which of their tokens are learned, tokenizers, stop conditions of responses",
        ("puzzle/errors.py", "puzzle/files", "puzzle/config"),
        ("torch",),
    ),
    "puzzle/runlog": Room(
        "the log: schema, writer, readers, published logs",
        ("puzzle/errors.py", "puzzle/files"),
        (*HEAVY, "numpy", "pandas", "scipy", "yaml", "pydantic"),
    ),
    "puzzle/model": Room(
        "the decoder as torch modules, weights, Hugging Face files; Triton kernels (`kernels/`)",
        ("puzzle/errors.py", "puzzle/files", "puzzle/spec", "puzzle/plan"),
    ),
    "puzzle/engine": Room(
        "executes plans, knows no algorithm",
        ("puzzle/errors.py", "puzzle/files", "puzzle/spec", "puzzle/plan", "puzzle/model"),
    ),
    "puzzle/engine/runtime": Room("one process of a run: process groups, timers, traces, the watchdog"),
    "puzzle/engine/train": Room(
        "gradient buckets, ZeRO-1 AdamW, offload of its states", ("puzzle/engine/runtime",)
    ),
    "puzzle/engine/pipeline": Room(
        "forward and backward passes of one model or several through stages",
        ("puzzle/engine/runtime", "puzzle/engine/train"),
    ),
    "puzzle/engine/reshard": Room(
        "executes switch plans by messages or peer copies", ("puzzle/engine/runtime",)
    ),
    "puzzle/engine/generate": Room(
        "the decode ring, passes with a KV cache, sampling",
        ("puzzle/engine/runtime", "puzzle/engine/pipeline", "puzzle/engine/reshard"),
    ),
    "puzzle/engine/checkpoint": Room(
        "checkpoints to resume from and exported models, as boxes",
        ("puzzle/engine/pipeline", "puzzle/engine/train"),
    ),
    "puzzle/launch": Room(
        "starts processes: local, Ray, Slurm ([launching.md](launching.md))",
        ("puzzle/errors.py", "puzzle/files", "puzzle/config", "puzzle/engine"),
    ),
    "puzzle/rlhf": Room(
        "a run (`session.py`) and its iterations: algorithms (`algorithms/`), rewards, rollout, training"
        " steps; learning from examples (`supervised/`); logging",
        (
            "puzzle/errors.py",
            "puzzle/files",
            "puzzle/spec",
            "puzzle/plan",
            "puzzle/config",
            "puzzle/data",
            "puzzle/runlog",
            "puzzle/model",
            "puzzle/engine",
            "puzzle/launch",
            "plotting",
        ),
        ("torch.distributed",),
    ),
    "puzzle/campaign": Room(
        "many runs: `experiments.yaml` to configurations, their requirements, execution one by one",
        ("puzzle/errors.py", "puzzle/files", "puzzle/spec", "puzzle/config", "puzzle/launch"),
        HEAVY,
    ),
    "puzzle/report": Room(
        "a page about runs: HTML in one file, and Markdown",
        ("puzzle/errors.py", "puzzle/config", "puzzle/runlog"),
        HEAVY,
    ),
    "puzzle/cli": Room(
        "the commands, imported when they run",
        (
            "puzzle/errors.py",
            "puzzle/files",
            "puzzle/spec",
            "puzzle/plan",
            "puzzle/config",
            "puzzle/data",
            "puzzle/runlog",
            "puzzle/model",
            "puzzle/engine",
            "puzzle/launch",
            "puzzle/rlhf",
            "puzzle/campaign",
            "puzzle/report",
            "plotting",
        ),
    ),
    "puzzle/bench": Room(
        "measurements and checks on real devices ([performance.md](performance.md))",
        (
            "puzzle/errors.py",
            "puzzle/files",
            "puzzle/spec",
            "puzzle/plan",
            "puzzle/config",
            "puzzle/data",
            "puzzle/runlog",
            "puzzle/model",
            "puzzle/engine",
            "puzzle/launch",
            "puzzle/rlhf",
            "puzzle/cli",
        ),
    ),
    "puzzle/api.py": Room(
        "what Python calls, under the name `puzzle` ([python.md](python.md))",
        (
            "puzzle/errors.py",
            "puzzle/spec",
            "puzzle/plan",
            "puzzle/config",
            "puzzle/data",
            "puzzle/runlog",
            "puzzle/launch",
            "puzzle/cli",
        ),
        HEAVY,
    ),
    "puzzle/__main__.py": Room("`python -m puzzle`", ("puzzle/files", "puzzle/cli")),
    "plotting": Room(
        "figures and curves, pure functions of logs",
        ("puzzle/errors.py", "puzzle/files", "puzzle/runlog"),
        HEAVY,
    ),
}


def room_of(path: str) -> str | None:
    """The innermost room that a path (`puzzle/plan/layout.py`) or a dotted module lies in."""
    parts = path.removesuffix(".py").replace(".", "/").split("/")
    if parts[:2] == ["puzzle", "plotting"]:  # what the folder is imported as
        del parts[0]
    for length in range(len(parts), 0, -1):
        inner = "/".join(parts[:length])
        for name in (inner, f"{inner}.py"):
            if name in ROOMS:
                return name
    return None


def around(room: str) -> set[str]:
    """The rooms that a room lies in."""
    parents = [parent.as_posix() for parent in Path(room).parents]
    return {parent for parent in parents if parent in ROOMS}


def allowed(room: str) -> set[str]:
    """Rooms that `room` may import, with all that lies in them: its own list, that of the room it lies in,
    and itself."""
    own = {room, *ROOMS[room].may}
    return own.union(*(allowed(parent) - {parent} for parent in around(room)))


def table() -> str:
    """The rooms as a Markdown table, those that import least first."""
    lines = ["| room | what it knows | may import |", "|---|---|---|"]
    for name, room in ROOMS.items():
        short = [other.removeprefix("puzzle/").removesuffix(".py") for other in room.may]
        said = ", ".join(f"`{other}`" for other in short) or "nothing of the project"
        if name.count("/") > 1:
            own = ", ".join(f"`{other}`" for other in short) or "none of its neighbours"
            said = f"{own}; what `{name.split('/')[1]}` may"
        lines.append(f"| `{name}{'' if name.endswith('.py') else '/'}` | {room.knows} | {said} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """`text` of the page with the present table between its marks."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
