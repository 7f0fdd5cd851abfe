"""Packing against plain loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puzzle.model.packing import DecodeBatch, pack

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(lengths, st.integers(1, 8))
def test_pack(lengths, multiple):
    rows = [[100 * i + j + 1 for j in range(n)] for i, n in enumerate(lengths)]
    batch = pack(rows, multiple)
    total = sum(lengths)
    assert batch.total % multiple == 0
    assert batch.total - total < multiple
    assert batch.tokens_T[:total].tolist() == [token for row in rows for token in row]
    assert not batch.tokens_T[total:].any()
    assert batch.positions_T.tolist() == [j for n in batch.segments for j in range(n)]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.diff().tolist() == list(batch.segments)
    assert sum(batch.segments) == batch.total
    assert batch.max_len == max(batch.segments)
    assert [batch.tokens_T[i].item() for i in batch.last_rows] == [row[-1] for row in rows]


@given(lengths, st.integers(1, 8))
def test_rows_and_back(lengths, multiple):
    batch = pack([torch.arange(n) + 1 for n in lengths], multiple)
    longest = max(lengths)
    laid_out = batch.tokens_T[batch.row_tokens].view(len(lengths), longest)
    for row, n in zip(laid_out, lengths, strict=True):
        assert row[:n].tolist() == list(range(1, n + 1))
    total = sum(lengths)
    assert torch.equal(laid_out.flatten()[batch.token_rows][:total], batch.tokens_T[:total])


@pytest.mark.parametrize("rows", [[], [[1], []]])
def test_nothing_to_pack(rows):
    with pytest.raises(ValueError, match="cannot pack"):
        pack(rows)


@pytest.mark.parametrize(("window", "expected"), [(None, ["11100", "11111"]), (2, ["01100", "00011"])])
def test_decode_mask(window, expected):
    batch = DecodeBatch(torch.tensor([5, 6]), torch.tensor([2, 4]), reach=5)
    mask = batch.mask(window)
    assert mask.shape == (2, 1, 1, 5)
    assert ["".join("01"[int(x)] for x in row) for row in mask.flatten(1)] == expected
