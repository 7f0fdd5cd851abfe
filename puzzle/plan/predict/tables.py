"""A cost model of measurements: tables of one machine and engine, and what lies between their rows.

Layers are interpolated as utilisation: FLOP/s over FLOPs of a pass and tensor rank, both of which carry over
to models of other widths better than seconds over tokens do. Decode passes read memory: their seconds are
linear in rows and cached tokens between measurements, and those of links in bytes. Asked far outside of what
was measured, a table says so (`Tables.notes`), and very far outside it refuses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from puzzle.errors import UserError
from puzzle.plan.predict.between import by_rate, linear, no_longer
from puzzle.plan.predict.costs import (
    DecodeSeconds,
    Fixed,
    HeadSeconds,
    LayerSeconds,
    Nodes,
    Pass,
    all_reduced,
    gathered,
    layer_products,
)
from puzzle.spec.flops import layer_matmul_flops
from puzzle.spec.model import ModelSpec

FAR, TOO_FAR = 4.0, 64.0
"""Times beyond the least or the most that was measured: marked; beyond the most: refused."""


@dataclass(frozen=True)
class Shape:
    """Widths of a decoder layer."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, spec: ModelSpec) -> Shape:
        """Those of a model."""
        return cls(spec.hidden_size, spec.intermediate_size, spec.num_heads, spec.num_kv_heads, spec.head_dim)

    def distance(self, other: Shape) -> float:
        """0 for the same; sums of logarithms."""
        mine = (self.hidden, self.ffn, self.heads * self.head_dim, self.kv_heads * self.head_dim)
        theirs = (other.hidden, other.ffn, other.heads * other.head_dim, other.kv_heads * other.head_dim)
        return sum(abs(math.log(a / b)) for a, b in zip(mine, theirs, strict=True))


@dataclass(frozen=True)
class LayerRow:
    """A layer's pass over `tokens` tokens in sequences of `length`: seconds of the device without gradients,
    with them, backward, of that the gradients of weights; and of the host to issue the three passes."""

    shape: Shape
    tp: int
    tokens: int
    length: int
    infer_s: float
    forward_s: float
    backward_s: float
    weights_s: float
    issue_infer_s: float
    issue_forward_s: float
    issue_backward_s: float

    @property
    def flops(self) -> float:
        """Of the forward pass, per tensor rank."""
        return _flops(self.shape, self.tokens, self.length) / self.tp


@dataclass(frozen=True)
class HeadRow:
    """Log-probabilities at `tokens` positions over `vocab` tokens: seconds of the device, and of the host to
    issue them."""

    hidden: int
    vocab: int
    tp: int
    tokens: int
    infer_s: float
    forward_s: float
    backward_s: float
    issue_infer_s: float
    issue_forward_s: float
    issue_backward_s: float

    @property
    def flops(self) -> float:
        """Of the forward pass, per tensor rank."""
        return 2 * self.hidden * self.vocab * self.tokens / self.tp


@dataclass(frozen=True)
class DecodeRow:
    """One token of `rows` sequences with `cached` tokens each: seconds of a layer, and of all that comes once
    a pass (embedding, head, sampling); replayed as a graph, and launched step by step, the host's part
    included. `host_s`: of the host for a pass that is replayed, while the device may be at the one before."""

    shape: Shape
    vocab: int
    tp: int
    rows: int
    cached: float
    graph_s: float
    graph_rest_s: float
    eager_s: float
    eager_rest_s: float
    host_s: float


@dataclass(frozen=True)
class CollectiveRow:
    """A collective of `ranks` ranks on `nodes` nodes; `bytes` of the whole tensor."""

    op: str
    ranks: int
    nodes: int
    bytes: int
    s: float


@dataclass(frozen=True)
class MessageRow:
    """A message between two ranks."""

    bytes: int
    same_node: bool
    s: float


@dataclass(frozen=True)
class StepRow:
    """An optimizer step shared out over `dp` replicas, sums of gradients and spreading of weights included:
    seconds per parameter that a replica's rank holds."""

    dp: int
    held_s: float


