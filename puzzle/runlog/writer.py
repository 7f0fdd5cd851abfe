"""Writes the log of a run: `run.jsonl` for programs, `run.log` for people, `samples.jsonl` for texts."""

import json
import math
import os
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from puzzle.errors import UserError
from puzzle.files import durable
from puzzle.runlog.folders import FILES
from puzzle.runlog.past import differences, past_of, read_lines
from puzzle.runlog.published import lines
from puzzle.runlog.record import Line, Record, decode, encode
from puzzle.runlog.records import End, Iteration, Resume, RunHeader, Warned

# What a resumed run must share with the log that it goes on, and what it may change but then says.
_IDENTITY = ("schema", "repeat", "figures", "cluster", "variant", "provenance")
_MAY_CHANGE = ("actor", "critic", "config", "given", "layouts", "software", "hardware", "git_commit", "plan")
_OPEN: AbstractContextManager[object] = nullcontext()


class LineFile:
    """A text file that grows by whole lines: one write each, nothing held back; on the disk after `sync`.

    What a killed or failed write left behind is closed with a newline before the next line.
    Raises UserError where the file cannot be written (disk full, no permission). It writes while it holds
    `gate`, by which whoever declares a run dead keeps it from writing any more.
    """

    def __init__(self, path: Path, gate: AbstractContextManager[object]) -> None:
        self.path, self._gate = path, gate
        with _writing(path):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            size = os.fstat(self._descriptor).st_size
            self._torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"

    def append(self, text: str) -> None:
        """Add one line, or several at once; `text` has no newline at its end."""
        data = (("\n" if self._torn else "") + text + "\n").encode("utf-8", "backslashreplace")
        self._torn = True
        with _writing(self.path), self._gate:
            while data:
                data = data[os.write(self._descriptor, data) :]
        self._torn = False

    def sync(self) -> None:
        """Bring what was written to the disk."""
        with _writing(self.path):
            durable.sync_open(self._descriptor)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class RunWriter:
    """The log of one run in `out_dir`, written by one process (rank 0).

    With `resume`, a log that is already there goes on: its header stands, and a `Resume` says what differs.

    Raises:
        UserError: the folder cannot be written, holds a run already, or holds another run than the resumed.
        ValueError: a record breaks the schema.
    """

    def __init__(
        self,
        out_dir: Path,
        header: RunHeader,
        resume: bool = False,
        gate: AbstractContextManager[object] = _OPEN,
    ) -> None:
        self.out_dir = out_dir
        self.run_id = header.run_id
        for name in ("iterations", "global_batch_size"):
            if not isinstance(header.config.get(name), int) or header.config[name] < 1:
                raise ValueError(f"config of a run must have {name}, a whole number >= 1")
        self._header = header
        self._seq = 0
        self._seconds: list[float] = []
        self._changed: dict[str, Any] = {}
        self.settings: dict[str, tuple[Any, Any]] = {}
        """Settings that differ from those of the process that wrote the log before: before, now."""
        with _writing(out_dir):
            durable.make_folder(out_dir)
            old = read_lines(out_dir / "run.jsonl")
        if old and not resume:
            raise UserError(f"{out_dir} already holds a run; give another folder, or resume that run")
        # JSON turns tuples into lists: compare what the file would hold.
        new = decode(encode(Line(0, header)).encode()).record
        assert isinstance(new, RunHeader)
        first = self._adopt(old, new)
        self._files = {name: LineFile(out_dir / name, gate) for name in FILES}
        if first:
            self._append(new)
            self._tell(f"run {header.run_id} ({header.provenance}): {header.variant} {header.pair}")
        self.sync()
        with _writing(out_dir):
            durable.sync(out_dir)  # the names of the files

    def _adopt(self, old: list[Line], new: RunHeader) -> bool:
        """Go on with the log of an earlier process; True if it holds no header yet."""
        self._seq = max((line.seq for line in old), default=-1) + 1
        past = past_of(old)
        if past is None:
            return True
        before, now = past.run.to_json(), new.to_json()
        for name in _IDENTITY:
            if before[name] != now[name]:
                raise UserError(
                    f"{self.out_dir} holds a run with {name} {before[name]!r}, not {now[name]!r}; "
                    "resume with the same, or give another folder"
                )
        self.run_id = past.run.run_id
        self._changed = {name: now.get(name) for name in _MAY_CHANGE if now.get(name) != before.get(name)}
        self.settings = differences(past.config, new.config)
        return False

    def write(self, record: Record) -> None:
        """Add a record, with its line for people. A `Resume` says what of the header is now other; an `End`
        closes the log.

        A metric that is NaN or infinite becomes null; that of an iteration is a warning, too. Raises
        ValueError where the record breaks the schema: nothing is written.
        """
        if isinstance(record, Resume):
            record = replace(record, changed=self._changed)
        self._append(record)
        if isinstance(record, Iteration):
            for name, value in record.metrics.items():
                if not math.isfinite(value):
                    self.write(Warned(f"{name} is {value}", record.iteration))
        if (text := record.for_people()) is not None:
            self._tell(text)
        if isinstance(record, Iteration):
            self._say(self._published(record))
        if isinstance(record, End):
            self.sync()
            self.close()

    def _published(self, one: Iteration) -> str:
        """An iteration as the published logs tell it."""
        self._seconds.append(one.e2e_seconds)
        total, batch = self._header.config["iterations"], self._header.config["global_batch_size"]
        told = (one.iteration, total, batch, one.stage_seconds, one.e2e_seconds, one.metrics)
        if self._header.variant == "dschat":
            return lines.chat_lines(*told, math.fsum(self._seconds) / len(self._seconds))
        switch = one.stage_seconds["switch"]
        return "\n".join([*([lines.reshard_line(switch)] if switch > 0 else []), lines.puzzle_line(*told)])

    def sample(self, iteration: int, prompt: str, response: str, **fields: Any) -> None:
        """One prompt with its response, e.g. with `score`, into `samples.jsonl`."""
        known = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in fields.items()
        }
        sample = {"iteration": iteration, "prompt": prompt, "response": response, **known}
        self._files["samples.jsonl"].append(json.dumps(sample, ensure_ascii=False, allow_nan=False))

    def sync(self) -> None:
        """Bring all that was written to the disk; once an iteration is enough."""
        for file in self._files.values():
            file.sync()

    def close(self) -> None:
        """Close the files without saying that the run is over."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tell(self, text: str) -> None:
        """A line for people, with the time by this host's clock."""
        self._say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def _say(self, text: str) -> None:
        self._files["run.log"].append(text)

    def _append(self, record: Record) -> None:
        line = encode(Line(self._seq, record, round(time.time(), 3)))
        # Before the write: a line that tears must not leave its number to the next one.
        self._seq += 1
        self._files["run.jsonl"].append(line)


@contextmanager
def _writing(path: Path) -> Generator[None]:
    """An error of the operating system is one line for people."""
    try:
        yield
    except OSError as error:
        remedy = "free space or give a folder that can be written"
        raise UserError(f"cannot write {path}: {error.strerror}; {remedy}") from error
