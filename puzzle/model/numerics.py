"""How a stage computes: `Fast`, or `Invariant`, where numbers do not depend on the layout (docs/numerics.md).

Both have the same methods, and a `Decoder` calls no others. Suffixes: T packed tokens, B rows, D hidden, H
query heads, K key/value heads, h head_dim, N chosen tokens, V vocabulary rows here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.model import attention, linear, logprobs, parallel
from puzzle.model.attention import Slots
from puzzle.model.invariant import attention as steady_attention
from puzzle.model.invariant import linear as steady_linear
from puzzle.model.invariant import logprobs as steady_logprobs
from puzzle.model.invariant import pointwise as steady_pointwise
from puzzle.model.invariant.products import SIDE, accumulate, product
from puzzle.model.invariant.sums import over_tokens
from puzzle.model.linear import Accumulate
from puzzle.model.logprobs import TokenStats
from puzzle.model.packing import DecodeBatch, PackedBatch
from puzzle.model.parallel import TensorGroup
from puzzle.model.peer_sums import Part
from puzzle.model.pointwise import Pointwise, has_kernels, kernels, training_kernels


@dataclass(frozen=True)
class Fast:
    """The quickest kernel for each shape; sums in the order that a layout suggests."""

    group: TensorGroup

    @property
    def multiple(self) -> int:
        """What the tokens of a packed pass are rounded up to."""
        return self.group.size

    @property
    def accumulate(self) -> Accumulate:
        """How a weight's gradient is added up."""
        return linear.accumulate

    def pointwise(self, device: torch.device, plain: Pointwise) -> Pointwise:
        """What layers compute between matrices; `plain` where no kernel does."""
        if not has_kernels(device):
            return plain
        return training_kernels(plain) if torch.is_grad_enabled() else kernels()

    def column(self, x: Tensor, weight: Tensor, bias: Tensor | None, sharded: bool) -> Tensor:
        """`parallel.column_linear`."""
        return parallel.column_linear(x, weight, bias, self.group, sharded)

    def gates(self, x: Tensor, weight: Tensor, blocks: int) -> Tensor | None:
        """`linear.gates`: silu(gate) * up of the own columns, for the rows of a decode pass."""
        return linear.gates(x, weight, blocks)

    def norms_in_products(self, rows: int, columns: Sequence[Tensor], inward: Sequence[Tensor]) -> bool:
        """`linear.norms`: whether products of these matrices do the norms between them, too."""
        return self.group.size == 1 and linear.norms(rows, columns, inward)

    def row(self, x: Tensor, weight_transposed: Tensor, sharded: bool) -> Tensor:
        """x @ weight, summed over the group: the own T/tp rows if `sharded`, else all."""
        return self.group.combine(linear.linear(x, weight_transposed, transposed=True), sharded)

    def row_later(self, x: Tensor, weight_transposed: Tensor) -> Tensor | Part:
        """`row` of a decode pass, or what is left of it to sum where it is added to the residual."""
        return self.group.combine_later(linear.linear(x, weight_transposed, transposed=True))

    def plus(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (T/tp or B, D) + a bias that all tensor ranks hold."""
        return x + bias

    def packed_attention(
        self, q_THh: Tensor, k_TKh: Tensor, v_TKh: Tensor, batch: PackedBatch, window: int | None
    ) -> Tensor:
        """`attention.packed_attention`."""
        return attention.packed_attention(q_THh, k_TKh, v_TKh, batch, window)

    def decode_attention(self, q_BHh: Tensor, slots: Slots, batch: DecodeBatch, window: int | None) -> Tensor:
        """One query per row against the row's cached tokens, its own included. Returns (B, H, h)."""
        return attention.decode_attention(q_BHh, *slots.read(batch.reach), batch.mask(window))

    def token_stats(
        self,
        hidden_TD: Tensor,
        rows_N: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        vocabulary: int,
        temperature: float,
        entropy: bool,
    ) -> TokenStats:
        """`logprobs.token_stats` after the tokens `rows_N` (of T) of hidden states (T/tp, D)."""
        chosen = parallel.gather_tokens(hidden_TD, self.group).index_select(0, rows_N)
        return logprobs.token_stats(
            chosen, weight_VD, targets_N, self.group, vocabulary, temperature, entropy
        )

    def values(self, hidden_TD: Tensor, weight_1D: Tensor) -> Tensor:
        """float32 outputs of a value head, one for each token here."""
        return F.linear(hidden_TD.float(), weight_1D.float())[:, 0]

    def logits(self, hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        """float32 (N, V)."""
        return logprobs.project(hidden_ND, weight_VD)

    @property
    def log_total(self) -> Callable[[Tensor], Tensor] | None:
        """`VocabShard.log_total`."""
        return None


@dataclass(frozen=True)
class Invariant(Fast):
    """Every number by an order of its own: that of a sum cut by tensor parallelism has `parts` parts.

    `parts` is a power of two and a multiple of tp.
    """

    parts: int

    @property
    def multiple(self) -> int:
        return SIDE * self.parts

    @property
    def accumulate(self) -> Accumulate:
        return accumulate

    def pointwise(self, device: torch.device, plain: Pointwise) -> Pointwise:
        return steady_pointwise.pointwise(device, self.group, self.parts)

    def column(self, x: Tensor, weight: Tensor, bias: Tensor | None, sharded: bool) -> Tensor:
        return steady_linear.column(x, weight, bias, self.group, self.parts, sharded)

    def gates(self, x: Tensor, weight: Tensor, blocks: int) -> Tensor | None:
        return None

    def norms_in_products(self, rows: int, columns: Sequence[Tensor], inward: Sequence[Tensor]) -> bool:
        return False

    def row(self, x: Tensor, weight_transposed: Tensor, sharded: bool) -> Tensor:
        return steady_linear.row(x, weight_transposed, self.group, self.parts, sharded)

    def row_later(self, x: Tensor, weight_transposed: Tensor) -> Tensor | Part:
        return self.row(x, weight_transposed, False)  # a tree of parts, not a sum over ranks in their order

    def plus(self, x: Tensor, bias: Tensor) -> Tensor:
        return steady_pointwise.Add.apply(x, bias, self.group, self._over_tokens)

    def packed_attention(
        self, q_THh: Tensor, k_TKh: Tensor, v_TKh: Tensor, batch: PackedBatch, window: int | None
    ) -> Tensor:
        return steady_attention.packed_attention(q_THh, k_TKh, v_TKh, batch, window)

    def decode_attention(self, q_BHh: Tensor, slots: Slots, batch: DecodeBatch, window: int | None) -> Tensor:
        return steady_attention.decode_attention(q_BHh, slots, batch, window)

    def token_stats(
        self,
        hidden_TD: Tensor,
        rows_N: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        vocabulary: int,
        temperature: float,
        entropy: bool,
    ) -> TokenStats:
        return steady_logprobs.token_stats(
            hidden_TD, rows_N, weight_VD, targets_N, self.group, self.parts, vocabulary, temperature, entropy
        )

    def values(self, hidden_TD: Tensor, weight_1D: Tensor) -> Tensor:
        return steady_logprobs.Values.apply(hidden_TD, weight_1D, self.group, self._over_tokens)

    def logits(self, hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        return product(hidden_ND, weight_VD, dtype=torch.float32)

    @property
    def log_total(self) -> Callable[[Tensor], Tensor] | None:
        return lambda logits_NV: steady_logprobs.log_total(logits_NV, self.group)[1]

    def _over_tokens(self, x_TD: Tensor) -> Tensor:
        return over_tokens(x_TD, self.group, self.parts)
