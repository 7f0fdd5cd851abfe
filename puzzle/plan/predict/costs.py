"""What a prediction asks of a machine and an engine: seconds of the pieces that passes are made of.

Two kinds of calibrations answer: constants (`rates.Rates`) and measured tables (`tables.Tables`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from puzzle.plan.layout import Layout
from puzzle.spec.flops import layer_attention_flops, layer_matmul_flops
from puzzle.spec.model import ModelSpec


@dataclass(frozen=True)
class Pass:
    """A micro-batch of `tokens` tokens in sequences of `length`; `heads` of its positions get logits.
    `trained`: a backward pass follows."""

    tokens: int
    length: int
    heads: int
    trained: bool = False


@dataclass(frozen=True)
class LayerSeconds:
    """Of one layer and one micro-batch, tensor-parallel collectives included. `weights`: of the gradients of
    weights, out of `backward`. `issue_...`: what the host needs to issue a pass."""

    forward: float
    backward: float
    weights: float
    issue_forward: float
    issue_backward: float


@dataclass(frozen=True)
class HeadSeconds:
    """Of the head of one micro-batch, with what the host does about losses; `weights` out of `backward`.
    `issue_...`: what the host needs to issue a pass, where that is known apart."""

    forward: float
    backward: float
    weights: float
    issue_forward: float = 0.0
    issue_backward: float = 0.0


@dataclass(frozen=True)
class DecodeSeconds:
    """Of one layer of a decode pass, by what waits for it."""

    device: float
    host: float


@dataclass(frozen=True)
class Fixed:
    """Seconds that do not follow from passes: to map a byte of device memory, to record a graph, at the
    border of two stages of an iteration, to bring a byte from the host or there, of an optimizer step beside
    its parameters, of the host to prepare a micro-batch before passes begin, and of a position of advantages
    that follow one from another."""

    map_s_per_byte: float = 0.0
    capture_s_per_bucket: float = 0.0
    stage_s: float = 0.0
    host_s_per_byte: float = 0.0
    step_s: float = 0.0
    prepare_s: float = 0.0
    position_s: float = 0.0


@dataclass(frozen=True)
class Nodes:
    """Machines of `devices` devices each, and what goes between them per rank: bytes/s of collectives and of
    messages, and seconds of a small one."""

    devices: int
    bus: float
    message: float
    small: float

    def apart(self, first: int, count: int) -> bool:
        """Whether `count` ranks from `first` on are on more than one node."""
        return first // self.devices != (first + count - 1) // self.devices


class Costs(Protocol):
    """Seconds; all figures are of one rank, the ranks of a group alike."""

    @property
    def item(self) -> int:
        """Bytes of a weight and of an element of a hidden state."""
        ...

    @property
    def nodes(self) -> Nodes | None:
        """What is known of several machines; None: nothing, all links count as those inside one."""
        ...

    @property
    def this_engine(self) -> bool:
        """Whether decode passes can be recorded, and logits are made at answers alone: not in the published
        engine."""
        ...

    @property
    def fixed(self) -> Fixed:
        """What comes beside passes."""
        ...

    @property
    def pass_host(self) -> float:
        """Host seconds of a pass beside its layers."""
        ...

    def layer(self, spec: ModelSpec, tp: int, one: Pass, across: bool) -> LayerSeconds:
        """A decoder layer; `across`: its tensor group is on several nodes."""
        ...

    def head(self, spec: ModelSpec, tp: int, one: Pass) -> HeadSeconds:
        """What the last stage does beside its layers."""
        ...

    def decode(
        self, spec: ModelSpec, tp: int, rows: int, cached: float, graphs: bool, across: bool
    ) -> DecodeSeconds:
        """A decoder layer for one token of `rows` sequences with `cached` tokens each, on average."""
        ...

    def decode_head(self, spec: ModelSpec, tp: int, rows: int, graphs: bool) -> tuple[float, float]:
        """Of the last stage of a decode pass, the device's head and the host's sampling."""
        ...

    def decode_host(self, spec: ModelSpec, tp: int, rows: int, graphs: bool) -> float:
        """Host seconds of a decode pass beside what its layers wait for."""
        ...

    def send(self, nbytes: float, across: bool, *, decode: bool = False) -> float:
        """From stage to stage; with `decode` what a pass of few bytes waits for it, hosts taken in."""
        ...

    def step(self, held: float, dp: int, across: bool) -> float:
        """An optimizer step of `held` parameters, which `dp` replicas share out, and what they exchange."""
        ...

    def notes(self) -> list[str]:
        """What was asked that is far from what was measured."""
        ...

    def describe(self) -> str:
        """The figures it rests on, for people."""
        ...


def tensor_apart(nodes: Nodes | None, tp: int) -> bool:
    """Whether a tensor group of consecutive ranks is on several nodes."""
    return nodes is not None and (tp > nodes.devices or nodes.devices % tp != 0)


def replicas_apart(nodes: Nodes | None, layout: Layout) -> bool:
    """Whether the replicas of a stage are on several nodes."""
    width = layout.tp * layout.dp
    return nodes is not None and (width > nodes.devices or nodes.devices % width != 0)


def stages_apart(nodes: Nodes | None, layout: Layout, stage: int) -> bool:
    """Whether a stage sends to another node: both stages together are not on one."""
    width = layout.tp * layout.dp
    return nodes is not None and nodes.apart(stage * width, 2 * width)


def layer_products(spec: ModelSpec, one: Pass) -> float:
    """FLOPs of a layer's matrix products; attention's over all pairs, as without a fused kernel."""
    attention = 2 * layer_attention_flops(spec, one.length) / one.length
    return one.tokens * (layer_matmul_flops(spec) + attention)


def all_reduced(ranks: int, nbytes: float) -> float:
    """Bytes that an all-reduce in a ring moves per rank."""
    return 2 * (ranks - 1) / ranks * nbytes


def gathered(ranks: int, nbytes: float) -> float:
    """Bytes that an all-gather or reduce-scatter moves per rank, of `nbytes` of the whole tensor."""
    return (ranks - 1) / ranks * nbytes
