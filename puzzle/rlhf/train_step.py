"""The optimizer steps of one iteration: minibatches of its experience, each a step of every trained model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from puzzle.config.run import TrainConfig
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.pipeline.pipeline import PipelineInput
from puzzle.rlhf.algorithms.average import token_weights
from puzzle.rlhf.algorithms.base import Algorithm, Loss, Outputs, total
from puzzle.rlhf.algorithms.surrogate import Responses
from puzzle.rlhf.experience import Experience, minibatches
from puzzle.rlhf.first_step import FirstStep
from puzzle.rlhf.fusion import FusedPipeline
from puzzle.rlhf.microbatches import MicroBatches
from puzzle.rlhf.models import Models


class LossInputs(NamedTuple):
    """What the loss of a micro-batch reads, ready on the device before the pipeline starts.

    `sampled_N` are generation's log-probs, for the policy's first step where they are known.
    """

    states_N: Tensor
    targets_N: Tensor
    weights_N: Tensor
    fields: Mapping[str, Tensor]
    responses: Responses | None = None
    sampled_N: Tensor | None = None


class TrainStep:
    """The optimizer steps of one iteration; `metrics()` afterwards, on every rank."""

    def __init__(
        self,
        algorithm: Algorithm,
        models: Models,
        config: TrainConfig,
        experience: Experience,
        kl_coef: float,
        pipeline: FusedPipeline,
    ) -> None:
        self.algorithm, self.models, self.config = algorithm, models, config
        self.experience, self.kl_coef, self.pipeline = experience, kl_coef, pipeline
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._first = FirstStep(models.actor.world)
        # Tokens of the policy's slowest replica and of the average one, over all steps.
        self._slowest = self._average = 0.0

    def run(self, iteration: int, before_last: Callable[[], None] = lambda: None) -> None:
        """All epochs and minibatches; `before_last` is called before the last optimizer step."""
        size, seed, epochs = self.config.minibatch, self.config.seed, range(self.config.algorithm.epochs)
        count = len(self.experience)
        cuts = [rows for epoch in epochs for rows in minibatches(count, size, seed, iteration, epoch)]
        for number, rows in enumerate(cuts, 1):
            if number == len(cuts):
                before_last()
            self.pipeline.train(
                [self._input(role, model, rows) for role, model in self.models.trained.items()]
            )
            self._steps += 1

    def metrics(self) -> dict[str, float]:
        """The algorithm's metrics, mean losses over the steps and mean gradient norms; UserError for a norm
        that is not finite."""
        world = self.models.actor.world
        names = sorted(
            f"{role}.{name}" for role, own in self.algorithm.sums.items() for name in ("loss", *own)
        )
        zero = torch.zeros((), dtype=torch.float64, device=world.device)
        summed = world.sum(torch.stack([self._sums.get(name, zero).to(world.device) for name in names]))
        found = dict(zip(names, summed.tolist(), strict=True))
        out = {f"{role}_loss": found[f"{role}.loss"] / self._steps for role in self.models.trained}
        out |= self.algorithm.metrics(found)
        for role, model in self.models.trained.items():
            assert model.optimizer is not None
            norms = model.optimizer.pop_grad_norms()
            out[f"{role}_grad_norm"] = sum(norms) / len(norms)
        out["balance"] = self._slowest / self._average
        return out | self._first.metrics(clips="clipped" in self.algorithm.sums[self.algorithm.trained[0]])

    def _input(self, role: str, model: ModelRuntime, rows: Sequence[int]) -> PipelineInput:
        """The part of one model in the optimizer step on the minibatch `rows` (of all replicas)."""
        cut = MicroBatches(
            model, rows, [self.experience.sequence(row) for row in rows], self.config.algorithm
        )
        if role == self.algorithm.trained[0]:
            self._slowest += max(cut.tokens)
            self._average += sum(cut.tokens) / len(cut.tokens)
        last = model.coord.p == model.placement.layout.pp - 1
        inputs = [self._loss_inputs(role, cut, i) for i in range(len(cut.rows))] if last else []

        def loss_fn(index: int, hidden: Tensor) -> Tensor:
            given = inputs[index]
            outputs = self._outputs(model, hidden, given)
            about = (given.fields, given.weights_N, self.kl_coef, given.responses)
            found = self.algorithm.loss(role, outputs, *about)
            if model.owns_results:
                self._add(role, found)
                if outputs.logprobs is not None and self._steps == 0:
                    old_N, clipped = given.fields["old_logprobs"], found.sums.get("clipped")
                    self._first.note(outputs.logprobs.detach(), old_N, given.sampled_N, clipped)
            return found.loss

        return PipelineInput(model, cut.batches, loss_fn, max(cut.passes))

    def _outputs(self, model: ModelRuntime, hidden: Tensor, given: LossInputs) -> Outputs:
        if model.spec.head == "value":
            return Outputs(values=model.decoder.values(hidden)[given.states_N])
        stats = model.decoder.token_stats(
            hidden,
            given.states_N,
            given.targets_N,
            self.config.generation.temperature,
            entropy=self.algorithm.wants_entropy,
        )
        return Outputs(stats.logprobs, stats.entropy)

    def _loss_inputs(self, role: str, cut: MicroBatches, index: int) -> LossInputs:
        e, part = self.experience, cut.rows[index]
        fields = {}
        for name, attribute in self.algorithm.inputs(role).items():
            x_BS = getattr(e, attribute)
            assert x_BS is not None, f"{role} learns from {attribute}, which inference did not find"
            fields[name] = e.take_N(x_BS, part)
        states_N = cut.states_N(e, index)
        average, longest = self.config.algorithm.loss_average, self.config.generation.max_new_tokens
        weights_N = token_weights(e, cut.all_rows, part, average, longest, states_N.device)
        responses = sampled_N = None
        if self.algorithm.wants_responses:
            responses = Responses.of([e.tokens([row]) for row in part], states_N.device)
        if self._steps == 0 and "old_logprobs" in fields and e.sampled_logprobs_BS is not None:
            sampled_N = e.take_N(e.sampled_logprobs_BS, part)
        targets_N = e.targets_N(part).to(states_N.device)
        return LossInputs(states_N, targets_N, weights_N, fields, responses, sampled_N)

    def _add(self, role: str, found: Loss) -> None:
        for name, value in {"loss": found.loss, **found.sums}.items():
            key = f"{role}.{name}"
            self._sums[key] = self._sums.get(key, 0.0) + total(value)
