"""Packed attention against each sequence alone."""

import pytest
import torch

from puzzle.model.attention import packed_attention
from puzzle.model.packing import pack


@pytest.mark.parametrize("lengths", [(10, 11), (9, 10), (4, 4), (7, 1, 7), (1, 2)])
@pytest.mark.parametrize("multiple", [1, 2, 4, 8])
@pytest.mark.parametrize("window", [None, 3])
def test_no_sequence_sees_another(lengths, multiple, window):
    """With (10, 11) and an even multiple, the dummy segment makes T as large as two rows of 11."""
    batch = pack([[1] * n for n in lengths], multiple)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch.total, heads, 8, generator=generator) for heads in (4, 2, 2))
    out = packed_attention(q, k, v, batch, window)
    start = 0
    for n in lengths:
        own = slice(start, start + n)
        place = torch.arange(n)
        seen = place[None] <= place[:, None]
        if window is not None:
            seen &= place[None] > place[:, None] - window
        keys, values = (x[own].repeat_interleave(2, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[own], keys) / 8**0.5
        p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        torch.testing.assert_close(out[own], torch.einsum("hqk,khd->qhd", p, values), rtol=1e-5, atol=1e-6)
        start += n
