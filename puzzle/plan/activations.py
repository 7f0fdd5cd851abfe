"""What the passes of a model save and need, in bytes, from shapes alone.

Activations are the tensors that the operations of `model.decoder` save for their backward passes, counted one
by one for full-length sequences; a schedule says for how many micro-batches at once. Suffixes in formulas:
T tokens of a pass, S = T/tp, D hidden, Q = H h/tp query columns, R = K h/tp key columns, F ffn columns/tp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from puzzle.plan.layout import Coord, Layout, Placement
from puzzle.plan.shards import adapted, local_params
from puzzle.spec.model import ModelSpec
from puzzle.spec.tensors import VocabSplit

FP32 = 4
PARTS = (1, 2, 4, 8)
"""Into which invariant numerics may cut sums; tensor ranks have whole ones."""
LOGITS_BLOCK = 1 << 24
"""Most fp32 logits in one tensor (`model.logprobs.BLOCK`)."""


@dataclass(frozen=True)
class Use:
    """One model of a run. `itemsize` is bytes per weight; `fused`: norms are single kernels (CUDA);
    `compiled`: layers run through torch.compile. `offload`: optimizer states, or the weights of a model that
    is not trained, are on the host where they are not needed. `split`: pipelines compute weights' gradients
    apart (`intra.split_backward`). `borrowed`: its weights are those of another model of the run. `merged`:
    the host keeps the matrices that adapters are added to for a while. `parts`: those of invariant numerics;
    None: they are fast."""

    name: str
    spec: ModelSpec
    placement: Placement
    itemsize: int
    trained: bool = False
    recompute: bool = False
    fused: bool = True
    compiled: bool = False
    offload: bool = False
    split: bool = False
    borrowed: bool = False
    merged: bool = False
    parts: int | None = None


@lru_cache
def storages(
    spec: ModelSpec, layout: Layout, p: int, which: Literal["all", "trained", "adapted"] = "all"
) -> tuple[tuple[int, int], ...]:
    """Rows and elements per row of a stage's storages, which are alike for all t and d: of all, of those that
    are trained, or of those that have adapters."""
    params = local_params(spec, layout, Coord(0, p, 0))
    if which == "adapted":
        params = tuple(matrix for matrix, _ in adapted(params))
    return tuple((param.rows, param.row_size) for param in params if which != "trained" or param.trained)


@lru_cache
def adapter_sizes(spec: ModelSpec, tp: int) -> tuple[int, int, int]:
    """Elements that a layer's adapters save: for each token of a pass, for each of the rank's own tokens, and
    at any rate."""
    one = Layout(tp, 1, 1, (1,))
    whole = own = spread = 0
    for matrix, b in adapted(local_params(replace(spec, num_layers=1), one, Coord(0, 0, 0))):
        columns = len({piece.tensor for piece in b.pieces}) * b.row_size
        if matrix.transposed:
            own += columns
        else:
            whole += columns
            spread += 0 if b.shape == (matrix.rows, columns) else matrix.rows * columns
    return whole, own, spread


class Activations:
    """What one micro-batch of `tokens` tokens, `answers` of them answers, costs on a stage."""

    def __init__(self, use: Use, p: int, tokens: int, answers: int) -> None:
        spec, layout = use.spec, use.placement.layout
        self.use, self.p, self.answers, self.item = use, p, answers, use.itemsize
        self.T = -(-tokens // layout.tp) * layout.tp
        self.S = self.T // layout.tp
        self.D, self.F = spec.hidden_size, spec.intermediate_size // layout.tp
        self.heads = spec.num_heads // layout.tp
        self.kv_heads = max(1, spec.num_kv_heads // layout.tp)
        self.Q, self.R = self.heads * spec.head_dim, self.kv_heads * spec.head_dim
        self.rows = VocabSplit.chunk(spec.vocab_size, layout.tp) if spec.head == "lm" else spec.num_labels
        self.first, self.last = p == 0, p == layout.pp - 1

    def norm(self, rows: int, width: int) -> int:
        """What a norm saves but for the result: its input, and the factor of each row.

        Step by step it is computed in fp32: a converted input, and the result before the weight, which only
        the weight's gradient reads.
        """
        steps = FP32 if self.use.spec.lora is not None else 2 * FP32
        saved = self.item if self.use.fused else steps
        return rows * width * saved + rows * FP32

    def layer(self) -> int:
        """What one layer saves: two norms and their results, queries, keys, values, attention's result with
        a factor per head, gate and up, the activated gate (kernels compute it again), the product."""
        norms = 2 * (self.norm(self.S, self.D) + self.S * self.D * self.item)
        columns = 2 * (self.Q + self.R)
        if not self.use.fused or self.use.spec.qk_norm:
            columns += self.Q + self.R  # values are a view of all columns of their product, so that it stays
        attention = self.T * (columns * self.item + self.heads * FP32)
        if self.use.spec.qk_norm:
            attention += self.norm(self.T, self.Q + self.R) - self.T * (self.Q + self.R) * (self.item)
        ffn = self.T * (3 if self.use.fused or self.use.compiled else 4) * self.F * self.item
        return norms + attention + ffn + self.adapters()

    def adapters(self) -> int:
        """What a layer's adapters save besides: what A gave, and B by columns of projections (`Adapter`)."""
        whole, own, spread = adapter_sizes(self.use.spec, self.use.placement.layout.tp)
        return (self.T * whole + self.S * own + spread) * self.item

    def saved(self) -> int:
        """From a forward to its backward pass on this stage."""
        layers = self.use.placement.layout.stage_layers[self.p]
        rotation = 2 * self.T * self.use.spec.head_dim * self.item
        total = rotation + layers * (self.S * self.D * self.item if self.use.recompute else self.layer())
        if self.first:
            total += self.T * (8 if self.use.placement.layout.tp == 1 else 9)
        if not self.last:
            return total + self.S * self.D * self.item
        total += self.norm(self.S, self.D)
        if self.use.spec.head == "value":
            return total + self.S * self.D * FP32
        return total + self.answers * (self.D * self.item + 6 * FP32)

    def deferred(self) -> int:
        """Between the parts of a split backward: what the four matrices of every layer multiplied, and the
        gradients of their results. Matrices that lie by rows see the whole pass's."""
        width = 2 * self.Q + 2 * self.R + 3 * self.F + 2 * self.D
        layer = self.item * (2 * self.S * self.D + self.T * width)
        return self.use.placement.layout.stage_layers[self.p] * layer

    def held(self, before: int, between: int) -> int:
        """Of `before` micro-batches before their backward and, where that is split, of `between` waiting for
        their weights' gradients; right after the first part of a backward they are one less and one more."""
        saved, deferred = self.saved(), self.deferred()
        if not self.use.split or self.use.placement.layout.pp == 1:
            return before * saved
        return before * saved + between * deferred + max(0, deferred - saved)

    def logits(self) -> int:
        """Blocks of fp32 logits, the gradients of the head and of what it reads; only on the last stage."""
        if not self.last or self.use.spec.head == "value":
            return 0
        block = FP32 * min(LOGITS_BLOCK, self.answers * self.rows)
        if not self.use.trained:
            return 2 * block
        gradients = self.answers * self.D * (FP32 + self.item)
        if self.use.parts:  # a sum of each of the rank's parts, a product that is added to one, all tokens'
            here = self.use.parts // self.use.placement.layout.tp
            gradients += (here * self.answers + self.T) * self.D * FP32
        if self.use.spec.lora is None:
            gradients += self.rows * self.D * self.item
        return max(2 * block, block + block * self.item // FP32 + gradients)

    def transient(self) -> int:
        """Of one layer in its backward pass: two widths of the ffn more than what it saved and frees, hidden
        states, a layer to recompute; the gradient of the largest weight, unless its product adds it up."""
        layout = self.use.placement.layout
        largest = 0
        if not self.use.fused and self.item != FP32:
            trained = storages(self.use.spec, layout, self.p, "trained")
            largest = max(rows * size for rows, size in trained) * self.item
        hidden = self.T * self.D * self.item if layout.tp > 1 else 0
        hidden = max(hidden, self.partial())
        gradients = (2 * self.T * self.F + 2 * self.S * self.D) * self.item + hidden
        return gradients + largest + (self.layer() if self.use.recompute else 0)

    def partial(self) -> int:
        """Of a product that tensor parallelism cuts, under invariant numerics: the float32 sum of the rank's
        parts, sums of some of them that wait if there are more than two, and what ranks send each other."""
        layout = self.use.placement.layout
        here = (self.use.parts or 1) // layout.tp
        sums = here.bit_length() - 1 if here > 2 else 0
        if self.use.parts and layout.tp > 1:
            sums += 2
        return sums * self.T * self.D * FP32

    def passing(self) -> dict[str, int]:
        """What comes and goes in a backward pass."""
        return worst([{"logits": self.logits()}, {"one layer": self.transient()}])

    def forward(self) -> int:
        """Of a pass without gradients: a layer's hidden states, and the widest it has at a time."""
        ffn, attention = (3 if self.use.fused else 4) * self.F, 3 * self.Q + 3 * self.R
        gathered = self.T * self.D if self.use.placement.layout.tp > 1 else 0
        widest = self.item * self.T * max(ffn, attention)
        added = self.item * self.T * max(self.F, self.Q) + self.partial() if self.partial() else 0
        return self.item * (4 * self.S * self.D + gathered) + max(widest, added)


def worst(cases: Sequence[dict[str, int]]) -> dict[str, int]:
    """Of things that follow one another, the terms of the one that needs most; none where nothing follows."""
    return max(cases, key=lambda terms: sum(terms.values()), default={})
