"""Packed attention against each sequence alone."""

import itertools

import pytest
import torch

from puzzle.model import attention
from puzzle.model.attention import KVCache, decode_attention, packed_attention
from puzzle.model.packing import DecodeBatch, pack


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


def textbook(q, k, v, seen):
    """One query head per key head: softmax over the keys that are seen, (T, H, h)."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def flash(
    q, k, v, cu_q, cu_k, max_q, max_k, dropout, is_causal, debug, *, window_size_left, window_size_right
):
    """What torch's documentation says of `varlen_attn`, by the arguments of the operator below it, segment by
    segment; and four more outputs."""
    assert not dropout
    assert not debug
    assert max_q == cu_q.diff().max()
    assert max_k == cu_k.diff().max()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    left, right = window_size_left, 0 if is_causal else window_size_right
    parts = []
    ends = [list(itertools.pairwise(cu.tolist())) for cu in (cu_q, cu_k)]
    for (start, stop), (first, last) in zip(*ends, strict=True):
        # As of flash attention 2.1: the last query sees the last key.
        i, j = torch.arange(stop - start)[:, None] + last - first - stop + start, torch.arange(last - first)
        seen = torch.ones(stop - start, last - first, dtype=torch.bool)
        if left >= 0:
            seen &= j >= i - left
        if right >= 0:
            seen &= j <= i + right
        parts.append(textbook(q[start:stop], k[first:last], v[first:last], seen))
    return torch.cat(parts), None, None, None, None


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_flash_kernel_is_asked_for_the_same(kv_heads, window):
    batch = pack([[1] * n for n in (5, 1, 7)], 4)
    heads = (4, kv_heads, kv_heads)
    q, k, v = (torch.randn(batch.total, n, 8, generator=torch.Generator().manual_seed(n)) for n in heads)
    expected = packed_attention(q, k, v, batch, window)[:13]
    got = attention._flash_attention(flash, q, k, v, batch, window)[:13]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_this_torch_has_that_kernel():
    """Its first outputs, and its positional arguments in the order in which they are given."""
    operator = attention.flash()
    assert operator is not None
    schema = operator._schema
    positional = [one.name for one in schema.arguments if not one.kwarg_only]
    assert positional == [
        *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k"),
        *("dropout_p", "is_causal", "return_debug_mask"),
    ]
    assert schema.returns[0].name == "output"


class OnCuda(torch.Tensor):
    """A tensor that says that it lies on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("width", "has"), [(8, True), (80, True), (256, True), (12, False), (20, False), (264, False)]
)
def test_heads_that_the_flash_kernel_has_not_are_attended_without_it(monkeypatch, width, has, dtype):
    asked = []

    def kernel(*given, **options):
        asked.append(width)
        return flash(*given, **options)

    monkeypatch.setattr(attention, "flash", lambda: kernel)
    batch = pack([[1] * n for n in (5, 1, 7)], 1)
    q, k, v = (
        torch.randn(13, n, width, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (4, 2, 2)
    )
    expected = packed_attention(q.float(), k.float(), v.float(), batch, 3)
    got = packed_attention(*(x.as_subclass(OnCuda) for x in (q, k, v)), batch, 3)
    torch.testing.assert_close(got.as_subclass(torch.Tensor).float(), expected, rtol=0.03, atol=0.03)
    assert asked == [width] * (has and dtype != torch.float32)


@pytest.mark.parametrize("window", [None, 1, 4, 9])
@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("lengths", [(5, 1, 7), (5,), (1, 3)])
def test_a_sequence_that_goes_on_sees_what_is_cached_of_it(lengths, kernel, window):
    """The last part of a sequence of 6 + n tokens, others beside it, and a dummy segment: each as if alone,
    whole."""
    batch, past = pack([[1] * n for n in lengths], 4, past=6), 6
    assert batch.positions_T[: lengths[0]].tolist() == list(range(6, 6 + lengths[0]))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(past + batch.total, n, 8, generator=generator) for n in (4, 2, 2))
    cache = KVCache(*torch.full((2, 1, 2, 4, 4, 8), torch.nan))
    places = torch.tensor([9, 3, 14, 8, 4, 5])
    cache.at(places).slots(0).write(k[:past], v[:past])
    slots = cache.at(torch.arange(0), past=places).slots(0)
    whole = slots.before(k[past:], v[past:])
    assert all(torch.equal(ours, plain) for ours, plain in zip(whole, (k, v), strict=True))
    if kernel:
        got = attention._flash_attention(flash, q[past:], *whole, batch, window)
    else:
        got = packed_attention(q[past:], *whole, batch, window)
    start = 0
    for number, n in enumerate(lengths):
        first, stop = start + past * (number > 0), past + start + n
        place = torch.arange(stop - first)
        seen = place <= place[:, None]
        if window is not None:
            seen &= place > place[:, None] - window
        keys, values = (x[first:stop].repeat_interleave(2, 1) for x in (k, v))
        expected = textbook(q[first:stop], keys, values, seen)[-n:]
        torch.testing.assert_close(got[start : start + n], expected, rtol=1e-5, atol=1e-6)
        start += n


