"""Some examples through a model: what a pipeline needs of them, and the sums of their losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from puzzle.config.algorithm import PassesConfig
from puzzle.data.examples import Example
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.pipeline.pipeline import PipelineInput
from puzzle.model.decoder import Decoder
from puzzle.rlhf.algorithms.base import total
from puzzle.rlhf.algorithms.surrogate import Responses
from puzzle.rlhf.microbatches import Computation, MicroBatches
from puzzle.rlhf.supervised.objectives import Objective, Places, Totals


class Sequences:
    """The sequences of some examples as rows, those of an example one after the other."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.rows = [sequence for example in examples for sequence in example.sequences]

    def states_N(self, rows: Sequence[int], width: int | None = None) -> Tensor:
        """int64 (N,): where, in the packed sequences of `rows`, the token before each learned one stands.
        With `width`, every sequence is padded to it."""
        places: list[int] = []
        start = 0
        for row in rows:
            places += [start + place - 1 for place in self.rows[row].learned]
            start += width or len(self.rows[row])
        return torch.tensor(places, dtype=torch.int64)

    def targets_N(self, rows: Sequence[int]) -> Tensor:
        """int64 (N,): the learned tokens of `rows`."""
        found = [self.rows[row].tokens[place] for row in rows for place in self.rows[row].learned]
        return torch.tensor(found, dtype=torch.int64)


class ExamplePass:
    """Examples of all replicas, given to them and cut into passes; `input` runs them, with gradients or
    without, after which `sums` has what this rank speaks for: float64, 0-d."""

    def __init__(
        self,
        objective: Objective,
        model: ModelRuntime,
        examples: Sequence[Example],
        totals: Totals,
        passes: PassesConfig,
    ) -> None:
        """The loss is the share of these examples in the mean over `totals`."""
        self.objective, self.model, self.totals, self.examples = objective, model, totals, examples
        self.sequences = Sequences(examples)
        rows = self.sequences.rows
        tokens = [sequence.tokens for sequence in rows]
        self.together = len(examples[0].sequences)
        self.cut = MicroBatches(model, range(len(rows)), tokens, passes, self.together)
        self.sums: dict[str, Tensor] = {}
        # Ready before the pipeline starts, which a copy from the host would stop.
        self._places = [self._of(i) for i in range(len(self.cut.rows))] if model.stage.last else []

    @property
    def input(self) -> PipelineInput:
        """For `Pipeline.train` or `Pipeline.infer`."""
        return PipelineInput(self.model, self.cut.batches, self._loss, max(self.cut.passes))

    def scored(self, output: Callable[[Decoder, Tensor, Places], Tensor]) -> Computation:
        """What `output` makes of each sequence, (R,) of a micro-batch: float32 (rows,) for all of them, those
        of an example one after the other, equal on every rank."""
        model, count = self.model, len(self.sequences.rows)

        def output_fn(index: int, hidden: Tensor) -> Tensor:
            return output(model.decoder, hidden, self._places[index])

        def answer(results: list[Tensor]) -> Tensor:
            own = torch.cat(results) if model.owns_results and results else None
            return model.collect(own, self.cut.own, (count,))

        return Computation(PipelineInput(model, self.cut.batches, output_fn, max(self.cut.passes)), answer)

    @property
    def balance(self) -> float:
        """Tokens of the replica that has most, over those of the average one."""
        return max(self.cut.tokens) * len(self.cut.tokens) / sum(self.cut.tokens)

    def _of(self, index: int) -> Places:
        part, device = self.cut.rows[index], self.model.world.device
        examples = [self.examples[row // self.together] for row in part[:: self.together]]
        known = [value for example in examples for value in example.reference]
        return Places(
            self.cut.states_N(self.sequences, index),
            self.sequences.targets_N(part).to(device),
            self.cut.last_rows(index),
            Responses.of([len(self.sequences.rows[row].learned) for row in part], device),
            torch.tensor([example.margin for example in examples], device=device),
            torch.tensor(known, dtype=torch.float64, device=device),
        )

    def _loss(self, index: int, hidden: Tensor) -> Tensor:
        found = self.objective.loss(self.model.decoder, hidden, self._places[index], self.totals)
        if self.model.owns_results:
            for name, value in {"loss": found.loss, **found.sums}.items():
                self.sums[name] = self.sums.get(name, 0.0) + total(value)
        return found.loss


def summed(objective: Objective, model: ModelRuntime, passes: Sequence[ExamplePass]) -> dict[str, float]:
    """The sums of some passes over all replicas, `loss` among them; equal on every rank."""
    world, names = model.world, ("loss", *objective.sums)
    zero = torch.zeros((), dtype=torch.float64, device=world.device)
    own = [torch.stack([one.sums.get(name, zero) for one in passes]).sum() for name in names]
    return dict(zip(names, world.sum(torch.stack(own)).tolist(), strict=True))
