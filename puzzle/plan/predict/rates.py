"""A cost model of 13 constants: what a machine and an engine do per second, or in seconds.

Half precision throughout; T tokens of sequences of S, D hidden, F ffn columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from puzzle.plan.predict.costs import (
    DecodeSeconds,
    Fixed,
    HeadSeconds,
    LayerSeconds,
    Nodes,
    Pass,
    all_reduced,
    layer_products,
)
from puzzle.spec.flops import head_flops, layer_matmul_flops
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
class Rates:
    """Constants, all positive. Rates are per device; seconds of the host are what issuing work takes it.

    `nodes`, `fixed` and `this_engine` are no constants of a fit; `this_engine`: not the published one.
    """

    products: float
    """FLOP/s of matrix products, as reached in micro-batches."""
    memory: float
    """Bytes/s of device memory in elementwise passes, and where a decode pass reads weights and caches."""
    layer_host: float
    """Host seconds to issue one layer of a pass."""
    pass_host: float
    """Host seconds of a pass beside its layers: messages, bookkeeping, in a decode pass sampling."""
    collective_host: float
    """Host seconds of both tensor-parallel collectives of a layer."""
    train_host: float
    """Host seconds for which the last stage works on a micro-batch's loss, the device idle."""
    bus: float
    """Bytes/s of an all-reduce, as NCCL counts bus bandwidth."""
    small: float
    """Seconds of an all-reduce of next to nothing."""
    message: float
    """Bytes/s of a message between stages."""
    hop: float
    """Seconds of a message of a decode pass beside its bytes, both hosts taken in."""
    floor: float
    """Device seconds of a decode layer beside what it reads: its kernels, each of some microseconds."""
    kv_reads: float
    """How often a decode pass goes over its KV cache."""
    step_bytes: float
    """Bytes that an optimizer step moves per parameter of a rank."""
    nodes: Nodes | None = None
    fixed: Fixed = field(default_factory=Fixed)
    this_engine: bool = False

    item = ITEM

    def __post_init__(self) -> None:
        """Raise ValueError for numbers that are not positive."""
        for name, value in self.values().items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")

    @classmethod
    def of(cls, values: Mapping[str, float]) -> Rates:
        """By name."""
        known: dict[str, Any] = {name: values[name] for name in NAMES}
        return cls(**known)

    def with_values(self, values: Mapping[str, float]) -> Rates:
        """Other constants, by name, of a machine and an engine that are otherwise the same."""
        return replace(Rates.of(values), nodes=self.nodes, fixed=self.fixed, this_engine=self.this_engine)

    def values(self) -> dict[str, float]:
        """The constants by name."""
        return {name: getattr(self, name) for name in NAMES}

    def all_reduce(self, ranks: int, nbytes: float, across: bool = False) -> float:
        """Seconds."""
        if ranks == 1:
            return 0.0
        bus, small = self.bus, self.small
        if across and self.nodes is not None:
            bus, small = self.nodes.bus, self.nodes.small
        return small + all_reduced(ranks, nbytes) / bus

    def layer(self, spec: ModelSpec, tp: int, one: Pass, across: bool) -> LayerSeconds:
        """A backward has two products for each of a forward's."""
        products = layer_products(spec, one) / tp / self.products
        passes = layer_bytes(spec, one, tp) / self.memory
        exchange = 2 * self.all_reduce(tp, ITEM * one.tokens * spec.hidden_size, across)
        host = self.layer_host + (self.collective_host if tp > 1 else 0.0)
        there = products + passes + exchange
        return LayerSeconds(there, 2 * (products + passes) + exchange, products, host, host)

    def head(self, spec: ModelSpec, tp: int, one: Pass) -> HeadSeconds:
        """Products, and passes over logits; the host's work on losses."""
        products = one.heads * head_flops(spec) / tp / self.products
        logits = one.heads * (head_flops(spec) / spec.hidden_size / 2)
        both = products + logits * LOGIT_BYTES / tp / self.memory
        return HeadSeconds(both + (self.train_host if one.trained else 0.0), both + products, products)

    def decode(
        self, spec: ModelSpec, tp: int, rows: int, cached: float, graphs: bool, across: bool
    ) -> DecodeSeconds:
        """Replayed passes have no host lane."""
        weights = layer_matmul_flops(spec) / 2 / tp
        # A sum: with few rows, products reach neither the one rate nor the other.
        products = ITEM * weights / self.memory + 2 * weights * rows / self.products
        kv_columns = 2 * max(1.0, spec.num_kv_heads / tp) * spec.head_dim
        cache = self.kv_reads * ITEM * rows * cached * kv_columns / self.memory
        exchange = 2 * self.all_reduce(tp, ITEM * rows * spec.hidden_size, across)
        host = self.layer_host + (self.collective_host if tp > 1 else 0.0)
        host = 0.0 if graphs and self.this_engine else host
        return DecodeSeconds(products + cache + exchange + self.floor, host)

    def decode_head(self, spec: ModelSpec, tp: int, rows: int, graphs: bool) -> tuple[float, float]:
        """The head's weights are read; to sample takes a pass's work of the host."""
        return ITEM * head_flops(spec) / 2 / tp / self.memory, self.pass_host

    def send(self, nbytes: float, across: bool, *, decode: bool = False) -> float:
        """Bytes at the links' rate; of a decode pass also the hop."""
        link = self.nodes.message if across and self.nodes is not None else self.message
        return nbytes / link + (self.hop if decode else 0.0)

    def step(self, held: float, dp: int, across: bool) -> float:
        """The rank's own rows; gradients are summed and weights spread over replicas."""
        bus = self.nodes.bus if across and self.nodes is not None else self.bus
        return self.step_bytes * held / dp / self.memory + all_reduced(dp, ITEM * held) / bus

    def notes(self) -> list[str]:
        """Constants have no range."""
        return []

    def describe(self) -> str:
        """Every constant."""
        return "  ".join(f"{name} {value:.3g}" for name, value in self.values().items())


NAMES = tuple(one.name for one in fields(Rates) if one.name not in ("nodes", "fixed", "this_engine"))


def layer_bytes(spec: ModelSpec, one: Pass, tp: int) -> float:
    """Bytes that a layer's elementwise passes move on one tensor rank; hidden states are whole on each."""
    rotated = spec.num_heads * spec.head_dim
    split = ROTATED_PASSES * rotated + FFN_PASSES * spec.intermediate_size
    split += SCORE_PASSES * one.length * spec.num_heads
    return ITEM * one.tokens * (HIDDEN_PASSES * spec.hidden_size + split / tp)
