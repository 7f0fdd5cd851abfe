"""The rule for "the same tokens": equal, or a near tie at the first difference.

Two right implementations may round differently, so a token may flip where the two best perturbed logits
(logits / T + noise; plain logits when greedy) are almost equal; what follows such a flip is another text
and cannot be compared. A row is `equal`, or a `near` tie (margin < 1e-4 at its first difference), or
`wrong`. Near ties may be at most 0.5 % of all rows; add the counts of several runs up before asking. Losses
of near rows are compared on teacher-forced tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

MARGIN = 1e-4
NEAR_LIMIT = 0.005


@dataclass(frozen=True)
class TokenAgreement:
    """Counts of rows; `wrong` names them as (row, position, margin)."""

    rows: int = 0
    near: int = 0
    wrong: tuple[tuple[int, int, float], ...] = ()

    def __add__(self, other: "TokenAgreement") -> "TokenAgreement":
        return TokenAgreement(self.rows + other.rows, self.near + other.near, self.wrong + other.wrong)

    @property
    def ok(self) -> bool:
        return not self.wrong and self.near <= NEAR_LIMIT * self.rows


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first position where the rows differ, or where the shorter one ends; None when they are equal."""
    for position, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return position
    return None if len(a) == len(b) else min(len(a), len(b))


def same_tokens(
    expected: Sequence[Sequence[int]],
    got: Sequence[Sequence[int]],
    perturbed_logits: Callable[[int, int], torch.Tensor],
) -> TokenAgreement:
    """Compare rows of answer tokens.

    `perturbed_logits(row, position)` gives the reference's (V,) values from which `expected[row][position]`
    is the argmax, given the tokens of `expected` before it. It is asked only at first differences. A row
    that stops early without a differing token is wrong: the end of a text is a token too.
    """
    if len(expected) != len(got):
        raise ValueError(f"{len(expected)} rows expected, got {len(got)}")
    near, wrong = 0, []
    for row, (a, b) in enumerate(zip(expected, got, strict=True)):
        position = first_difference(a, b)
        if position is None:
            continue
        if position >= min(len(a), len(b)):
            wrong.append((row, position, float("inf")))
            continue
        values_V = perturbed_logits(row, position)
        margin = float(values_V[a[position]] - values_V[b[position]])
        if margin < MARGIN:
            near += 1
        else:
            wrong.append((row, position, margin))
    return TokenAgreement(len(expected), near, tuple(wrong))
