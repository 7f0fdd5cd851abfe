"""The micro-batches of a step: rows given to replicas, cut into passes, packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from puzzle.config.algorithm import PassesConfig
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.pipeline.pipeline import PipelineInput
from puzzle.model.packing import PackedBatch, pack
from puzzle.rlhf.balance import balanced, contiguous


class Rows(Protocol):
    """Knows where, in the packed sequences of some rows, the tokens before those to be predicted stand."""

    def states_N(self, rows: Sequence[int], width: int | None = None) -> Tensor:
        """int64 (N,); with `width`, every sequence is padded to it."""
        ...


def microbatches(
    rows: Sequence[int], lengths: Sequence[int], size: int | None = None, tokens: int | None = None
) -> list[list[int]]:
    """Cut `rows`, in order, into runs of at most `size` rows and at most `tokens` tokens; a longer row
    stands alone.

    `lengths` are the tokens of each of `rows`. None sets no limit. Every stage of a pipeline knows the
    lengths and comes to the same cut.
    """
    cut: list[list[int]] = []
    held = 0
    for row, length in zip(rows, lengths, strict=True):
        full = not cut or len(cut[-1]) == size or (tokens is not None and held + length > tokens)
        if full:
            cut.append([])
            held = 0
        cut[-1].append(row)
        held += length
    return cut


def members(units: Sequence[int], size: int) -> list[int]:
    """The rows of units of `size` rows each, unit by unit."""
    return [unit * size + place for unit in units for place in range(size)]


class MicroBatches:
    """The micro-batches of a replica's share of some rows of an experience, as packed batches.

    `rows` are those of each of its micro-batches, `own` all of them, `all_rows` of every replica's.
    `passes` is how many micro-batches every replica has, `tokens` how many tokens. Without
    `algorithm.packing` the sequences of a micro-batch are padded to `widths`, else those are None.
    """

    def __init__(
        self,
        model: ModelRuntime,
        rows: Sequence[int],
        sequences: Sequence[Sequence[int]],
        config: PassesConfig,
        together: int = 1,
    ) -> None:
        """`rows` are those of all replicas, `sequences` theirs, in their order. Every `together` of them stay
        in one pass and count as one row of `config.microbatch`."""
        dp = model.placement.layout.dp
        sizes = [len(sequence) for sequence in sequences]
        units = [sum(sizes[i : i + together]) for i in range(0, len(sizes), together)]
        given = balanced(units, dp) if config.balance else contiguous(len(units), dp)
        limits = (config.microbatch, config.microbatch_tokens)
        runs = [microbatches(part, [units[i] for i in part], *limits) for part in given]
        cuts = [[members(run, together) for run in cut] for cut in runs]
        shares = [members(part, together) for part in given]
        self.passes = [len(cut) for cut in cuts]
        self.tokens = [sum(sizes[i] for i in part) for part in shares]
        self.own = [rows[i] for i in shares[model.coord.d]]
        self.all_rows = [[[rows[i] for i in part] for part in cut] for cut in cuts]
        self.rows = self.all_rows[model.coord.d]
        self.batches: list[PackedBatch] = []
        self.widths: list[int | None] = []
        self._last: list[Tensor] = []
        for part in cuts[model.coord.d]:
            held = [sequences[i] for i in part]
            lengths = torch.tensor([len(sequence) for sequence in held])
            width = None if config.packing else int(lengths.max())
            if width:
                held = [[*sequence, *[0] * (width - len(sequence))] for sequence in held]
            batch = pack(held, model.stage.numerics.multiple, model.world.device)
            self.batches.append(batch)
            self.widths.append(width)
            starts = torch.tensor((0, *batch.lengths[:-1])).cumsum(0)
            self._last.append((starts + lengths - 1).to(model.world.device))

    def states_N(self, about: Rows, index: int) -> Tensor:
        """`states_N` of a micro-batch, on the device."""
        states_N = about.states_N(self.rows[index], self.widths[index])
        return states_N.to(self.batches[index].tokens_T.device)

    def last_rows(self, index: int) -> Tensor:
        """int64 (sequences,): where each sequence of a micro-batch ends."""
        return self._last[index]


@dataclass(frozen=True)
class Computation:
    """What a model is asked without learning: micro-batches, and how results make the answer for all rows."""

    input: PipelineInput
    answer: Callable[[list[Tensor]], Tensor]
