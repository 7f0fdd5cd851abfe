"""Triton kernels against the plain functions of the same name, in Triton's interpreter: no GPU is needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("this host has a GPU: `puzzle bench check` runs the kernels there", allow_module_level=True)

from puzzle.engine.generate.decode_ring import generate
from puzzle.engine.generate.model_runner import ModelRunner
from puzzle.engine.generate.requests import Request
from puzzle.engine.generate.sampling import Sampled, SamplingParams, VocabShard, choose
from puzzle.engine.generate.scheduler import Join, Prefill
from puzzle.model import pointwise
from puzzle.model.attention import MEMBERS, Families, KVCache, decode_attention
from puzzle.model.kernels import flash_decode
from puzzle.model.kernels import inference as fused
from puzzle.model.kernels import sample as gumbel_max
from puzzle.model.kernels import skinny_gemm as skinny
from puzzle.model.kernels import training as fused_training
from puzzle.model.noise import position_keys, row_seeds
from puzzle.model.packing import DecodeBatch, pack
from puzzle.model.parallel import TensorGroup
from puzzle.model.rope import rotation
from tests.model.tiny import save_variant, stage

EPS = 1e-5


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == expected.dtype == dtype
    assert not got.isnan().any()
    limit = 2e-6 if dtype == torch.float32 else 2e-2
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error <= limit, float(error)


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_and_norm(dtype):
    x, y, weight = random((5, 72), dtype, 0), random((5, 72), dtype, 1), random((72,), dtype, 2)
    for other in (y, None):
        got = fused.add_norm(x.clone(), other, weight, EPS)
        for a, b in zip(got, pointwise.add_norm(x, other, weight, EPS), strict=True):
            close(a, b, dtype)


@pytest.mark.parametrize("tokens", [3, 1030])
@pytest.mark.parametrize(("blocks", "size"), [(1, 40), (3, 344 // 8)])
def test_gate(tokens, blocks, size):
    both = random((tokens, 2 * blocks * size), torch.bfloat16, 3)
    close(fused.gated(both, blocks), pointwise.gated(both, blocks), torch.bfloat16)


def gradients(function: Callable[..., Any], given: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What a function gives, and the gradients of all it was given for random gradients of what it gives."""
    leaves = [x.clone().requires_grad_() for x in given]
    made = function(*leaves)
    made = made if isinstance(made, tuple) else (made,)
    grads = [random(tuple(x.shape), dtype, 20 + i) for i, x in enumerate(made)]
    return [*(x.detach() for x in made), *torch.autograd.grad(made, leaves, grads)]


