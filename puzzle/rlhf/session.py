"""A run from its first process call to its last model: what every kind of training shares.

    plan -> models -> [checkpoint] -> evaluation -> iteration, evaluation, checkpoint, ... -> last models

A `Session` says what an iteration and an evaluation are; `hold` starts the process's part of it.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from puzzle.config import memory_report as footprint
from puzzle.config.base import RunConfig
from puzzle.config.resolve import Plan, resolve
from puzzle.data.endings import Endings
from puzzle.engine.checkpoint.checkpoint import Checkpoints
from puzzle.engine.runtime.stage_timer import StageClock
from puzzle.engine.runtime.watchdog import Watch
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.files.jsonio import Fields
from puzzle.launch import local
from puzzle.rlhf.models import RunModels
from puzzle.rlhf.preflight import agree, refuse_replacing
from puzzle.rlhf.provenance import run_header
from puzzle.rlhf.recorder import Recorder, Resumed, describe_rank
from puzzle.runlog.records import Evaluation


class Session(ABC):
    """Iterations with evaluations and checkpoints between them; equal calls on every rank."""

    def __init__(self, plan: Plan, models: RunModels, world: World, endings: Endings) -> None:
        """`endings` are those that saved models are told."""
        self.config, self.models, self.world, self._endings = plan.config, models, world, endings
        self.best = -math.inf
        self.done = 0
        self._saved = -1
        self._peaks: dict[str, int] = {}

    def state(self) -> dict[str, Any]:
        """All but weights and optimizers that a later iteration depends on, as JSON values."""
        return {"best": self.best if math.isfinite(self.best) else None}

    def restore(self, state: Fields) -> None:
        """Go on where `state` was taken. UserError where it cannot be gone on from."""
        self.best = -math.inf if state.values.get("best") is None else state.number("best")

    @abstractmethod
    def iteration(self, iteration: int, recorder: Recorder) -> dict[str, float]:
        """One iteration; its metrics, equal on every rank."""

    @abstractmethod
    def held_out(self, done: int, recorder: Recorder) -> dict[str, float] | None:
        """Held-out metrics after `done` iterations, with samples written; None without held-out data."""

    @abstractmethod
    def quality(self, metrics: Mapping[str, float]) -> float:
        """How good a model with these held-out metrics is; the best one may be kept."""

    def remarks(self) -> Sequence[str]:
        """What people should know of the data before the first iteration."""
        return ()

    def stops(self, metrics: Mapping[str, float]) -> str | None:
        """Why the run ends after an iteration with these metrics; None: it goes on."""
        return None

    def resume(self, checkpoints: Checkpoints) -> Resumed:
        """Go on from the last whole checkpoint, or from the start where there never was one."""
        restored = checkpoints.restore()
        if restored is None:
            refuse_replacing(checkpoints.folder, self.world)
            return Resumed(notes=("there is no checkpoint to resume from: the run begins again",))
        state = Fields(restored.state, f"{restored.folder}: state")
        self.restore(state)
        self.done = self._saved = restored.number
        return Resumed(restored.number, restored.folder, restored.notes)

    def run(self, recorder: Recorder, checkpoints: Checkpoints) -> None:
        """All iterations, with evaluations and checkpoints between them."""
        recorder.ranks(describe_rank(self.models, self.world, self._peaks))
        if not self.done:
            for remark in self.remarks():
                recorder.warn(remark)
            self._evaluate(0, recorder)
        for iteration in range(self.done, self.config.iterations):
            with recorder.profiled(iteration):
                metrics = self.iteration(iteration, recorder)
            self.done = done = iteration + 1
            every = self.config.eval.every
            if every and done % every == 0:
                self._evaluate(done, recorder)
            self._save(recorder, checkpoints)
            recorder.sync()
            if (why := self.stops(metrics)) is not None:
                recorder.note = why
                break
        self.world.progress.mark("saving the models")
        if self.config.checkpoint.save and self._saved != self.done:
            self._begin_state(checkpoints)  # a run that has ended can go on, too
        for role, model in self.models.trained.items():
            name = "last" if model is self.models.main else f"last-{role}"
            recorder.save(model, name, self.done, self._endings)
        checkpoints.wait()
        recorder.states(checkpoints.finished())
        recorder.ranks(describe_rank(self.models, self.world, self._peaks))

    def note_peaks(self, clock: StageClock) -> None:
        """Keep the most memory that any iteration's stages took."""
        self._peaks |= {stage: max(size, self._peaks.get(stage, 0)) for stage, size in clock.peaks.items()}

    def _evaluate(self, done: int, recorder: Recorder) -> None:
        if not self.config.eval.every:
            return
        self.world.progress.mark(f"evaluation after {done} iterations")
        metrics = self.held_out(done, recorder)
        if metrics is None:
            return
        recorder.write(Evaluation(done, metrics))
        quality = self.quality(metrics)
        if self.config.checkpoint.best and quality > self.best:
            recorder.save(self.models.main, "best", done, self._endings)
        self.best = max(self.best, quality)

    def _save(self, recorder: Recorder, checkpoints: Checkpoints) -> None:
        """Begin a checkpoint where one is due, log those that became complete."""
        self.world.progress.mark("saving")
        recorder.states(checkpoints.finished())
        options = self.config.checkpoint
        if options.save and options.every and self.done % options.every == 0:
            self._begin_state(checkpoints)
            if self.done < self.config.iterations:
                recorder.save(self.models.main, f"iteration-{self.done}", self.done, self._endings)

    def _begin_state(self, checkpoints: Checkpoints) -> None:
        checkpoints.save(self.done, self.state())
        self._saved = self.done