Row = TypeVar("Row", LayerRow, HeadRow, DecodeRow)


@dataclass(frozen=True)
class Tables:
    """Measurements of one machine and engine; `item` is bytes of a weight and of a hidden state's element.

    `step_s_per_parameter`: of an optimizer step, per parameter that a rank steps. `marks` collects what was
    asked far outside.
    """

    item: int
    layers: tuple[LayerRow, ...]
    heads: tuple[HeadRow, ...]
    decodes: tuple[DecodeRow, ...]
    collectives: tuple[CollectiveRow, ...]
    messages: tuple[MessageRow, ...]
    step_s_per_parameter: float
    pass_host: float
    steps: tuple[StepRow, ...] = ()
    fixed: Fixed = field(default_factory=Fixed)
    nodes: Nodes | None = None
    marks: dict[str, None] = field(default_factory=dict, compare=False, repr=False)

    this_engine = True

    @property
    def tensor_parallel(self) -> bool:
        """Whether layers were measured with tp of at least 2."""
        return any(row.tp > 1 for row in self.layers)

    def layer(self, spec: ModelSpec, tp: int, one: Pass, across: bool) -> LayerSeconds:
        """By utilisation at as many FLOPs per rank; where this tp was not measured, from tp 1 and what the
        collectives of a layer take."""
        rows, flops = self._rows(self.layers, Shape.of(spec), tp), layer_products(spec, one) / tp
        extra = 0.0
        if not rows or across:
            rows = self._rows(self.layers, Shape.of(spec), 1)
            extra = self._layer_collectives(spec, tp, one.tokens, across)
        if not rows:
            raise UserError(f"the calibration has no layers of tp {tp}: take it again with more devices")

        def seconds(of: Callable[[LayerRow], float]) -> float:
            return self._at_flops([(row.flops, of(row)) for row in rows], flops, "a layer's pass")

        forward = seconds(lambda row: row.forward_s if one.trained else row.infer_s)
        backward = seconds(lambda row: row.backward_s) if one.trained else 0.0
        weights = seconds(lambda row: row.weights_s) if one.trained else 0.0
        issued = min(rows, key=lambda row: abs(math.log(row.flops / flops)))
        issue = issued.issue_forward_s if one.trained else issued.issue_infer_s
        return LayerSeconds(
            forward + extra, backward + 1.5 * extra, weights, issue, issued.issue_backward_s
        )  # a backward gathers inputs again: three gathers where the forward has two

    def _layer_collectives(self, spec: ModelSpec, tp: int, tokens: int, across: bool) -> float:
        if tp == 1:
            return 0.0
        if not across and not any(row.tp == tp for row in self.layers):
            self._mark(f"tp {tp} was not measured: from tp 1 and collectives")
        nbytes = self.item * tokens * spec.hidden_size
        return 2 * (
            self.collective("all_gather", tp, nbytes, across)
            + self.collective("reduce_scatter", tp, nbytes, across)
        )

    def head(self, spec: ModelSpec, tp: int, one: Pass) -> HeadSeconds:
        """By utilisation; a head of one label takes nothing to speak of, and so do no positions."""
        if spec.head == "value" or not one.heads:
            return HeadSeconds(0.0, 0.0, 0.0)
        rows = [row for row in self.heads if row.tp == tp] or [row for row in self.heads if row.tp == 1]
        flops = 2 * spec.hidden_size * spec.vocab_size * one.heads / tp
        widest = min(rows, key=lambda row: abs(math.log(row.hidden / spec.hidden_size)))
        alike = [row for row in rows if (row.hidden, row.vocab) == (widest.hidden, widest.vocab)]

        def seconds(of: Callable[[HeadRow], float]) -> float:
            return self._at_flops([(row.flops, of(row)) for row in alike], flops, "a head's pass")

        forward = seconds(lambda row: row.forward_s if one.trained else row.infer_s)
        backward = seconds(lambda row: row.backward_s) if one.trained else 0.0
        issued = seconds(lambda row: row.issue_forward_s if one.trained else row.issue_infer_s)
        back = seconds(lambda row: row.issue_backward_s) if one.trained else 0.0
        return HeadSeconds(forward, backward, backward / 2, issued, back)

    def decode(
        self, spec: ModelSpec, tp: int, rows: int, cached: float, graphs: bool, across: bool
    ) -> DecodeSeconds:
        """Between measured rows and cached tokens. Models of other widths take what lies between two measured
        ones, linear in the bytes that a layer reads; where only one was measured, as many times as long."""
        extra, measured = 0.0, tp
        if across or not any(row.tp == tp for row in self.decodes):
            measured = 1
            nbytes = self.item * rows * spec.hidden_size
            extra = 2 * self.collective("all_reduce", tp, nbytes, across) if tp > 1 else 0.0
            if tp > 1 and not across:
                self._mark(f"decode with tp {tp} was not measured: from tp 1 and collectives")
        nearest = self._rows(self.decodes, Shape.of(spec), measured)
        if not nearest:
            raise UserError(f"the calibration has no decode passes of tp {tp}: take it again")

        def seconds(found: Sequence[DecodeRow]) -> float:
            return self._decoded(found, rows, cached, lambda row: row.graph_s if graphs else row.eager_s)

        def read(of: Shape, parts: int) -> float:
            columns = 2 * of.heads * of.head_dim + 2 * of.kv_heads * of.head_dim + 3 * of.ffn
            kv = 2 * max(1.0, of.kv_heads / parts) * of.head_dim * cached * rows
            return of.hidden * columns / parts + kv

        asked, shape = read(Shape.of(spec), tp), nearest[0].shape
        others = {row.shape for row in self.decodes if row.tp == measured}
        if shape == Shape.of(spec) or len(others) == 1:
            device = asked / read(shape, measured) * seconds(nearest)
        else:
            alike = {
                read(one, measured): seconds([r for r in self.decodes if (r.shape, r.tp) == (one, measured)])
                for one in others
            }
            device = linear(no_longer(alike.items()), asked)
        least = min(row.rows for row in nearest)
        host = 0.0 if graphs else min(row.eager_s for row in nearest if row.rows == least)
        return DecodeSeconds(device + extra, host)

    def decode_head(self, spec: ModelSpec, tp: int, rows: int, graphs: bool) -> tuple[float, float]:
        """What comes once a pass, as one number."""
        found = self._rows(self.decodes, Shape.of(spec), tp) or self._rows(self.decodes, Shape.of(spec), 1)
        most = max(row.cached for row in found)
        rest = self._decoded(found, rows, most, lambda row: row.graph_rest_s if graphs else row.eager_rest_s)
        return rest, 0.0

    def decode_host(self, spec: ModelSpec, tp: int, rows: int, graphs: bool) -> float:
        """As measured of replayed passes, whatever is cached; of launched ones, that of any pass."""
        if not graphs:
            return self.pass_host
        found = self._rows(self.decodes, Shape.of(spec), tp) or self._rows(self.decodes, Shape.of(spec), 1)
        return self._decoded(found, rows, found[0].cached, lambda row: row.host_s)

    def _decoded(
        self, found: Sequence[DecodeRow], rows: int, cached: float, of: Callable[[DecodeRow], float]
    ) -> float:
        """Linear in rows, and in cached tokens as the two lengths nearest to them say."""
        lengths = sorted({row.cached for row in found})
        self._range("rows of a decode pass", rows, [row.rows for row in found])
        self._range("cached tokens", cached, lengths)
        values = []
        for length in lengths:
            points = no_longer((row.rows, of(row)) for row in found if row.cached == length)
            values.append((length, max(0.0, linear(points, rows))))
        return max(0.0, linear(values, cached))

    def collective(self, op: str, ranks: int, nbytes: float, across: bool = False) -> float:
        """Seconds; of more ranks than were measured, at the bandwidth of the most."""
        if ranks == 1:
            return 0.0
        moved = (all_reduced if op == "all_reduce" else gathered)(ranks, nbytes)
        if across and self.nodes is not None:
            return self.nodes.small + moved / self.nodes.bus
        known = [row for row in self.collectives if row.op == op and row.nodes == 1]
        if not known:
            raise UserError(f"the calibration has no {op}: take it again with at least 2 devices")
        nearest = min({row.ranks for row in known}, key=lambda n: (abs(n - ranks), n))
        if nearest != ranks:
            self._mark(f"collectives of {ranks} ranks were not measured: at the rate of {nearest}")
        scale = (all_reduced if op == "all_reduce" else gathered)(nearest, 1.0)
        points = no_longer((row.bytes * scale, row.s) for row in known if row.ranks == nearest)
        return max(points[0][1], linear(points, moved))

    def send(self, nbytes: float, across: bool, *, decode: bool = False) -> float:
        """As measured, of decode passes as of others."""
        if across and self.nodes is not None:
            return self.nodes.small + nbytes / self.nodes.message
        points = no_longer((row.bytes, row.s) for row in self.messages if row.same_node)
        if not points:
            raise UserError("the calibration has no messages: take it again with at least 2 devices")
        return max(points[0][1], linear(points, nbytes))

    def step(self, held: float, dp: int, across: bool) -> float:
        """As measured of so many replicas; else own rows, sums of fp32 gradients and spreading of weights."""
        measured = next((row for row in self.steps if row.dp == dp), None)
        if measured is not None and not across:
            return measured.held_s * held
        seconds = self.step_s_per_parameter * held / dp
        if dp > 1:
            seconds += self.collective("reduce_scatter", dp, 4 * held, across)
            seconds += self.collective("all_gather", dp, self.item * held, across)
        return seconds

    def notes(self) -> list[str]:
        """What was asked far outside of the tables."""
        return list(self.marks)

    def describe(self) -> str:
        """How much was measured."""
        tps = ", ".join(map(str, sorted({row.tp for row in self.layers})))
        return (
            f"measured: {len(self.layers)} layer passes (tp {tps}), {len(self.decodes)} decode passes,"
            f" {len(self.collectives)} collectives, {len(self.messages)} messages"
        )

    def _rows(self, table: Sequence[Row], shape: Shape, tp: int) -> list[Row]:
        """Those of a tp, and of the measured shape that is nearest."""
        found = [row for row in table if row.tp == tp]
        if not found or isinstance(found[0], HeadRow):
            return found
        nearest = min((row.shape for row in found), key=shape.distance)
        if shape.distance(nearest) > 0:
            self._mark(
                f"no layers of hidden size {shape.hidden} were measured: from hidden size {nearest.hidden}"
            )
        return [row for row in found if row.shape == nearest]

    def _at_flops(self, points: Iterable[tuple[float, float]], flops: float, what: str) -> float:
        """Seconds of a pass of `flops`; below what was measured no less than the smallest pass."""
        ordered = no_longer(points)
        self._range(what, flops, [flops for flops, _ in ordered])
        return by_rate(ordered, flops)

    def _range(self, what: str, asked: float, known: Sequence[float]) -> None:
        """Less than was measured takes no less; how much more takes is known the less the further it is."""
        least, most = min(known), max(known)
        if asked / most > TOO_FAR:
            raise UserError(
                f"{what}: {asked:.3g} is asked for, {least:.3g} to {most:.3g} were measured;"
                " take a calibration with such sizes"
            )
        if max(least / max(asked, 1e-9), asked / most) > FAR:
            side = "less" if asked < least else "more"
            self._mark(f"{what}: far {side} than the {least:.3g} to {most:.3g} that were measured")

    def _mark(self, text: str) -> None:
        self.marks[text] = None


def _flops(shape: Shape, tokens: int, length: int) -> float:
    """As `costs.layer_products`."""
    spec = ModelSpec("llama", 2, shape.hidden, shape.ffn, 1, shape.heads, shape.kv_heads, shape.head_dim)
    return layer_products(spec, Pass(tokens, length, 0)) if tokens else layer_matmul_flops(spec)
