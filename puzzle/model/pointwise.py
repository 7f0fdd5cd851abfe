"""What a layer computes between its matrices and its attention: norms, rotations, gates.

These are functions of tensors alone, without collectives, so that any layout may run them compiled: eager,
each step of them is a pass over device memory of its own. Suffixes: T packed tokens, D hidden, H query
heads, K key/value heads, h head_dim, F ffn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.model.rope import rotate


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, computed in float32 (Zhang and Sennrich 2019)."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y (or x) and its `rms_norm`."""
    total = x if y is None else x + y
    return total, rms_norm(total, weight, eps)


def heads(
    qkv: Tensor,
    kv_groups: int,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries (T, H, h), rotated keys (T, K, h) and values (T, K, h) of `qkv` (T, H h + 2 K h).

    Its columns interleave by kv group: the group's query heads, its key head, its value head.
    """
    head_dim = cos.shape[-1]
    qkv = qkv.view(qkv.shape[0], kv_groups, -1, head_dim)
    q, k, v = qkv.split((qkv.shape[2] - 2, 1, 1), 2)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    return rotate(q, cos, sin).flatten(1, 2), rotate(k, cos, sin).flatten(1, 2), v[:, :, 0]


def gated(gate_up: Tensor, blocks: int) -> Tensor:
    """silu(gate) * up, (T, F), of the product (T, 2 F) whose columns are `blocks` blocks of gate, then up."""
    gate, up = gate_up.view(gate_up.shape[0], blocks, 2, -1).unbind(2)
    return (F.silu(gate) * up).flatten(1)


@dataclass(frozen=True)
class Pointwise:
    """The functions above as a layer calls them.

    Where it `stores`, `heads` also takes the slots of the cache that keys and values go to. Where there is a
    `decode`, that makes attention of `qkv` for a decode pass (`flash_decode.attend`).
    """

    add_norm: Callable[..., tuple[Tensor, Tensor]]
    heads: Callable[..., tuple[Tensor, Tensor, Tensor]]
    gated: Callable[..., Tensor]
    decode: Callable[..., Tensor] | None = None
    stores: bool = False

    @classmethod
    def eager(cls) -> Pointwise:
        """Step by step."""
        return cls(add_norm, heads, gated)

    @classmethod
    def compiled(cls) -> Pointwise:
        """Fused by torch.compile, at the first call for a shape, a dtype and a gradient mode."""
        return cls(torch.compile(add_norm), torch.compile(heads), torch.compile(gated))


def has_kernels(device: torch.device) -> bool:
    """Whether Triton kernels run there; on a CPU never. Triton comes with torch's builds for CUDA."""
    return device.type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def training_kernels(plain: Pointwise) -> Pointwise:
    """One kernel each way, for passes with gradients. ImportError without Triton."""
    from puzzle.model.kernels import training as fused_training

    return fused_training.kernels(plain)


@cache
def kernels() -> Pointwise:
    """One kernel each, for passes without gradients. ImportError without Triton."""
    from puzzle.model.kernels import flash_decode
    from puzzle.model.kernels import inference as fused

    return Pointwise(fused.add_norm, fused.heads, fused.gated, flash_decode.attend, stores=True)
