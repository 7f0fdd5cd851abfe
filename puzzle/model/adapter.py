"""What LoRA adds to one stored matrix: scale B A x, for all the projections that the matrix holds.

    x (T/tp, in)   whole inputs: A of every rank sees its own tokens, B its own columns
      | a          (T/tp, n r)  n adapted projections, one below the other
      | gather     (T, n r)
      | b          (T, out/tp)  each row of b reads the r columns of its projection

    x (T, in/tp)   inputs cut over tensor ranks, one projection
      | a          (T, r)       a partial sum
      | scatter    (T/tp, r)
      | b          (T/tp, out)

What travels between tensor ranks is r wide. Suffixes as in `model.decoder`; r: rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from puzzle.model.linear import linear
from puzzle.model.parallel import TensorGroup, gather_tokens
from puzzle.plan.shards import LocalParam
from puzzle.spec.lora import adapter_names


class Adapter(nn.Module):
    """The adapter of one stored matrix. Its parameters `a` and `b` are storages of `plan.shards`."""

    a: nn.Parameter
    b: nn.Parameter

    def __init__(self, matrix: LocalParam, b: LocalParam, scale: float) -> None:
        """`matrix` is the storage that is adapted, `b` that of its second factors."""
        super().__init__()
        self.scale, self.transposed, self.rows = scale, matrix.transposed, matrix.rows
        parts = {name: i for i, name in enumerate(dict.fromkeys(piece.tensor for piece in b.pieces))}
        self.parts = len(parts)
        # For every row of `b`: the matrix's row beside which it stands, and the number of its projection.
        found: list[tuple[int, int]] = []
        for piece in matrix.pieces:
            part = parts.get(adapter_names(piece.tensor)[1])
            if part is not None:
                found += [(row, part) for row in range(piece.start, piece.stop)]
        self._place = torch.tensor(found, dtype=torch.int64).t()

    def add(self, out: Tensor, x: Tensor, group: TensorGroup, sharded: bool) -> Tensor:
        """`out`, with what is added to it in place; `sharded` as in `column_linear`."""
        low = linear(x, self.a, transposed=self.transposed)
        if self.transposed:
            low = group.combine(low, sharded)
        elif sharded:
            low = gather_tokens(low, group)
        return out.addmm_(low, self._wide().t(), alpha=self.scale)

    @torch.no_grad()
    def merge_into(self, weight: Tensor) -> None:
        """Add scale B A to the matrix itself."""
        if self.transposed:
            weight.addmm_(self.a, self.b.t(), alpha=self.scale)
        else:
            weight.addmm_(self._wide(), self.a, alpha=self.scale)

    def _wide(self) -> Tensor:
        """(rows of the matrix, n r): `b` in the columns of its projection, zeros elsewhere."""
        if self.transposed or (self.parts == 1 and len(self.b) == self.rows):
            return self.b
        if self._place.device != self.b.device:
            self._place = self._place.to(self.b.device)
        wide = self.b.new_zeros(self.rows, self.parts, self.b.shape[1])
        return wide.index_put(tuple(self._place), self.b).flatten(1)
