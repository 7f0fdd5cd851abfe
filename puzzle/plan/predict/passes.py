"""Seconds of one pass of a stage, by what its device computes and what its host issues.

Device and host are two lanes: the host runs ahead of the device, so that a stage takes the longer of both.
Half precision throughout; T tokens of sequences of S, D hidden, F ffn columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from puzzle.plan.layout import Layout
from puzzle.plan.predict.rates import Rates
from puzzle.plan.predict.recurrences import StageCosts
from puzzle.spec.flops import head_flops, layer_attention_flops, layer_matmul_flops
from puzzle.spec.model import ModelSpec

ITEM = 2
"""Bytes of a weight and of an element of a hidden state."""
HIDDEN_PASSES, ROTATED_PASSES, FFN_PASSES, SCORE_PASSES = 22, 16, 5, 3
"""How often a layer without fused kernels reads or writes, elementwise: its hidden states (two norms in fp32,
two sums), queries and keys (rotation, both of them), ffn columns (the gate), attention's S scores per token
and head (scale, mask, softmax; the causal half)."""
LOGIT_BYTES = 14
"""Per logit of a head: half precision, its fp32 copy, a log-softmax."""


@dataclass(frozen=True)
class Pass:
    """A micro-batch of `tokens` tokens in sequences of `length`; `heads` of its positions get logits."""

    tokens: int
    length: int
    heads: int


def stage_costs(
    spec: ModelSpec, layout: Layout, one: Pass, rates: Rates, *, trained: bool, recompute: bool = False
) -> StageCosts:
    """Every stage's seconds of a micro-batch; of the backward what the weights' gradients take.

    A message holds up the stage that sends it. A backward has two products for each of a forward's, and with
    `recompute` the forward's before them.
    """
    tp, last = layout.tp, layout.pp - 1
    products = layer_products(spec, one) / tp / rates.products
    passes = layer_bytes(spec, one, tp) / rates.memory
    exchange = 2 * rates.all_reduce(tp, ITEM * one.tokens * spec.hidden_size)
    host = rates.layer_host + (rates.collective_host if tp > 1 else 0.0)
    sent = ITEM * one.tokens * spec.hidden_size / rates.message if layout.pp > 1 else 0.0
    times = 3 if recompute else 2
    head_products = one.heads * head_flops(spec) / tp / rates.products
    head = (
        head_products
        + one.heads * (head_flops(spec) / spec.hidden_size / 2) * LOGIT_BYTES / tp / rates.memory
    )
    forward, backward, weights = [], [], []
    for stage, layers in enumerate(layout.stage_layers):
        there = max(layers * (products + passes + exchange), layers * host + rates.pass_host)
        back = max(
            layers * (times * (products + passes) + (times - 1) * exchange), layers * (times - 1) * host
        )
        apart = layers * products
        if stage == last:
            there += head + (rates.train_host if trained else 0.0)
            back += head + head_products
            apart += head_products
        forward.append(there + (sent if stage < last else 0.0))
        backward.append(back + (sent if stage else 0.0))
        weights.append(apart)
    return StageCosts(tuple(forward), tuple(backward), tuple(weights))


def layer_products(spec: ModelSpec, one: Pass) -> float:
    """FLOPs of a layer's matrix products; attention's over all pairs, as without a fused kernel."""
    attention = 2 * layer_attention_flops(spec, one.length) / one.length
    return one.tokens * (layer_matmul_flops(spec) + attention)


def layer_bytes(spec: ModelSpec, one: Pass, tp: int) -> float:
    """Bytes that a layer's elementwise passes move on one tensor rank; hidden states are whole on each."""
    rotated = spec.num_heads * spec.head_dim
    split = ROTATED_PASSES * rotated + FFN_PASSES * spec.intermediate_size
    split += SCORE_PASSES * one.length * spec.num_heads
    return ITEM * one.tokens * (HIDDEN_PASSES * spec.hidden_size + split / tp)


@dataclass(frozen=True)
class DecodeStages:
    """Seconds of a decode micro-batch by stage: `host` to issue it, `device` to run it and pass it on."""

    host: tuple[float, ...]
    device: tuple[float, ...]
    sampling: float

    def step(self, microbatches: int) -> float:
        """Seconds of one token of all micro-batches.

        Either the slowest lane of a stage is busy all the time, or a micro-batch runs round the ring alone:
        the host of the last stage issues the sampling only once it knows the tokens before.
        """
        busiest = max(*self.host, *self.device)
        return max(microbatches * busiest, sum(self.device) + self.sampling)


def decode_stages(spec: ModelSpec, layout: Layout, rows: int, cached: float, rates: Rates) -> DecodeStages:
    """A decode micro-batch of `rows` sequences with `cached` tokens each, on average."""
    tp = layout.tp
    weights = layer_matmul_flops(spec) / 2 / tp
    # A sum: with few rows, products reach neither the one rate nor the other.
    products = ITEM * weights / rates.memory + 2 * weights * rows / rates.products
    kv_columns = 2 * max(1.0, spec.num_kv_heads / tp) * spec.head_dim
    cache = rates.kv_reads * ITEM * rows * cached * kv_columns / rates.memory
    exchange = 2 * rates.all_reduce(tp, ITEM * rows * spec.hidden_size)
    layer = products + cache + exchange + rates.floor
    sent = ITEM * rows * spec.hidden_size / rates.message + rates.hop if layout.pp > 1 else 0.0
    host = rates.layer_host + (rates.collective_host if tp > 1 else 0.0)
    device = [layers * layer + sent for layers in layout.stage_layers]
    device[-1] += ITEM * head_flops(spec) / 2 / tp / rates.memory
    return DecodeStages(
        tuple(layers * host + rates.pass_host for layers in layout.stage_layers),
        tuple(device),
        rates.pass_host,
    )
