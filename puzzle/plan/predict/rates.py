"""A cost model of 13 constants: what a machine and an engine do per second, or in seconds.

Half precision throughout; T tokens of sequences of S, D hidden, F ffn columns.
"""

from __future__ import annotations

import math
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
    gathered,
)
from puzzle.plan.predict.engines import OWN, PUBLISHED, Engine
from puzzle.spec.flops import head_flops, layer_attention_flops, layer_matmul_flops
from puzzle.spec.model import ModelSpec

ITEM = 2
"""Bytes of a weight and of an element of a hidden state."""
REST = 2
"""Decode layers whose kernels take as long as those of a replayed pass beside its layers: embedding, last
norm, drawing."""


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
    """Host seconds to issue one layer of a pass, of this engine without gradients."""
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

    @property
    def engine(self) -> Engine:
        """What its passes are made of."""
        return OWN if self.this_engine else PUBLISHED

    def layer(self, spec: ModelSpec, tp: int, one: Pass, across: bool) -> LayerSeconds:
        """A backward has two products for each of a forward's."""
        engine = self.engine
        attention = 2 * engine.pairs * layer_attention_flops(spec, one.length) / one.length
        products = one.tokens * (layer_matmul_flops(spec) + attention) / tp / self.products
        passes = layer_bytes(spec, one, tp, engine) / self.memory
        exchange = 2 * self.all_reduce(tp, ITEM * one.tokens * spec.hidden_size, across)
        collectives = self.collective_host if tp > 1 else 0.0
        forward = self.layer_host * (engine.issue_forward if one.trained else 1.0) + collectives
        backward = self.layer_host * engine.issue_backward + collectives
        there = products + passes + exchange
        return LayerSeconds(there, 2 * (products + passes) + exchange, products, forward, backward)

    def head(self, spec: ModelSpec, tp: int, one: Pass) -> HeadSeconds:
        """Products, and passes over logits; the host that issues their blocks, and its work on losses, for
        which devices of the published engine wait."""
        engine = self.engine
        products = one.heads * head_flops(spec) / tp / self.products
        logits = one.heads * (head_flops(spec) / spec.hidden_size / 2) / tp
        blocks = 0 if engine.block is None or spec.head == "value" else math.ceil(logits / engine.block)
        issue, issue_back = engine.issue_block * self.layer_host, engine.issue_block_back * self.layer_host
        forward = products + logits * engine.logits / self.memory
        backward = engine.head_back * products + logits * engine.logits_back / self.memory
        loss = self.train_host if one.trained else 0.0
        if not self.this_engine:
            return HeadSeconds(forward + loss, backward, products)
        return HeadSeconds(forward, backward, products, blocks * issue + loss, blocks * issue_back)

    def decode(
        self, spec: ModelSpec, tp: int, rows: int, cached: float, graphs: bool, across: bool
    ) -> DecodeSeconds:
        """Replayed passes have no host lane."""
        weights = layer_matmul_flops(spec) / 2 / tp
        products = ITEM * weights / self.memory + self.engine.unhidden * 2 * weights * rows / self.products
        kv_columns = 2 * max(1.0, spec.num_kv_heads / tp) * spec.head_dim
        cache = self.kv_reads * ITEM * rows * cached * kv_columns / self.memory
        exchange = 2 * self.all_reduce(tp, ITEM * rows * spec.hidden_size, across)
        host = self.layer_host + (self.collective_host if tp > 1 else 0.0)
        host = 0.0 if graphs and self.this_engine else host
        return DecodeSeconds(products + cache + exchange + self.floor, host)

    def decode_head(self, spec: ModelSpec, tp: int, rows: int, graphs: bool) -> tuple[float, float]:
        """The head's weights are read; to sample takes a pass's work of the host, or is in the graph, whose
        tokens the host reads a step late."""
        read = ITEM * head_flops(spec) / 2 / tp / self.memory
        replayed = graphs and self.this_engine
        return (read + REST * self.floor, 0.0) if replayed else (read, self.pass_host)

    def decode_host(self, spec: ModelSpec, tp: int, rows: int, graphs: bool) -> float:
        """That of any pass."""
        return self.pass_host

    def send(self, nbytes: float, across: bool, *, decode: bool = False) -> float:
        """Bytes at the links' rate; of a decode pass also the hop."""
        link = self.nodes.message if across and self.nodes is not None else self.message
        return nbytes / link + (self.hop if decode else 0.0)

    def step(self, held: float, dp: int, across: bool) -> float:
        """The rank's own rows; gradients are summed and weights spread over replicas."""
        bus = self.nodes.bus if across and self.nodes is not None else self.bus
        exchanged = gathered(dp, (self.engine.summed + ITEM) * held)
        return self.step_bytes * held / dp / self.memory + exchanged / bus

    def notes(self) -> list[str]:
        """Constants have no range."""
        return []

    def describe(self) -> str:
        """Every constant."""
        return "  ".join(f"{name} {value:.3g}" for name, value in self.values().items())


NAMES = tuple(one.name for one in fields(Rates) if one.name not in ("nodes", "fixed", "this_engine"))


def layer_bytes(spec: ModelSpec, one: Pass, tp: int, engine: Engine) -> float:
    """Bytes that a layer's elementwise passes move on one tensor rank; hidden states are whole on each."""
    split = engine.rotated * spec.num_heads * spec.head_dim + engine.ffn * spec.intermediate_size
    split += engine.scores * one.length * spec.num_heads
    return ITEM * one.tokens * (engine.hidden * spec.hidden_size + split / tp)
