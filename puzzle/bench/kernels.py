"""Comparisons of single computations on this device with plain ones: attention, sums of products, noise."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.engine.generate.sampling import SamplingParams, VocabShard, choose, draw
from puzzle.model import pointwise
from puzzle.model.attention import (
    MEMBERS,
    Families,
    KVCache,
    decode_attention,
    flash,
    packed_attention,
)
from puzzle.model.linear import Owed, accumulate, product, sums_in_place
from puzzle.model.noise import gumbel, position_keys, row_keys, row_seeds
from puzzle.model.packing import DecodeBatch, pack
from puzzle.model.parallel import TensorGroup
from puzzle.model.pointwise import Pointwise, has_kernels
from puzzle.model.rope import rotation

BF16, EPS = torch.bfloat16, 1e-5
Found = Iterator[tuple[str, float, float]]
LENGTHS = (70, 3, 128, 41)


def compare(device: torch.device) -> Found:
    """(what, the largest difference found, the largest allowed)."""
    yield from _packed(device)
    yield from _in_parts(device)
    yield from _decode(device)
    if has_kernels(device):
        for kernels in (_fused, _families, _trained, _few_rows, _norms, _draws):
            yield from kernels(device)
    yield from _sums(device)
    yield from _noise(device)


def signature() -> str:
    """How torch's packed attention is called in this version."""
    operator = flash()
    found = "no flash attention with windows" if operator is None else str(operator._schema)
    return f"{found} in torch {torch.__version__}"


def _packed(device: torch.device) -> Found:
    """bf16, against masked attention in float64 on the same numbers; forward and gradients."""
    for heads, kv_heads, window in ((8, 8, None), (8, 2, None), (8, 2, 20)):
        batch = pack([list(range(n)) for n in LENGTHS], 1, device)
        generator = torch.Generator().manual_seed(7)
        draw = [
            torch.randn(sum(LENGTHS), n, 64, generator=generator).to(device, BF16)
            for n in (heads, kv_heads, kv_heads, heads)
        ]
        ours, plain = ([x.to(t, copy=True).requires_grad_() for x in draw[:3]] for t in (BF16, torch.float64))
        got = packed_attention(*ours, batch, window)
        expected = _masked(*plain, window)
        gradients = torch.autograd.grad(got, ours, draw[3])
        wanted = torch.autograd.grad(expected, plain, draw[3].double())
        pairs = [(got, expected), *zip(gradients, wanted, strict=True)]
        worst = max(_relative(a, b) for a, b in pairs)
        yield f"packed attention {heads}/{kv_heads} window {window}", worst, 1e-2


def _in_parts(device: torch.device) -> Found:
    """bf16: the last tokens of a sequence whose first are cached, before other sequences, against float64."""
    past = LENGTHS[0] // 2
    for heads, kv_heads, window in ((8, 8, None), (8, 2, None), (8, 2, 20)):
        generator = torch.Generator().manual_seed(8)
        q, k, v = (
            torch.randn(sum(LENGTHS), n, 64, generator=generator).to(device, BF16)
            for n in (heads, kv_heads, kv_heads)
        )
        rest = [list(range(n)) for n in (LENGTHS[0] - past, *LENGTHS[1:])]
        got = packed_attention(q[past:], k, v, pack(rest, 1, device, past), window)
        expected = _masked(q.double(), k.double(), v.double(), window)[past:]
        yield f"packed attention in parts {heads}/{kv_heads} window {window}", _relative(got, expected), 1e-2


