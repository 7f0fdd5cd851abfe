"""A supervised run: optimizer steps on batches of examples, and the loss of held-out ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from puzzle.config.resolve import Plan
from puzzle.config.supervised import SupervisedConfig
from puzzle.data.examples import Example
from puzzle.data.prepare import ExampleData, prepare_examples
from puzzle.engine.runtime.stage_timer import StageClock
from puzzle.engine.runtime.world import World
from puzzle.files.jsonio import Fields
from puzzle.rlhf.fusion import FusedPipeline
from puzzle.rlhf.metrics import device_flops, learning_rates, memory_metrics
from puzzle.rlhf.models import RunModels, build_runtimes
from puzzle.rlhf.preflight import check_memory
from puzzle.rlhf.recorder import Recorder
from puzzle.rlhf.session import Session, hold
from puzzle.rlhf.supervised.objectives import Totals, logprobs_R, make_objective
from puzzle.rlhf.supervised.step import ExamplePass, summed
from puzzle.rlhf.tracer import Tracer
from puzzle.runlog.records import STAGES, Iteration
from puzzle.spec.flops import train_flops


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
        self.objective = make_objective(self.config)
        self.pipeline = FusedPipeline(plan.training.fuse, [models.main])
        self.data = self._with_reference(data) if self.objective.wants_reference else data
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

    def remarks(self) -> Sequence[str]:
        """Examples that are left out."""
        return self.data.remarks

    def quality(self, metrics: Mapping[str, float]) -> float:
        """The lower the loss, the better."""
        return -metrics["loss"]

    def _with_reference(self, data: ExampleData) -> ExampleData:
        """All examples with what the model says of them as the run found it; in file order, so that a resumed
        run finds the same."""
        self.world.progress.mark("the reference's log-probs")
        train, held_out = data.train, data.held_out
        train.rows = self._referenced(train.rows)
        if held_out is not None:
            held_out = replace(held_out, examples=self._referenced(held_out.examples))
        return replace(data, held_out=held_out)

    def _referenced(self, examples: Sequence[Example]) -> tuple[Example, ...]:
        found: list[Example] = []
        for part in self._parts(examples):
            asked = self._pass(part, Totals.of(part))
            question = asked.scored(logprobs_R)
            (output,) = self.pipeline.infer([question.input])
            known = question.answer(output.results).tolist()
            size = asked.together
            found += [
                replace(example, reference=tuple(known[i * size : (i + 1) * size]))
                for i, example in enumerate(part)
            ]
        return tuple(found)

    def _pass(self, examples: Sequence[Example], totals: Totals) -> ExamplePass:
        return ExamplePass(self.objective, self.models.main, examples, totals, self.config.algorithm)

    def _parts(self, examples: Sequence[Example]) -> list[Sequence[Example]]:
        """Parts of a training batch, for which there is memory."""
        size = self.config.batch
        return [examples[start : start + size] for start in range(0, len(examples), size)]

    def iteration(self, iteration: int, recorder: Recorder) -> dict[str, float]:
        """One optimizer step; its metrics, equal on every rank."""
        model, epoch = self.models.main, self.data.train.epoch
        self.world.progress.mark(f"iteration {iteration}, training")
        clock = StageClock(self.world)
        self.tracer.start(iteration)
        examples = self.data.train.next()
        step = self._pass(examples, Totals.of(examples))
        self.pipeline.train([step.input])
        assert model.optimizer is not None, "the main model is trained"
        model.optimizer.release()
        clock.end("training")
        sums = summed(self.objective, model, [step])
        (norm,) = model.optimizer.pop_grad_norms()
        metrics = {f"{model.name}_loss": sums["loss"], **self.objective.metrics(sums)}
        metrics |= {f"{model.name}_grad_norm": norm, "balance": step.balance, "epoch": float(epoch)}
        metrics |= learning_rates(self.models.trained) | memory_metrics(self.world, clock.peaks)
        seconds, whole = clock.seconds(STAGES)
        metrics |= self._speed(examples, seconds["training"], whole)
        self.note_peaks(clock)
        recorder.write(Iteration(iteration, seconds, whole, metrics))
        self.tracer.read(iteration, clock, recorder)
        return metrics

    def _speed(self, examples: Sequence[Example], training: float, whole: float) -> dict[str, float]:
        """Tokens per second and device and, where a device's speed is known, the share of it that is used."""
        lengths = [len(sequence) for example in examples for sequence in example.sequences]
        found = {"tokens_per_device_second": sum(lengths) / whole / self.config.world}
        if (fastest := device_flops(self.world.device)) is not None:
            flops = train_flops(self.models.main.spec, lengths, Totals.of(examples).tokens)
            found["mfu_training"] = flops / training / self.config.world / fastest
        return found

    def held_out(self, done: int, recorder: Recorder) -> dict[str, float] | None:
        """Loss and metrics of the held-out examples."""
        if self.data.held_out is None:
            return None
        examples, model = self.data.held_out.examples, self.models.main
        totals = Totals.of(examples)
        passes = []
        for part in self._parts(examples):
            passes.append(self._pass(part, totals))
            self.pipeline.infer([passes[-1].input])
        sums = summed(self.objective, model, passes)
        return {"loss": sums["loss"], **self.objective.metrics(sums)}
