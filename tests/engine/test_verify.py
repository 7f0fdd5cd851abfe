"""Checksums of tensors in pieces: equal however they are cut, others for another value or place."""

from itertools import pairwise

import pytest
import torch

from puzzle.engine.reshard import verify
from puzzle.engine.reshard.verify import checksum
from puzzle.plan.shards import Box

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8]


def pieces(shape, cuts):
    """Boxes of a cut of every dimension at some places."""
    found = [()]
    for size, places in zip(shape, cuts, strict=True):
        intervals = list(pairwise([0, *places, size]))
        found = [(*box, interval) for box in found for interval in intervals]
    return [Box(intervals) for intervals in found]


def total(whole, boxes):
    return sum(int(checksum(whole[box.slices], box, tuple(whole.shape))) for box in boxes) % 2**64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
@pytest.mark.parametrize(
    ("shape", "cuts"),
    [((11,), [(4,)]), ((6, 10), [(2, 5), ()]), ((6, 10), [(), (3,)]), ((6, 10), [(1,), (2, 9)])],
)
def test_any_cut_gives_the_sum_of_the_whole(dtype, chunk, shape, cuts, monkeypatch):
    monkeypatch.setattr(verify, "CHUNK", chunk)
    whole = (50 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    expected = total(whole, pieces(shape, [()] * len(shape)))
    assert total(whole, pieces(shape, cuts)) == expected
    # A tensor that is stored the other way round is the same tensor.
    if len(shape) == 2:
        assert total(whole.t().contiguous().t(), pieces(shape, cuts)) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bit_or_two_exchanged_values_change_it(dtype):
    shape = (5, 9)
    whole = torch.arange(1, 46).view(shape).to(dtype)
    everything = pieces(shape, [(), ()])
    found = {total(whole, everything)}
    bits = verify.INTEGERS[whole.element_size()]
    for place in range(45):
        other = whole.clone()
        other.view(bits).view(-1)[place] ^= 1
        found.add(total(other, everything))
    for a, b in ((0, 1), (0, 9), (3, 40), (8, 9)):
        other = whole.clone().view(-1)
        other[[a, b]] = other[[b, a]]
        found.add(total(other.view(shape), everything))
    for shift in (1, 9):  # rows or columns that are moved on
        found.add(total(whole.view(-1).roll(shift).view(shape), everything))
    assert len(found) == 1 + 45 + 4 + 2
