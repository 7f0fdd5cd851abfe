"""Numbers of a run for TensorBoard, wandb, mlflow and trackio, which can do it no harm.

Each tracker lives in a process of its own (`tracker_process`), so that one that raises, hangs or ends its
process costs the run nothing but the tracker.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from puzzle.errors import describe
from puzzle.runlog.records import Evaluation, Iteration

PATIENCE_SECONDS = 60.0
"""A tracker that takes longer than this for a line hangs."""
FINISH_SECONDS = 30.0
"""So long a tracker may send what it holds when the run has ended."""
MODULES = {name: ("accelerate", name) for name in ("tensorboard", "wandb", "mlflow", "trackio")}
"""What a tracker needs installed."""
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which accelerate would take the process for one of the run."""


class Tracker:
    """One tracker; nothing here waits for it but `close`, and nothing raises."""

    def __init__(self, settings: Mapping[str, Any], log: Path, patience: float = PATIENCE_SECONDS) -> None:
        """Starts its process with `settings`, JSON values; what the process says otherwise goes to `log`."""
        self.name = str(settings["name"])
        self._patience = patience
        self._error = ""
        self._sent: deque[float] = deque()
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        environment = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "puzzle.rlhf.tracker_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
            )
        threads = [threading.Thread(target=work, daemon=True) for work in (self._write, self._read)]
        self._reader = threads[1]
        for thread in threads:
            thread.start()
        self._send(settings)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step; those that are not finite are left out."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._send({"values": finite, "step": step})

    def _send(self, told: Mapping[str, Any]) -> None:
        self._sent.append(time.monotonic())
        self._lines.put(json.dumps(told))

    def _write(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError), self._process.stdin as pipe:
            for line in iter(self._lines.get, None):
                pipe.write(f"{line}\n".encode())
                pipe.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError, AttributeError, IndexError):
                self._error = self._error or json.loads(line).get("error", "")
                self._sent.popleft()

    def why_lost(self) -> str | None:
        """What became of the tracker, in one line, where it takes no more; its process is gone then."""
        if self._process.poll() is not None:
            self._reader.join(1.0)
            return self._error or f"its process ended with code {self._process.returncode}"
        if self._sent and time.monotonic() - self._sent[0] > self._patience:
            self._end()
            return f"it took nothing for {self._patience:g} s"
        return None

    def finish(self) -> None:
        """Nothing more is logged: it sends what it holds, and ends."""
        self._lines.put(None)

    def close(self, seconds: float) -> str | None:
        """Wait so many seconds for the end of what was told to finish; why it lost something, in one line."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._end()
            return f"it did not finish within {seconds:.0f} s"
        self._reader.join(1.0)
        return None if code == 0 else self._error or f"its process ended with code {code}"

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()


class Trackers:
    """All trackers of a run, used by one process. A tracker that is lost is told of once, by `lost`."""

    def __init__(
        self,
        names: Sequence[str],
        out: Path,
        project: str,
        run_id: str,
        config: Mapping[str, Any],
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        """Their processes write below the run's folder `out`, if anywhere on this host; runs are called as
        it."""
        told = {"project": project, "run": out.resolve().name, "run_id": run_id, "out": str(out.resolve())}
        settings = {**told, "config": dict(_flat(config))}
        self._alive: list[Tracker] = []
        self._unstarted: list[str] = []
        for name in names:
            try:
                log = out / "trackers" / f"{name}.txt"
                self._alive.append(Tracker({"name": name, **settings}, log, patience))
            except OSError as error:
                self._unstarted.append(_lost(name, describe(error)))

    def iteration(self, record: Iteration) -> None:
        """An iteration's metrics and seconds."""
        seconds = {f"seconds/{name}": value for name, value in record.stage_seconds.items()}
        metrics = {f"train/{name}": value for name, value in record.metrics.items()}
        seconds |= {f"speed/{name}": value for name, value in (record.speed or {}).items()}
        self._log({**metrics, **seconds, "seconds/e2e": record.e2e_seconds}, record.iteration)

    def evaluation(self, record: Evaluation) -> None:
        """Held-out metrics."""
        self._log({f"held out/{name}": value for name, value in record.metrics.items()}, record.iteration)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self._alive:
            tracker.log(values, step)

    def lost(self) -> list[str]:
        """A line for each tracker that was lost since the last call, and is left alone from now on."""
        found = {tracker: why for tracker in self._alive if (why := tracker.why_lost()) is not None}
        self._alive = [tracker for tracker in self._alive if tracker not in found]
        told, self._unstarted = self._unstarted, []
        return [*told, *(_lost(tracker.name, why) for tracker, why in found.items())]

    def close(self, seconds: float = FINISH_SECONDS) -> list[str]:
        """Let all of them finish within so many seconds together; a line for each that did not."""
        until = time.monotonic() + seconds
        for tracker in self._alive:
            tracker.finish()
        alive, self._alive = self._alive, []
        ends = [(tracker, tracker.close(max(0.0, until - time.monotonic()))) for tracker in alive]
        return [_lost(tracker.name, why) for tracker, why in ends if why is not None]


def _lost(name: str, why: str) -> str:
    return f"log.trackers: {name} is dropped: {why}"


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str | float | bool]]:
    """Settings by dotted key, as a tracker takes them."""
    for name, value in values.items():
        key = f"{above}{name}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{key}.")
        elif isinstance(value, (str, int, float)):
            yield key, value
        elif value is not None:
            yield key, json.dumps(value)
