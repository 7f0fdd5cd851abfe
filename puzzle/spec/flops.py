"""Floating-point operations of a model, a multiply-add counted as two.

Counted are the matrix products of the layers and the head, and attention's two products over the positions
that a token sees (causal, within the sliding window). Formula: Narayanan et al., "Efficient Large-Scale
Language Model Training on GPU Clusters Using Megatron-LM" (SC'21), appendix; model FLOPs utilisation as in
Chowdhery et al., "PaLM" (2022), appendix B: recomputation does not count. Both count attention over all S x S
pairs; here it is the causal half, so utilisations come out lower than by their convention.
"""

from __future__ import annotations

from collections.abc import Iterable

from puzzle.spec.model import ModelSpec

PEAKS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "GH200": 989e12, "A100": 312e12, "A800": 312e12}
"""Dense bf16 FLOP/s by a word of the device's name, from the vendor's data sheets (SXM parts)."""


def layer_matmul_flops(spec: ModelSpec) -> int:
    """Forward matrix-product FLOPs of one token in one decoder layer."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    weights = spec.hidden_size * (2 * q + 2 * kv + 3 * spec.intermediate_size)
    return 2 * weights


def head_flops(spec: ModelSpec) -> int:
    """Forward FLOPs of one token in the head; multiply by the positions that have logits or values."""
    return 2 * spec.hidden_size * (spec.vocab_size if spec.head == "lm" else spec.num_labels)


def matmul_flops(spec: ModelSpec) -> int:
    """Forward matrix-product FLOPs of one token: all layers and the head."""
    return spec.num_layers * layer_matmul_flops(spec) + head_flops(spec)


def layer_attention_flops(spec: ModelSpec, length: int) -> int:
    """Forward FLOPs of attention's two products in one layer for a sequence of `length` tokens.

    They are taken over pairs of (position, position it sees, itself included).
    """
    window = min(spec.sliding_window or length, length)
    pairs = window * (window + 1) // 2 + (length - window) * window
    return 4 * spec.num_heads * spec.head_dim * pairs


def forward_flops(spec: ModelSpec, lengths: Iterable[int]) -> int:
    """Forward FLOPs of whole sequences of the given lengths in tokens, the head at every position."""
    token, total = matmul_flops(spec), 0
    for length in lengths:
        total += length * token + spec.num_layers * layer_attention_flops(spec, length)
    return total


def response_flops(spec: ModelSpec, lengths: Iterable[int], positions: int) -> int:
    """Forward FLOPs of whole sequences of the given lengths in tokens, the head at `positions` of them."""
    lengths = tuple(lengths)
    return forward_flops(spec, lengths) - (sum(lengths) - positions) * head_flops(spec)


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of a device of this name; None where no data sheet is known, as for a CPU."""
    words = device.replace("-", " ").split()
    return next((PEAKS[word] for word in words if word in PEAKS), None)


def train_flops(spec: ModelSpec, lengths: Iterable[int], positions: int | None = None) -> int:
    """Forward and backward FLOPs, the head at `positions` (None: everywhere): the backward pass has two
    products for each of the forward's, but one where weights are frozen: the gradient of what they
    multiply. What adapters add is left out, as it is about rank / width of the rest.
    """
    lengths = tuple(lengths)
    forward = response_flops(spec, lengths, sum(lengths) if positions is None else positions)
    if spec.lora is None:
        return 3 * forward
    attention = spec.num_layers * sum(layer_attention_flops(spec, length) for length in lengths)
    return 2 * forward + attention