Make = Callable[[Plan, datetime, World], Session]
"""Makes a session with its models from the plan, the time that the run began, and the world."""


def hold(
    config: RunConfig,
    out: Path,
    make: Make,
    resume: bool = False,
    note: str = "",
    given: Mapping[str, Any] | None = None,
    moment: str | None = None,
    longest: float = 0.0,
    held: AbstractContextManager[object] | None = None,
) -> None:
    """One process of a run; all of them call this. With `resume`, the run in `out` goes on; `note`: why.

    `given` is what the user gave of the configuration, `moment` when the run began (ISO 8601): chat templates
    write that date, on every rank and after every resume. `longest` seconds may a rank compute for others
    without a sign of life; `held` is left before the world is. Raises UserError for what the user can mend.
    """
    began = datetime.now().astimezone() if moment is None else datetime.fromisoformat(moment)
    watch = Watch(config.launch.watchdog, local.report, out / "ranks", longest)
    with (
        World.start(config.device, watch=watch, share_device=config.launch.share_device) as world,
        held or nullcontext(),
    ):
        plan = resolve(config, max(world.gather(world.per_node)), given)
        try:
            agree(plan, world)
            session = make(plan, began, world)
            checkpoints = _checkpoints(config, out, session.models)
            resumed = session.resume(checkpoints) if resume else None
            if resumed is not None and note:
                resumed = dataclasses.replace(resumed, notes=(note, *resumed.notes))
            header = run_header(plan, {"device": _device_name(world), "processes": world.size})
            header = dataclasses.replace(header, started=began.isoformat(timespec="seconds"))
            with Recorder(out, config, world, header, resumed) as recorder:
                session.run(recorder, checkpoints)
        except torch.OutOfMemoryError as error:
            ranks = footprint.estimate(plan, world.device.type == "cuda", world.device_memory)
            print(footprint.table(ranks), file=sys.stderr)
            reason = str(error).splitlines()[0].partition(". ")[0]
            remedy = footprint.remedy(ranks[world.rank])
            raise UserError(f"{reason} on rank {world.rank}; {remedy}") from error


def _checkpoints(config: RunConfig, out: Path, models: RunModels) -> Checkpoints:
    options = config.checkpoint
    return Checkpoints(
        out / "checkpoints", tuple(models.trained.values()), options.keep, options.asynchronous
    )


def _device_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