LENGTHS = (3, 1, 4)
TABLES = torch.tensor([[4, 1, 0], [2, 6, 0], [5, 7, 3]], dtype=torch.int32)
"""Pages of two positions for three sequences, one more than they fill."""


def filled(layers=2):
    """A cache of eight pages with the keys and values of three sequences, in layer 1; of every sequence
    queries, keys and values (3, positions, 4, 8), the last one not yet written."""
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randn(3, n + 1, 4, 8, generator=generator) for n in LENGTHS]
    cache = KVCache(*torch.full((2, layers, 2, 8, 2, 8), torch.nan))
    batch = pack([[1] * n for n in LENGTHS], 5)
    dummy = torch.full((batch.total - sum(LENGTHS), 2, 8), 9.0)
    k, v = (torch.cat([*(s[i, :-1, :2] for s in sequences), dummy]) for i in (1, 2))
    places = [int(t[p // 2]) * 2 + p % 2 for t, n in zip(TABLES, LENGTHS, strict=True) for p in range(n)]
    cache.at(torch.tensor(places)).slots(1).write(k, v)
    return cache, sequences


def test_a_cache_holds_what_a_pass_wrote_in_its_places_alone(monkeypatch):
    cache, sequences = filled()
    for held, which in ((cache.k, 1), (cache.v, 2)):
        expected = torch.full_like(held, torch.nan)
        for table, s, n in zip(TABLES, sequences, LENGTHS, strict=True):
            for p in range(n):
                expected[1, :, table[p // 2], p % 2] = s[which, p, :2]
        assert torch.equal(held.nan_to_num(1e9), expected.nan_to_num(1e9))
    copied = [held.clone() for held in (cache.k, cache.v)]
    for held in copied:
        held[:, :, [6, 0]] = held[:, :, [5, 4]]
    monkeypatch.setattr(attention, "COPIED", 1)
    cache.copy(torch.tensor([5, 4]), torch.tensor([6, 0]))
    for held, expected in zip((cache.k, cache.v), copied, strict=True):
        assert torch.equal(held.nan_to_num(1e9), expected.nan_to_num(1e9))


@pytest.mark.parametrize("window", [None, 1, 2])
def test_a_new_token_sees_what_its_row_has_cached(window):
    """Rows whose pages lie in any order; two query heads share a key head."""
    cache, sequences = filled()
    where = torch.tensor(LENGTHS)
    step = DecodeBatch(where, where, reach=5)
    q, k, v = (torch.stack([s[i, -1] for s in sequences]) for i in range(3))
    places = torch.tensor([int(t[n // 2]) * 2 + n % 2 for t, n in zip(TABLES, LENGTHS, strict=True)])
    held = cache.at(places, TABLES).slots(1)
    held.write(k[:, :2], v[:, :2])
    keys, values = (x.nan_to_num(1e3) for x in held.read(5))  # behind a row's end lies anything
    assert keys.shape == (3, 2, 5, 8)
    got = decode_attention(q, keys, values, step.mask(window))
    for row, s, n in zip(got, sequences, LENGTHS, strict=True):
        place = torch.arange(n + 1)
        seen = (place > n - (window or n + 1))[None]
        k, v = (s[i, :, :2].repeat_interleave(2, 1) for i in (1, 2))
        torch.testing.assert_close(row[None], textbook(s[0, -1:], k, v, seen), rtol=1e-5, atol=1e-6)
    assert cache.k[0].isnan().all()
    assert cache.k[1, :, 0].isnan().all()


@pytest.mark.parametrize("pages", [[1, 2, 3], [1, 3, 5], [4, 2, 0], [1, 2, 4], [6]])
def test_rows_of_one_page_are_read_where_they_lie(pages):
    """Evenly or not: the same keys and values; only what grows evenly is a view."""
    cache = KVCache(*torch.randn(2, 1, 2, 7, 5, 8))
    table = torch.tensor(pages, dtype=torch.int32)[:, None]
    held = cache.at(torch.zeros(0, dtype=torch.int64), table).slots(0)
    for got, memory in zip(held.read(3), (cache.k, cache.v), strict=True):
        assert torch.equal(got, torch.stack([memory[0, :, page, :3] for page in pages]))
        view = got.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
        assert view == (pages not in ([4, 2, 0], [1, 2, 4]))