def _masked(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    place = torch.cat([torch.arange(n) for n in LENGTHS])
    text = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)])
    seen = (text[:, None] == text) & (place[:, None] >= place)
    if window is not None:
        seen &= place[:, None] - place < window
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen.to(q.device), -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def _decode(device: torch.device) -> Found:
    generator = torch.Generator().manual_seed(8)
    q, k, v = (
        torch.randn(shape, generator=generator).to(device, BF16)
        for shape in ((5, 8, 64), (5, 2, 77, 64), (5, 2, 77, 64))
    )
    reach = torch.tensor([77, 1, 30, 64, 65])
    mask = (torch.arange(77) < reach[:, None]).to(device)[:, None, None]
    got = decode_attention(q, k, v, mask)
    wide_k, wide_v = (x.double().repeat_interleave(4, 1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q.double()[:, :, None], wide_k, wide_v, attn_mask=mask)[:, :, 0]
    yield "decode attention 8/2", _relative(got, expected), 1e-2


def _fused(device: torch.device) -> Found:
    """The kernels of passes without gradients, bf16, against the plain functions in float64."""
    ours, plain = pointwise.kernels(), Pointwise.eager()
    x, y, weight = (torch.randn(shape, device=device, dtype=BF16) for shape in ((37, 512), (37, 512), (512,)))
    got, expected = ours.add_norm(x, y, weight, EPS)[1], plain.add_norm(x, y, weight, EPS)[1]
    yield "kernel: sum and norm", _relative(got, expected), 1e-2
    both = torch.randn((37, 4 * 2 * 88), device=device, dtype=BF16)
    yield "kernel: gate", _relative(ours.gated(both, 4), plain.gated(both.double(), 4)), 1e-2
    assert ours.decode is not None
    for groups, queries, dim, norms, window in (
        (8, 1, 128, 0, None),
        (2, 4, 64, 2, None),
        (2, 7, 96, 2, 100),
    ):
        for rows in (3, 200):
            places = torch.randint(0, 300, (rows,), device=device)
            qkv = torch.randn((rows, groups * (queries + 2) * dim), device=device, dtype=BF16)
            weights = tuple(torch.randn((dim,), device=device, dtype=BF16) for _ in range(norms)) or (
                None,
                None,
            )
            freq = 1e-4 ** (torch.arange(0, dim, 2, device=device) / dim)
            kept = KVCache(*torch.randn((2, 1, groups, 3 * rows, 128, dim), device=device, dtype=BF16))
            batch, table = DecodeBatch(places, places, 300), torch.randperm(3 * rows, device=device)
            table = table.view(rows, 3).int()
            into = table.gather(1, places[:, None] // 128)[:, 0].long() * 128 + places % 128
            slots = kept.at(into, table).slots(0)
            turn = rotation(places, freq, BF16)
            got = ours.decode(qkv, *turn, *weights, EPS, slots, places, window)
            q, k, v = plain.heads(qkv, groups, *turn, *weights, EPS)
            slots.write(k, v)
            wide = (x.double() for x in (q, *slots.read(300)))
            expected = decode_attention(*wide, batch.mask(window)).flatten(1)
            name = f"kernel: decode {groups * queries}/{groups} x {dim}, {rows} rows"
            yield name, _relative(got, expected), 1e-2
            yield "kernel: heads", _relative(ours.heads(qkv, groups, *turn, *weights, EPS)[0], q), 1e-2


def _families(device: torch.device) -> Found:
    """bf16: decode passes of which all rows but some share two pages of 128 positions, by families of eight
    and of three, against the plain functions in float64."""
    ours, plain = pointwise.kernels(), Pointwise.eager()
    assert ours.decode is not None
    for groups, queries, dim in ((8, 1, 128), (2, 4, 64), (2, 7, 96)):
        for rows in (14, 280):
            places = torch.randint(256, 384, (rows,), device=device)
            freq = 1e-4 ** (torch.arange(0, dim, 2, device=device) / dim)
            turn = rotation(places, freq, BF16)
            qkv = torch.randn((rows, groups * (queries + 2) * dim), device=device, dtype=BF16)
            kept = KVCache(*torch.randn((2, 1, groups, 3 * rows, 128, dim), device=device, dtype=BF16))
            table = torch.randperm(3 * rows, device=device).view(rows, 3).int()
            members = torch.zeros((rows // 2, 1 + MEMBERS), dtype=torch.int32)
            shared = torch.zeros(rows, dtype=torch.int32)
            order = torch.randperm(rows)[: rows // 14 * 11]
            sizes = [8, 3] * (rows // 14)
            for number, some in enumerate(order.split(sizes)):
                members[number] = -1
                members[number, : 1 + len(some)] = torch.tensor([256, *some.tolist()])
                shared[some] = 256
                table[some.to(device), :2] = table[int(some[0]), :2]
            into = table.gather(1, places[:, None] // 128)[:, 0].long() * 128 + places % 128
            slots = kept.at(into, table, None, Families(members.to(device), shared.to(device))).slots(0)
            got = ours.decode(qkv, *turn, None, None, EPS, slots, places, None)
            q, k, v = plain.heads(qkv, groups, *turn, None, None, EPS)
            slots.write(k, v)
            wide = (x.double() for x in (q, *slots.read(384)))
            expected = decode_attention(*wide, DecodeBatch(places, places, 384).mask(None)).flatten(1)
            name = f"kernel: families {groups * queries}/{groups} x {dim}, {rows} rows"
            yield name, _relative(got, expected), 1e-2


def _trained(device: torch.device) -> Found:
    """The gradients that kernels give, bf16, against those of the plain functions in float64."""
    plain = Pointwise.eager()
    ours = pointwise.training_kernels(plain)
    turn = rotation(
        torch.arange(300, device=device), 1e-4 ** (torch.arange(0, 128, 2, device=device) / 128), BF16
    )
    wide = [x.double() for x in turn]
    cases = {
        "sum and norm": (
            lambda f, x, y, w: f.add_norm(x, y, w, EPS),
            ((300, 4096), (300, 4096), (4096,)),
        ),
        "gate": (lambda f, x: f.gated(x, 2), ((300, 2 * 5504),)),
        "heads": (
            lambda f, x: f.heads(x, 4, *(turn if f is ours else wide), None, None, EPS),
            ((300, 4 * 5 * 128),),
        ),
    }
    for name, (function, shapes) in cases.items():
        given = [torch.randn(shape, device=device, dtype=BF16) for shape in shapes]
        found = []
        for way, dtype in ((ours, BF16), (plain, torch.float64)):
            leaves = [x.to(dtype).requires_grad_() for x in given]
            made = function(way, *leaves)
            made = made if isinstance(made, tuple) else (made,)
            generator = torch.Generator(device).manual_seed(1)
            grads = [
                torch.randn(x.shape, device=device, generator=generator).to(BF16).to(dtype) for x in made
            ]
            found.append(torch.autograd.grad(made, leaves, grads))
        for place, (got, expected) in enumerate(zip(*found, strict=True)):
            yield f"kernel: gradient {place} of {name}", _relative(got, expected), 1e-2


def _few_rows(device: torch.device) -> Found:
    """bf16 products of a few rows, in one part and in two, stored either way."""
    for width in (1024, 16384):
        for transposed in (False, True):
            shape = (768, width) if transposed else (width, 768)
            x, weight = (torch.randn(shape, device=device, dtype=BF16) for shape in ((20, 768), shape))
            expected = x.double() @ (weight if transposed else weight.t()).double()
            how = "stored transposed" if transposed else "stored plainly"
            got = product(x, weight, transposed=transposed)
            yield f"kernel: 20 rows x {width}, {how}", _relative(got, expected), 1e-2


def _norms(device: torch.device) -> Found:
    """Norms that the products around them do: rows of sizes that differ by a factor of ten thousand."""
    rows, hidden = 37, 1280
    shapes = ((rows, 768), (768, hidden), (rows, hidden), (hidden,), (4096, hidden))
    x, inward, before, norm, weight = (torch.randn(shape, device=device, dtype=BF16) for shape in shapes)
    before *= 100 ** torch.linspace(-1, 1, rows, device=device)[:, None]
    stream = Owed(x, inward).add_norm(before, norm, EPS)[1]
    total, normed = pointwise.add_norm(before.double(), x.double() @ inward.double(), norm.double(), EPS)
    product = normed @ weight.double().t()
    gated = pointwise.gated(product, 2)
    for name, got, expected in (
        ("product and sum", stream.total, total),
        ("norm in a product", stream.product(weight), product),
        ("norm in gates", stream.gates(weight, 2), gated),
    ):
        yield f"kernel: {name}, {rows} rows", _relative(got, expected), 1e-2


def _draws(device: torch.device) -> Found:
    """Tokens and log-probabilities of the kernel against those of the plain draw."""
    count_B = torch.arange(64, device=device)
    row_seed_B = row_seeds(3, 1, count_B, count_B % 4)
    logits_BV = 2 * torch.randn((64, 9000), device=device)
    shard = VocabShard(TensorGroup(), 0, 9000)
    params = SamplingParams(temperature=0.7, min_new_tokens=5, stop_ids=(3, 8000))
    packed = draw(logits_BV.clone(), row_seed_B, count_B, params, shard)
    tokens_B, logprobs_B = choose(logits_BV, position_keys(row_seed_B, count_B), count_B < 5, params, shard)
    yield "kernel: tokens drawn otherwise", float((packed[0] != tokens_B).sum()), 0.0
    yield "kernel: their log-probs", float((packed[1].view(torch.float32) - logprobs_B).abs().max()), 1e-4


def _sums(device: torch.device) -> Found:
    """Gradients of bf16 weights, added up in float32 over three micro-batches."""
    generator = torch.Generator().manual_seed(9)
    total = torch.full((48, 40), torch.nan, device=device)
    expected = torch.zeros((48, 40), dtype=torch.float64, device=device)
    for number in range(3):
        grad, x = (torch.randn(200, n, generator=generator).to(device, BF16) for n in (64, 40))
        accumulate(total, grad.t()[8:56], x, number == 0)
        expected += grad.double().t()[8:56] @ x.double()
    how = "in place" if sums_in_place(device) else "by a copy"
    yield f"weight gradients summed {how}", _relative(total, expected), 1e-2


def _noise(device: torch.device) -> Found:
    names = torch.arange(64)
    keys = [row_keys(3, 9, names.to(d), (names % 4).to(d), (names * 7).to(d)) for d in ("cpu", device)]
    yield "noise keys, bits that differ", float((keys[0] != keys[1].cpu()).sum()), 0.0
    host, here = (gumbel(key, 100, 5000).cpu() for key in keys)
    yield "noise, largest difference", float((host - here).abs().max()), 1e-5


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().double() - expected.detach()).norm() / expected.detach().norm())
