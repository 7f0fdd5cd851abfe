"""Sums that are the same however their terms are spread: a fixed tree, or integers, which have no order."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.model.parallel import TensorGroup
from puzzle.model.pointwise import has_kernels

FRACTION = 40
"""Bits behind the point of what `exact_sum` adds up."""


def tree_sum(x: Tensor, dim: int) -> Tensor:
    """The sum over `dim`: neighbours are added, then neighbouring pairs, and so on.

    Zeros behind the last term change nothing, and neither does a cut into a power of two of equal parts whose
    sums are added in the same way.
    """
    x = x.movedim(dim, 0)
    while len(x) > 1:
        if len(x) % 2:
            x = torch.cat((x, x.new_zeros((1, *x.shape[1:]))))
        x = x[0::2] + x[1::2]
    return x[0]


def exact_sum(x_NV: Tensor, group: TensorGroup) -> Tensor:
    """float32 (N,): the sum over V, which is cut over the group, of numbers between -1 and 1.

    Each is rounded to a multiple of 2^-40. Up to 2^22 of them are then added without an error.
    """
    return _shared(x_NV.double().mul_(2.0**FRACTION).round_().long().sum(1), group)


def exact_exponentials(logits_NV: Tensor, top_N: Tensor, group: TensorGroup) -> Tensor:
    """`exact_sum` of exp(logits - top), none of which is above 1."""
    if not has_kernels(logits_NV.device):
        return exact_sum(torch.exp(logits_NV - top_N[:, None]), group)
    from puzzle.model.kernels import invariant_sums

    return _shared(invariant_sums.exponentials(logits_NV, top_N, FRACTION), group)


def _shared(sums_N: Tensor, group: TensorGroup) -> Tensor:
    return group.all_reduce(sums_N).double().mul_(2.0**-FRACTION).float()


def across(x: Tensor, group: TensorGroup, sharded: bool) -> Tensor:
    """The tree over what the ranks have (T, ...): of the own T/tp rows if `sharded`, else of all."""
    if group.size == 1:
        return x
    return tree_sum(group.exchange(x) if sharded else group.all_gather(x[None]), 0)


def equal_parts(extent: int, group: TensorGroup, parts: int) -> int:
    """In how many of `parts` a rank cuts its `extent` of a dimension that is cut over the group.

    Fewer than `parts` / tp where those would not be equal, but as many over all ranks in every layout:
    gcd(E/tp, parts/tp) tp = gcd(E, parts). Where several ranks hold the same, E is not: such layouts agree
    with each other alone.
    """
    return math.gcd(extent, parts // group.size)


def over_tokens(x_TD: Tensor, group: TensorGroup, parts: int) -> Tensor:
    """(D,), the same on every rank: the sum over all tokens of a pass, of which a rank has T/tp.

    They are added in `parts` equal parts, of which a rank has some.
    """
    here = x_TD.view(parts // group.size, -1, *x_TD.shape[1:])
    return across(tree_sum(tree_sum(here, 1), 0), group, sharded=False)


def pad_to(x: Tensor, multiple: int, dim: int) -> Tensor:
    """`x` with zeros behind dimension `dim` (-1 or -2), up to a multiple."""
    short = -x.shape[dim] % multiple
    if not short:
        return x
    return F.pad(x, (0, short) if dim == -1 else (0, 0, 0, short))
