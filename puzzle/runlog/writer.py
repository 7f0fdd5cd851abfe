"""Writes the log of a run: `run.jsonl` for programs, `run.log` for people, `samples.jsonl` for texts."""

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from puzzle.errors import UserError
from puzzle.files import durable
from puzzle.runlog import records
from puzzle.runlog.past import differences, past_of, read_records
from puzzle.runlog.published import lines
from puzzle.runlog.run import STAGES, RunHeader

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
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            size = os.fstat(self._descriptor).st_size
            self._torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"
        except OSError as error:
            raise _cannot_write(path, error) from error

    def append(self, text: str) -> None:
        """Add one line, or several at once; `text` has no newline at its end."""
        data = (("\n" if self._torn else "") + text + "\n").encode("utf-8", "backslashreplace")
        self._torn = True
        try:
            with self._gate:
                while data:
                    data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._torn = False

    def sync(self) -> None:
        """Bring what was written to the disk."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class RunWriter:
    """The log of one run in `out_dir`, written by one process (rank 0).

    With `resume`, a log that is already there goes on: its header stands, and `resume()` says what differs.

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
        try:
            durable.make_folder(out_dir)
            old = read_records(out_dir / "run.jsonl")
        except OSError as error:
            raise _cannot_write(out_dir, error) from error
        if old and not resume:
            raise UserError(f"{out_dir} already holds a run; give another folder, or resume that run")
        # JSON turns tuples into lists: compare what the file would hold.
        new = json.loads(records.encode({**records.of_header(header), "seq": 0}))
        first = self._adopt(old, new)
        self._files = {
            name: LineFile(out_dir / name, gate) for name in ("run.jsonl", "run.log", "samples.jsonl")
        }
        if first:
            self._write(
                "run", **{key: value for key, value in new.items() if key not in ("record", "seq", "crc")}
            )
            self._say(f"run {header.run_id} ({header.provenance}): {header.variant} {header.pair}")
        self.sync()
        try:
            durable.sync(out_dir)  # the names of the files
        except OSError as error:
            raise _cannot_write(out_dir, error) from error

    def _adopt(self, old: list[dict[str, Any]], new: Mapping[str, Any]) -> bool:
        """Go on with the log of an earlier process; True if it holds no header yet."""
        self._seq = max((record["seq"] for record in old), default=-1) + 1
        past = past_of(old)
        if past is None:
            return True
        found = past.run
        for name in _IDENTITY:
            if found[name] != new[name]:
                raise UserError(
                    f"{self.out_dir} holds a run with {name} {found[name]!r}, not {new[name]!r}; "
                    "resume with the same, or give another folder"
                )
        self.run_id = found["run_id"]
        may_change = [name for name in _MAY_CHANGE if name in new]
        self._changed = {name: new[name] for name in may_change if new[name] != found.get(name)}
        self.settings = differences(past.config, new["config"])
        return False

    def rank(
        self,
        rank: int,
        *,
        coordinates: Mapping[str, Any] | None = None,
        parameter_bytes: int | None = None,
        device: str | None = None,
        collective_bytes: Mapping[str, int] | None = None,
        peak_bytes: Mapping[str, int] | None = None,
        device_bytes: Mapping[str, int] | None = None,
    ) -> None:
        """What one rank is and holds; at the end once more with the bytes it moved per collective kind, and
        on a GPU the memory it took."""
        self._write(
            "rank",
            rank=rank,
            coordinates=coordinates,
            parameter_bytes=parameter_bytes,
            device=device,
            collective_bytes=collective_bytes,
            peak_bytes=peak_bytes,
            device_bytes=device_bytes,
        )

    def stage(self, name: str, schedule: str, hash: str, **fields: Any) -> None:
        """Which schedule a stage executes: `actions` per kind, `flushes`, `bubble_share`, what is known."""
        self._write("stage", name=name, schedule=schedule, hash=hash, **fields)

    def simulation(self, iteration: int, stage: str, seconds: Mapping[str, float]) -> None:
        """Seconds of one round of a stage by simulation, with an iteration's costs: `apart` and `fused`."""
        self._write("simulation", iteration=iteration, stage=stage, seconds=dict(seconds))

    def iteration(
        self,
        iteration: int,
        stage_seconds: Mapping[str, float],
        e2e_seconds: float,
        metrics: Mapping[str, float],
    ) -> None:
        """One finished iteration. Stages are exclusive and add up to `e2e_seconds` within 1e-6 of it.

        A metric that is NaN or infinite becomes null, and a warning. Raises ValueError for other faults.
        """
        stages = {name: float(stage_seconds[name]) for name in STAGES if name in stage_seconds}
        if set(stages) != set(stage_seconds):
            raise ValueError(
                f"stage_seconds knows {', '.join(STAGES)}, not {sorted(set(stage_seconds) - set(STAGES))}"
            )
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        e2e = float(e2e_seconds)
        self._write("iteration", iteration=iteration, stage_seconds=stages, e2e_seconds=e2e, metrics=finite)
        for name in (name for name, value in finite.items() if value is None):
            self.warning(f"{name} is {values[name]}", iteration=iteration)
        self._seconds.append(e2e)
        total, batch = self._header.config["iterations"], self._header.config["global_batch_size"]
        if self._header.variant == "dschat":
            mean = math.fsum(self._seconds) / len(self._seconds)
            self._say(lines.chat_lines(iteration, total, batch, stages, e2e, values, mean))
            return
        if stages["switch"] > 0:
            self._say(lines.reshard_line(stages["switch"]))
        self._say(lines.puzzle_line(iteration, total, batch, stages, e2e, values))

    def evaluation(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Held-out metrics (`reward`, ...) of the policy after `iteration` iterations; NaN becomes null."""
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._write("evaluation", iteration=iteration, metrics=finite)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._say(f"held out after {iteration} iterations: {shown}")

    def switch(self, iteration: int, seconds: float, **fields: Any) -> None:
        """One change of layout: `bytes`, `lower_bound_bytes`, `local_share`, and what else is known."""
        self._write("switch", iteration=iteration, seconds=float(seconds), **fields)

    def offload(self, iteration: int, seconds: float, **fields: Any) -> None:
        """What an iteration moved to the host and back: `copy_seconds`, `bytes`."""
        self._write("offload", iteration=iteration, seconds=float(seconds), **fields)

    def checkpoint(self, iteration: int, path: str, **fields: Any) -> None:
        """A complete checkpoint after `iteration`: `seconds`, `bytes`."""
        self._write("checkpoint", iteration=iteration, path=path, **fields)
        self._say(f"checkpoint after iteration {iteration}: {path}")

    def resume(self, iteration: int, checkpoint: str | None = None) -> None:
        """The run goes on; `iteration` is the first one to come. Differences to the header are recorded."""
        self._write("resume", iteration=iteration, checkpoint=checkpoint, changed=self._changed)
        self._say(f"resumed at iteration {iteration} from {checkpoint}")

    def warning(self, text: str, iteration: int | None = None) -> None:
        """Something that people should know."""
        self._write("warning", text=text, iteration=iteration)
        self._say(f"warning: {text}" + ("" if iteration is None else f" (iteration {iteration})"))

    def trace(self, path: str, iteration: int | None = None) -> None:
        """A file with a timeline."""
        self._write("trace", path=path, iteration=iteration)

    def sample(self, iteration: int, prompt: str, response: str, **fields: Any) -> None:
        """One prompt with its response, e.g. with `score`, into `samples.jsonl`."""
        known = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in fields.items()
        }
        sample = {"iteration": iteration, "prompt": prompt, "response": response, **known}
        self._files["samples.jsonl"].append(json.dumps(sample, ensure_ascii=False, allow_nan=False))

    def end(self, status: str, text: str | None = None) -> None:
        """The run is over: `completed`, `failed` or `interrupted`; closes the log."""
        self._write("end", status=status, text=text)
        self._say(f"end: {status}" + ("" if text is None else f": {text}"))
        self.sync()
        self.close()

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _say(self, text: str) -> None:
        self._files["run.log"].append(text)

    def _write(self, kind: str, **fields: Any) -> None:
        kept = {name: value for name, value in fields.items() if value is not None or kind == "run"}
        record = {"record": kind, "seq": self._seq, "time": round(time.time(), 3), **kept}
        line = records.encode(record)
        # Before the write: a line that tears must not leave its number to the next one.
        self._seq += 1
        self._files["run.jsonl"].append(line)


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path}: {error.strerror}; free space or give a folder that can be written"
    )