def equal_gradients(ours: Callable[..., Any], plain: Callable[..., Any], given: Sequence[Tensor]) -> None:
    """The plain function in float64 on the same numbers."""
    dtype = given[0].dtype
    expected = gradients(plain, [x.double() for x in given], torch.float64)
    for a, b in zip(gradients(ours, given, dtype), expected, strict=True):
        close(a, b.to(dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [5, 37])
def test_gradients_of_a_sum_and_its_norm(dtype, rows):
    x, y, weight = random((rows, 72), dtype, 0), random((rows, 72), dtype, 1), random((72,), dtype, 2)
    given = (x, y, weight)
    equal_gradients(
        lambda x, y, w: fused_training.add_norm(x, y, w, EPS),
        lambda x, y, w: pointwise.add_norm(x, y, w, EPS),
        given,
    )
    equal_gradients(
        lambda x, w: fused_training.add_norm(x, None, w, EPS),
        lambda x, w: pointwise.add_norm(x, None, w, EPS),
        (x, weight),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("blocks", "size"), [(1, 40), (3, 43)])
def test_gradients_of_a_gate(dtype, blocks, size):
    both = random((7, 2 * blocks * size), dtype, 3)
    equal_gradients(lambda x: fused_training.gated(x, blocks), lambda x: pointwise.gated(x, blocks), (both,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "queries", "dim"), [(4, 1, 64), (3, 8, 20)])
def test_gradients_of_heads(dtype, groups, queries, dim):
    batch = pack([[1] * n for n in (4, 1, 6)], 4)
    qkv, _ = qkv_of(batch.total, groups, queries, dim, dtype, norms=False)
    turn = rotation(batch.positions_T, 1.0 / 50 ** torch.arange(0, 1, 2 / dim), dtype)
    double = [x.double() for x in turn]
    equal_gradients(
        lambda x: fused_training.heads(pointwise.heads, x, groups, *turn, None, None, EPS),
        lambda x: pointwise.heads(x, groups, *double, None, None, EPS),
        (qkv,),
    )


def qkv_of(
    tokens: int, groups: int, queries: int, dim: int, dtype: torch.dtype, norms: bool
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    qkv = random((tokens, groups * (queries + 2) * dim), dtype, 4)
    weights = (random((dim,), dtype, 5), random((dim,), dtype, 6)) if norms else (None, None)
    return qkv, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("groups", "queries", "dim", "norms"), [(4, 1, 64, False), (2, 3, 24, True), (3, 8, 20, False)]
)
def test_heads_and_their_way_into_the_cache(dtype, groups, queries, dim, norms):
    """Places of the cache in any order; a dummy segment is stored nowhere."""
    batch = pack([[1] * n for n in (4, 1, 6)], 4)
    qkv, weights = qkv_of(batch.total, groups, queries, dim, dtype, norms)
    turn = rotation(batch.positions_T, 1.0 / 50 ** torch.arange(0, 1, 2 / dim), dtype)
    plain, ours = (KVCache(*torch.full((2, 1, groups, 5, 4, dim), 7.0, dtype=dtype)) for _ in "ab")
    expected = pointwise.heads(qkv, groups, *turn, *weights, EPS)
    places = torch.tensor([12, 13, 14, 15, 3, 0, 1, 2, 19, 17, 18])
    plain.at(places).slots(0).write(*expected[1:])
    got = fused.heads(qkv, groups, *turn, *weights, EPS, ours.at(places).slots(0))
    for a, b in zip((*got, ours.k, ours.v), (*expected, plain.k, plain.v), strict=True):
        close(a, b, dtype)
    close(fused.heads(qkv, groups, *turn, *weights, EPS)[0], expected[0], dtype)


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.long), 4])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter has no bf16 products
@pytest.mark.parametrize(
    ("groups", "queries", "dim", "norms"), [(4, 1, 64, False), (2, 3, 24, True), (1, 8, 10, False)]
)
def test_decode_attention_reads_live_places(monkeypatch, parts, window, dtype, groups, queries, dim, norms):
    """Pages of 64 positions in any order. What a row does not see is NaN: read, it would show."""
    monkeypatch.setattr(flash_decode, "_parts", lambda *_: parts)
    places = torch.tensor([0, 150, 63, 64, 17])
    qkv, weights = qkv_of(len(places), groups, queries, dim, dtype, norms)
    turn = rotation(places, 1.0 / 50 ** torch.arange(0, 1, 2 / dim), dtype)
    table = torch.tensor([[9, 0, 0], [4, 1, 7], [3, 0, 0], [2, 8, 0], [5, 6, 0]], dtype=torch.int32)
    plain = KVCache(*random((2, 1, groups, 10, 64, dim), dtype, 8))
    into = torch.stack([table[row, p // 64] * 64 + p % 64 for row, p in enumerate(places)]).long()
    ours = KVCache(*(torch.full_like(plain.k, torch.nan) for _ in "kv"))
    for row, place in enumerate(places.tolist()):
        for p in range(max(0, place + 1 - window) if window else 0, place):
            here = (..., int(table[row, p // 64]), p % 64, slice(None))
            ours.k[here], ours.v[here] = plain.k[here], plain.v[here]
    batch = DecodeBatch(places, places, 160)
    q, k, v = pointwise.heads(qkv, groups, *turn, *weights, EPS)
    held = plain.at(into, table).slots(0)
    held.write(k, v)
    expected = decode_attention(q, *held.read(160), batch.mask(window)).flatten(1)
    held = ours.at(into, table).slots(0)
    got = flash_decode.attend(qkv, *turn, *weights, EPS, held, places, window)
    close(got, expected, dtype)
    for mine, theirs in ((ours.k, plain.k), (ours.v, plain.v)):
        stored = [memory.flatten(2, 3)[:, :, into] for memory in (mine, theirs)]
        close(*stored, dtype)


@pytest.mark.parametrize(
    ("parts", "dtype", "groups", "queries", "dim", "norms"),
    [
        (1, torch.float32, 2, 1, 64, False),
        (2, torch.float16, 2, 3, 24, True),
        (2, torch.float32, 1, 16, 10, False),
    ],
)
def test_what_families_share_is_read_once_for_all(monkeypatch, parts, dtype, groups, queries, dim, norms):
    """Rows in any order: eight share three pages, two share one, two are alone; and what is shared has been
    taken from the tables of all but a family's first, so that reading it row by row would show."""
    monkeypatch.setattr(flash_decode, "_parts", lambda *_: parts)
    families = [(48, [7, 1, 3, 11, 0, 9, 5, 8]), (16, [4, 10])]
    places = torch.tensor([48, 60, 5, 63, 16, 51, 0, 79, 49, 50, 40, 48])
    table = torch.arange(1, 61, dtype=torch.int32).view(12, 5)
    for positions, rows in families:
        table[rows, : positions // 16] = table[rows[0], : positions // 16].clone()
    qkv, weights = qkv_of(12, groups, queries, dim, dtype, norms)
    turn = rotation(places, 1.0 / 50 ** torch.arange(0, 1, 2 / dim), dtype)
    cache = KVCache(*random((2, 1, groups, 61, 16, dim), dtype, 8))
    into = table.gather(1, places[:, None] // 16)[:, 0].long() * 16 + places % 16
    q, k, v = pointwise.heads(qkv, groups, *turn, *weights, EPS)
    held = cache.at(into, table).slots(0)
    held.write(k, v)
    expected = decode_attention(q, *held.read(80), DecodeBatch(places, places, 80).mask(None)).flatten(1)
    members = torch.zeros(6, 1 + MEMBERS, dtype=torch.int32)
    shared = torch.zeros(12, dtype=torch.int32)
    cache.k[:, :, 0] = cache.v[:, :, 0] = torch.nan
    for number, (positions, rows) in enumerate(families):
        members[number] = -1
        members[number, : 1 + len(rows)] = torch.tensor([positions, *rows])
        shared[rows] = positions
        table[rows[1:], : positions // 16] = 0
    held = cache.at(into, table, families=Families(members, shared)).slots(0)
    got = flash_decode.attend(qkv, *turn, *weights, EPS, held, places, None)
    close(got, expected, dtype)


@pytest.mark.parametrize("page", [8, 24])
def test_pages_that_a_kernel_cannot_read(page):
    cache = KVCache(*torch.zeros(2, 1, 2, 3, page, 16))
    held = cache.at(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int32)).slots(0)
    given = (torch.zeros(1, 2 * 3 * 16), *torch.zeros(2, 1, 16), None, None, EPS, held)
    with pytest.raises(ValueError, match=f"pages of {page} positions"):
        flash_decode.attend(*given, torch.zeros(1, dtype=torch.int64), None)


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("narrow", [skinny.NARROW, 0])
def test_products_of_few_rows(monkeypatch, rows, transposed, narrow):
    """In one part and in two, again and again: the locks are free after each product."""
    monkeypatch.setattr(skinny, "NARROW", narrow)
    x = random((rows, 3 * skinny.STEP), torch.float32, 10)
    weight = random((3 * skinny.STEP, 2 * skinny.COLUMNS), torch.float32, 11)
    weight = weight if transposed else weight.t().contiguous()
    assert skinny.fits(weight, transposed)
    assert not skinny.fits(weight[1:], transposed)
    for _ in range(3):
        out = skinny.product(x, weight, transposed)
        close(out, x @ (weight if transposed else weight.t()), torch.float32)


@pytest.mark.parametrize("room", [48 << 10, 99 << 10, 163 << 10, 227 << 10])
def test_tiles_under_way_have_room(room):
    """On every GPU: those of one program, however few of them a product has."""
    for height in (16, 32, 64):
        for step in (64, 128):
            tile = (skinny.COLUMNS + height) * step * 2
            stages = [skinny._stages(tile, together, room) for together in (1, 2, 3, 12)]
            assert stages == sorted(stages, reverse=True)
            assert all(1 <= some <= max(1, room // tile) for some in stages)


def test_offsets_of_a_weight_fit_into_31_bits():
    for rows, fits in ((1 << 20, False), ((1 << 20) - skinny.COLUMNS, True)):
        weight = torch.empty(rows, 1 << 11, dtype=torch.bfloat16, device="meta")
        assert skinny.fits(weight, False) == fits
        assert skinny.fits(weight.t().contiguous(), True) == fits


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (3, 2), (40, 4), (64, 1), (5, 8), (2, 16)])
@pytest.mark.parametrize("narrow", [skinny.NARROW, 0])
def test_gates_of_few_rows(monkeypatch, rows, blocks, narrow):
    """As of the whole product, gated by itself; tiles have parts of blocks, blocks, or several of them."""
    monkeypatch.setattr(skinny, "NARROW", narrow)
    x = random((rows, 2 * skinny.STEP), torch.float32, 10)
    weight = random((4 * skinny.COLUMNS, 2 * skinny.STEP), torch.float32, 11)
    assert skinny.fits(weight, False)
    close(skinny.gates(x, weight, blocks), pointwise.gated(x @ weight.t(), blocks), torch.float32)


def test_parts_are_powers_of_two_with_work_for_each():
    for programs in (1, 3, 8, 1000):
        for capacity in (1, 127, 128, 384, 500, 5000):
            parts = flash_decode._parts(programs, capacity, torch.device("cpu"))
            assert parts & (parts - 1) == 0
            assert parts == 1 or (parts * 128 <= capacity and parts <= flash_decode.MOST_PARTS)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws(greedy, temperature):
    """Several blocks, a last one that is not full, stop tokens that some rows may not draw yet."""
    rows, vocabulary = 6, gumbel_max.BLOCK + 300
    stops = (5, 17, 4100)
    params = SamplingParams(greedy, temperature, min_new_tokens=3, stop_ids=stops)
    logits = 3 * random((rows, vocabulary), torch.float32, 9)
    logits[:, [5, 4100]] = 40.0
    names = torch.arange(rows)
    seeds, counts = row_seeds(3, 2, names, names % 2), names.clone()
    keys = None if greedy else position_keys(seeds, counts)
    shard = VocabShard(TensorGroup(), 0, vocabulary)
    tokens, logprobs = choose(logits.clone(), keys, counts < 3, params, shard)
    offers = gumbel_max.offers(logits, None if greedy else seeds, counts, 0, temperature, stops, 3)
    packed = gumbel_max.settle(offers)
    assert packed[0].tolist() == tokens.tolist()
    assert set(tokens[:3].tolist()).isdisjoint(stops)
    assert set(tokens[3:].tolist()) <= set(stops)
    torch.testing.assert_close(packed[1].view(torch.float32), logprobs, rtol=1e-6, atol=2e-5)


def test_noise_is_that_of_the_plain_path():
    """Flat logits: the noise alone decides among all entries, for many rows and a shard that begins later."""
    rows, width, offset = 64, 700, 10_000
    names = torch.arange(rows)
    seeds, counts = row_seeds(11, 4, names, names * 0), names % 5
    shard = VocabShard(TensorGroup(), offset, width)
    flat = torch.zeros(rows, width)
    tokens, _ = choose(flat.clone(), position_keys(seeds, counts), None, SamplingParams(), shard)
    packed = gumbel_max.settle(gumbel_max.offers(flat, seeds, counts, offset, 1.0, (), 0))
    assert packed[0].tolist() == tokens.tolist()


def test_a_cpu_takes_no_kernel_though_triton_is_there(monkeypatch, tmp_path: Path):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a kernel on a CPU")

    for module, name in (
        (fused, "add_norm"),
        (fused, "heads"),
        (fused, "gated"),
        (flash_decode, "attend"),
        (skinny, "product"),
        (skinny, "gates"),
        (gumbel_max, "offers"),
    ):
        monkeypatch.setattr(module, name, refuse)
    pointwise.kernels.cache_clear()
    passes = ModelRunner(stage(save_variant(tmp_path / "model", "llama")))
    passes.start((2,), 4, 16, 2, SamplingParams())
    passes.prefill([Prefill([1, 2], [3])])
    passes.join([Join(0, 0, 5, 2, 0, [3]), Join(1, 1, 6, 0, 0, [1])], [4, 5])
    passes.decode(0, 2)
    assert not passes.graphs


@pytest.mark.parametrize(
    "variant",
    ["qwen3", *(pytest.param(name, marks=pytest.mark.long) for name in ("llama", "mistral-window"))],
)
def test_a_whole_stage(monkeypatch, tmp_path: Path, variant: str):
    """Prefill and decode passes through the kernels draw what the plain path draws."""
    folder = save_variant(tmp_path / "model", variant)
    params = SamplingParams(max_new_tokens=4, seed=5)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 259, (n,), generator=generator).tolist() for n in (3, 13, 7)]
    seeds = row_seeds(5, 0, torch.arange(3), torch.zeros(3, dtype=torch.int64)).tolist()
    found = []
    for with_kernels in (False, True):
        monkeypatch.setattr("puzzle.model.numerics.has_kernels", lambda _, found=with_kernels: found)
        decoder = stage(folder)
        passes = ModelRunner(decoder)
        passes.start((4,), 8, 16, 2, params)
        tables = [[7, 1], [3, 5], [2, 8]]
        passes.prefill([Prefill(p[:-1], table[:1]) for p, table in zip(prompts, tables, strict=True)])
        told = zip([2, 0, 1], prompts, tables, strict=True)
        passes.join([Join(row, 0, p[-1], len(p) - 1, 0, table) for row, p, table in told], seeds)
        outs = [passes.decode(0, 3) for _ in range(6)]
        found.append([out.fetch().lists() for out in outs if isinstance(out, Sampled)])
    for plain, ours in zip(*found, strict=True):
        assert ours[0] == plain[0]
        torch.testing.assert_close(torch.tensor(ours[1]), torch.tensor(plain[1]), rtol=0, atol=2e-5)


@pytest.mark.long
def test_samples_of_prompts_as_families(monkeypatch, tmp_path: Path):
    """A queue of samples, of which some end early: kernels draw for families what is drawn without."""
    folder = save_variant(tmp_path / "model", "qwen3")
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 259, (n,), generator=generator).tolist() for n in (34, 9, 17)]
    requests = [Request(prompts[n], n, sample) for sample in range(3) for n in range(3)]
    params = SamplingParams(max_new_tokens=3, seed=5, stop_ids=tuple(range(100)))
    related, found = [], []
    relate = ModelRunner.relate

    def counted(passes: ModelRunner, group: int, families: Sequence[tuple[int, Sequence[int]]]) -> None:
        related.append([(positions, len(rows)) for positions, rows in families])
        relate(passes, group, families)

    monkeypatch.setattr(ModelRunner, "relate", counted)
    for with_kernels in (False, True):
        monkeypatch.setattr("puzzle.model.numerics.has_kernels", lambda _, found=with_kernels: found)
        decoder = stage(folder)
        passes = ModelRunner(decoder, page=16)
        made = generate(decoder, requests, params, passes=passes, most=8)
        found.append([response.tokens for response in made])
        assert bool(related) == with_kernels
    assert found[0] == found[1]
    assert sorted(related[0]) == [(16, 2), (32, 3)]
