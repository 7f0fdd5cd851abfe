"""Seconds of one pass of every stage, by what its device computes and what its host issues.

Device and host are two lanes: the host runs ahead of the device. Of the published engine, whose host waits
for every pass, a pass takes the longer of both; this one's never waits, from pass to pass and from model to
model (`recurrences`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from puzzle.plan.layout import Layout
from puzzle.plan.predict.costs import Costs, Pass, stages_apart, tensor_apart
from puzzle.plan.predict.recurrences import StageCosts
from puzzle.spec.model import ModelSpec


def stage_costs(
    spec: ModelSpec, layout: Layout, one: Pass, costs: Costs, *, recompute: bool = False, split: bool = False
) -> StageCosts:
    """Every stage's seconds of a micro-batch, and if backwards are `split` what the weights' gradients take.

    A message holds up the stage that sends it. With `recompute` a backward has the forward before it. Parts
    of a split backward have half of the host's work each.
    """
    last = layout.pp - 1
    layer = costs.layer(spec, layout.tp, one, tensor_apart(costs.nodes, layout.tp))
    head = costs.head(spec, layout.tp, one)
    nbytes = costs.item * one.tokens * spec.hidden_size
    sent = [costs.send(nbytes, stages_apart(costs.nodes, layout, stage)) for stage in range(last)]
    again = recompute and one.trained
    if spec.lora is not None:  # whose weights have no gradients
        layer = replace(layer, backward=layer.backward - layer.weights, weights=0.0)
        head = replace(head, backward=head.backward - head.weights, weights=0.0)
    backward_s = layer.backward + (layer.forward if again else 0.0)
    issue_s = layer.issue_backward + (layer.issue_forward if again else 0.0)
    forward, backward, weights, issued, issued_back = [], [], [], [], []
    for stage, layers in enumerate(layout.stage_layers):
        hosts = layers * layer.issue_forward + costs.pass_host, layers * issue_s
        there, back, apart = layers * layer.forward, layers * backward_s, 0.0
        if split:
            apart = layers * layer.weights
        if not costs.this_engine:
            there = max(there, hosts[0])
            if split:
                apart = max(apart, hosts[1] / 2)
                back = max(layers * (backward_s - layer.weights), hosts[1] / 2) + apart
            back = max(back, hosts[1])
        headed = stage == last
        if headed:
            there, back = there + head.forward, back + head.backward
            apart += head.weights if split else 0.0
        forward.append(there + (sent[stage] if stage < last else 0.0))
        backward.append(back + (sent[stage - 1] if stage else 0.0))
        weights.append(apart)
        issued.append(hosts[0] + head.issue_forward * headed)
        issued_back.append(hosts[1] + costs.pass_host + head.issue_backward * headed)
    lanes = (tuple(issued), tuple(issued_back)) if costs.this_engine else ((), ())
    return StageCosts(
        tuple(forward),
        tuple(backward),
        tuple(weights) if split else (),
        issued=lanes[0],
        issued_back=lanes[1],
    )


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


def decode_stages(
    spec: ModelSpec, layout: Layout, rows: int, cached: float, costs: Costs, graphs: bool = False
) -> DecodeStages:
    """A decode micro-batch of `rows` sequences with `cached` tokens each, on average."""
    layer = costs.decode(spec, layout.tp, rows, cached, graphs, tensor_apart(costs.nodes, layout.tp))
    nbytes, sent = costs.item * rows * spec.hidden_size, 0.0
    if layout.pp > 1:
        across = any(stages_apart(costs.nodes, layout, stage) for stage in range(layout.pp - 1))
        sent = costs.send(nbytes, across, decode=True)
    device = [layers * layer.device + sent for layers in layout.stage_layers]
    head, sampling = costs.decode_head(spec, layout.tp, rows, graphs)
    device[-1] += head
    beside = costs.decode_host(spec, layout.tp, rows, graphs)
    host = tuple(layers * layer.host + beside for layers in layout.stage_layers)
    return DecodeStages(host, tuple(device), sampling)
