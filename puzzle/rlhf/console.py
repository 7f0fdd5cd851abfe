"""What a person watching a run sees: a line per iteration, a bar with the time left."""

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Columns = Sequence[tuple[str, str, str]]
"""Heading, metric or stage, format; what a run does not have is shown as a dash."""
POLICY: Columns = (
    ("reward", "reward", "8.3f"),
    ("KL", "kl", "8.4f"),
    ("tokens", "response_tokens", "8.0f"),
    ("gap nats", "logprob_gap_rms", "10.4f"),
    ("actor loss", "actor_loss", "11.4f"),
    ("critic loss", "critic_loss", "12.4f"),
    ("gen s", "generation", "7.2f"),
    ("infer s", "inference", "8.2f"),
    ("train s", "training", "8.2f"),
    ("total s", "e2e", "8.2f"),
)


def supervised(model: str) -> Columns:
    """The columns of a run in which `model` learns from examples."""
    return (
        ("loss", f"{model}_loss", "10.4f"),
        ("accuracy", "accuracy", "10.3f"),
        ("tokens", "tokens", "8.0f"),
        ("grad norm", f"{model}_grad_norm", "11.3f"),
        ("train s", "training", "8.2f"),
        ("total s", "e2e", "8.2f"),
    )


class Reporter:
    """Shows the iterations of one run; used by one process. `console` is where it prints (stdout)."""

    def __init__(
        self,
        iterations: int,
        done: int = 0,
        console: Console | None = None,
        columns: Columns = POLICY,
    ) -> None:
        """`iterations` planned, `done` of them before (resumed)."""
        self._console = console or Console(highlight=False)
        self._iterations, self._columns = iterations, columns
        self._done = done
        self._began = time.monotonic()
        self._first = done
        self._bar = Progress(
            TextColumn("iteration"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_interactive,
        )
        self._task = self._bar.add_task("", total=iterations, completed=done)
        self._bar.start()
        heads = "".join(f"{head:>{_width(form)}}" for head, _, form in self._columns)
        self._print(f"{'iteration':>10}{heads}{'left':>9}")

    def iteration(
        self,
        iteration: int,
        stage_seconds: Mapping[str, float],
        e2e_seconds: float,
        metrics: Mapping[str, float],
    ) -> None:
        """One finished iteration (counted from 0), with the fields of its record."""
        values = {**metrics, **stage_seconds, "e2e": e2e_seconds}
        cells = "".join(_cell(values.get(name), form) for _, name, form in self._columns)
        self._done = iteration + 1
        self._print(f"{f'{iteration + 1}/{self._iterations}':>10}{cells}{_clock(self._left()):>9}")
        self._bar.update(self._task, completed=self._done)

    def evaluation(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Held-out metrics after `iteration` iterations."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self._print(f"  held out after {iteration} iterations: {shown}")

    def ended(self, out: Path, model: Path | None) -> None:
        """Where what the run wrote is: its folder, and that of the model, if there is one."""
        saved = "" if model is None else f"the model is {_near(model)}; "
        self._print(f"done: {saved}`puzzle report {shlex.quote(_near(out))}` writes a page about the run")

    def close(self) -> None:
        """Take the bar away; a second call does nothing."""
        self._bar.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _left(self) -> float:
        """Seconds left at the mean pace of this process."""
        pace = (time.monotonic() - self._began) / max(1, self._done - self._first)
        return pace * (self._iterations - self._done)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


def _near(path: Path) -> str:
    """A path from the working folder, where it is inside."""
    whole = path.resolve()
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else str(whole)


def _width(form: str) -> int:
    return int(form.split(".")[0])


def _cell(value: float | None, form: str) -> str:
    if value is None:
        return f"{'-':>{_width(form)}}"
    digits = int(form.rstrip("f").split(".")[1])
    return f"{round(value, digits) + 0.0:{form}}"  # no -0.0000


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
