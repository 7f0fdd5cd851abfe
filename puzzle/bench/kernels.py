"""Comparisons of single computations on this device with plain ones: attention, sums of products, noise."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.engine.world import World
from puzzle.model.attention import decode_attention, packed_attention
from puzzle.model.noise import gumbel, row_keys
from puzzle.model.packing import pack
from puzzle.model.products import accumulate, sums_in_place

LENGTHS = (70, 3, 128, 41)


def compare(world: World) -> Iterator[tuple[str, float, float]]:
    """(what, the largest difference found, the largest allowed)."""
    if world.rank == 0:
        print(signature(), flush=True)
    yield from _packed(world.device)
    yield from _decode(world.device)
    yield from _sums(world.device)
    yield from _noise(world.device)


def signature() -> str:
    """How torch's packed attention is called in this version."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"varlen_attn is not in torch {torch.__version__}"
    return f"varlen_attn{inspect.signature(varlen_attn)} in torch {torch.__version__}"


def _packed(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """bf16, against masked attention in float64 on the same numbers; forward and gradients."""
    for heads, kv_heads, window in ((8, 8, None), (8, 2, None), (8, 2, 20)):
        batch = pack([list(range(n)) for n in LENGTHS], 1, device)
        generator = torch.Generator().manual_seed(7)
        draw = [
            torch.randn(sum(LENGTHS), n, 64, generator=generator).to(device, torch.bfloat16)
            for n in (heads, kv_heads, kv_heads, heads)
        ]
        ours, plain = (
            [x.to(t, copy=True).requires_grad_() for x in draw[:3]] for t in (torch.bfloat16, torch.float64)
        )
        got = packed_attention(*ours, batch, window)
        expected = _masked(*plain, window)
        gradients = torch.autograd.grad(got, ours, draw[3])
        wanted = torch.autograd.grad(expected, plain, draw[3].double())
        pairs = [(got, expected), *zip(gradients, wanted, strict=True)]
        worst = max(_relative(a, b) for a, b in pairs)
        yield f"packed attention {heads}/{kv_heads} window {window}", worst, 1e-2


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


def _decode(device: torch.device) -> Iterator[tuple[str, float, float]]:
    generator = torch.Generator().manual_seed(8)
    q, k, v = (
        torch.randn(shape, generator=generator).to(device, torch.bfloat16)
        for shape in ((5, 8, 64), (5, 2, 77, 64), (5, 2, 77, 64))
    )
    reach = torch.tensor([77, 1, 30, 64, 65])
    mask = (torch.arange(77) < reach[:, None]).to(device)[:, None, None]
    got = decode_attention(q, k, v, mask)
    wide_k, wide_v = (x.double().repeat_interleave(4, 1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q.double()[:, :, None], wide_k, wide_v, attn_mask=mask)[:, :, 0]
    yield "decode attention 8/2", _relative(got, expected), 1e-2


def _sums(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Gradients of bf16 weights, added up in float32 over three micro-batches."""
    generator = torch.Generator().manual_seed(9)
    total = torch.full((48, 40), torch.nan, device=device)
    expected = torch.zeros((48, 40), dtype=torch.float64, device=device)
    for number in range(3):
        grad, x = (torch.randn(200, n, generator=generator).to(device, torch.bfloat16) for n in (64, 40))
        accumulate(total, grad.t()[8:56], x, number == 0)
        expected += grad.double().t()[8:56] @ x.double()
    how = "in place" if sums_in_place(device) else "by a copy"
    yield f"weight gradients summed {how}", _relative(total, expected), 1e-2


def _noise(device: torch.device) -> Iterator[tuple[str, float, float]]:
    names = torch.arange(64)
    keys = [row_keys(3, 9, names.to(d), (names % 4).to(d), (names * 7).to(d)) for d in ("cpu", device)]
    yield "noise keys, bits that differ", float((keys[0] != keys[1].cpu()).sum()), 0.0
    host, here = (gumbel(key, 100, 5000).cpu() for key in keys)
    yield "noise, largest difference", float((host - here).abs().max()), 1e-5


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().double() - expected.detach()).norm() / expected.detach().norm())
