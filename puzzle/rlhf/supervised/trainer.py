"""A supervised run: optimizer steps on batches of examples, and the loss of held-out ones."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from puzzle.config.resolve import Plan
from puzzle.config.supervised import SupervisedConfig
from puzzle.data.prepare import ExampleData, prepare_examples
from puzzle.engine.runtime.stage_timer import StageClock
from puzzle.engine.runtime.world import World
from puzzle.files.jsonio import Fields
from puzzle.rlhf.fusion import FusedPipeline
from puzzle.rlhf.models import RunModels, build_runtimes
from puzzle.rlhf.preflight import check_memory
from puzzle.rlhf.recorder import Recorder
from puzzle.rlhf.session import Session, hold
from puzzle.rlhf.supervised.objectives import Totals, make_objective
from puzzle.rlhf.supervised.step import ExamplePass, summed
from puzzle.rlhf.tracer import Tracer
from puzzle.runlog.records import STAGES, Iteration


def learn(
    config: SupervisedConfig,
    out: Path,
    resume: bool = False,
    note: str = "",
    given: Mapping[str, Any] | None = None,
    moment: str | None = None,
) -> None:
    """One process of a run, as `session.hold` says. Raises UserError for what the user can mend."""

    def make(plan: Plan, began: datetime, world: World) -> SupervisedTrainer:
        data = prepare_examples(config, plan.main.spec.vocab_size, began)
        check_memory(plan, world)
        world.progress.mark("loading models")
        return SupervisedTrainer(plan, data, build_runtimes(plan, world), world)

    hold(config, out, make, resume, note, given, moment)


class SupervisedTrainer(Session):
    """One model that learns from examples: an iteration is an optimizer step on a batch of them."""

    config: SupervisedConfig

    def __init__(self, plan: Plan, data: ExampleData, models: RunModels, world: World) -> None:
        super().__init__(plan, models, world, data.endings)
        self.data = data
        self.objective = make_objective(self.config)
        self.pipeline = FusedPipeline(plan.training.fuse, [models.main])
        self.tracer = Tracer(
            world, self.config.log.trace, self.config.iterations, {"training": self.pipeline}
        )

    def state(self) -> dict[str, Any]:
        """All but weights and optimizers that a later iteration depends on, as JSON values."""
        return {**super().state(), "data": self.data.train.state()}

    def restore(self, state: Fields) -> None:
        """Go on where `state` was taken."""
        super().restore(state)
        self.data.train.restore(state.section("data").values)

    def quality(self, metrics: Mapping[str, float]) -> float:
        """The lower the loss, the better."""
        return -metrics["loss"]

    def iteration(self, iteration: int, recorder: Recorder) -> dict[str, float]:
        """One optimizer step; its metrics, equal on every rank."""
        model, epoch = self.models.main, self.data.train.epoch
        self.world.progress.mark(f"iteration {iteration}, training")
        clock = StageClock(self.world)
        self.tracer.start(iteration)
        examples = self.data.train.next()
        step = ExamplePass(self.objective, model, examples, Totals.of(examples), self.config.algorithm)
        self.pipeline.train([step.input])
        assert model.optimizer is not None, "the main model is trained"
        model.optimizer.release()
        clock.end("training")
        sums = summed(self.objective, model, [step])
        (norm,) = model.optimizer.pop_grad_norms()
        metrics = {f"{model.name}_loss": sums["loss"], **self.objective.metrics(sums)}
        metrics |= {f"{model.name}_grad_norm": norm, "balance": step.balance, "epoch": float(epoch)}
        seconds, whole = clock.seconds(STAGES)
        self.note_peaks(clock)
        recorder.write(Iteration(iteration, seconds, whole, metrics))
        self.tracer.read(iteration, clock, recorder)
        return metrics

    def held_out(self, done: int, recorder: Recorder) -> dict[str, float] | None:
        """Loss and metrics of the held-out examples, in parts of a training batch, for which there is
        memory."""
        if self.data.held_out is None:
            return None
        examples, size, model = self.data.held_out.examples, self.config.batch, self.models.main
        totals = Totals.of(examples)
        passes = []
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
            passes.append(ExamplePass(self.objective, model, part, totals, self.config.algorithm))
            self.pipeline.infer([passes[-1].input])
        sums = summed(self.objective, model, passes)
        return {"loss": sums["loss"], **self.objective.metrics(sums)}
