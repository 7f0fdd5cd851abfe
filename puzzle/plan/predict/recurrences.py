"""How long pipelines take, without making their schedules.

The same virtual time as `plan.simulate` of `plan.pipeline.schedules`, by the recurrences that those schedules
obey: a pass begins when the pass before it on its stage and the one that it reads have ended. Unit k is the
k-th micro-batch of all models in the order of their forwards.

Where hosts are told apart, each issues the passes of its stage one after another and waits for nothing. A
device begins a pass no earlier than its host, and ends it no earlier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Seconds = tuple[float, ...]
"""One number per pipeline stage."""


@dataclass(frozen=True)
class StageCosts:
    """Seconds of one micro-batch of a model by stage. `weights` are those of the gradients of weights, out of
    `backward`, where backwards are split. `hop`: how much later than a pass ends the next stage may read its
    result, while both stages go on. `issued` and `issued_back`: of the hosts, for forward and backward; none
    where they are in the passes."""

    forward: Seconds
    backward: Seconds = ()
    weights: Seconds = ()
    hop: float = 0.0
    issued: Seconds = ()
    issued_back: Seconds = ()

    def alone(self) -> StageCosts:
        """As if hosts waited for every pass: each takes the longer of both."""
        if not self.issued:
            return self
        forward = tuple(map(max, self.forward, self.issued))
        weights = tuple(max(one, host / 2) for one, host in zip(self.weights, self.issued_back, strict=False))
        backward = tuple(map(max, self.backward, self.issued_back))
        if weights:
            parts = zip(self.backward, self.weights, self.issued_back, weights, strict=True)
            backward = tuple(max(whole - own, host / 2) + apart for whole, own, host, apart in parts)
        return StageCosts(forward, backward, weights, self.hop)


def issued(costs: Sequence[StageCosts], counts: Sequence[int], trained: bool) -> list[float]:
    """Seconds that the host of each stage issues."""
    found = [0.0] * len(costs[0].forward)
    for model, count in zip(costs, counts, strict=True):
        for lane in (model.issued, model.issued_back if trained else ()):
            for stage, seconds in enumerate(lane):
                found[stage] += count * seconds
    return found


class _Hosts:
    """When the host of each stage has issued what came so far."""

    def __init__(self, costs: Sequence[StageCosts], begin: Seconds) -> None:
        self.clock = list(begin or (0.0,) * len(costs[0].forward))
        self.told = bool(costs[0].issued)

    def done(self, stage: int, ready: float, seconds: float, issue: float) -> float:
        """When the device has done a pass that is `ready` so early, and whose issue comes next."""
        if not self.told:
            return ready + seconds
        begun = self.clock[stage]
        self.clock[stage] = begun + issue
        return max(max(ready, begun) + seconds, begun + issue)


def forward_makespan(costs: Sequence[StageCosts], counts: Sequence[int], begin: Seconds = ()) -> float:
    """Seconds of `forward_only`: `counts[i]` micro-batches of model i, the models one after the other.

    Of one model sum(f) + (P - 1) hop + (M - 1) max(f); of several the recurrence of a permutation flow shop.
    A stage sends unit k once unit k - 1 has left, which is received from the end of unit k - 3 on. Hosts
    `begin` so much later than devices could, or earlier.
    """
    last, hosts = len(costs[0].forward) - 1, _Hosts(costs, begin)
    if len(costs) == 1 and not hosts.told:
        model = costs[0]
        return sum(model.forward) + last * model.hop + (counts[0] - 1) * max(model.forward)
    free = none = [0.0] * (last + 1)
    behind = [free] * 3
    for model, count in zip(costs, counts, strict=True):
        issue = model.issued or none
        for _ in range(count):
            ready, free = -model.hop, list(free)
            for stage, seconds in enumerate(model.forward):
                ready = hosts.done(stage, max(free[stage], ready + model.hop), seconds, issue[stage])
                if stage < last and (received := behind[0][stage + 1]) > ready:
                    ready = received
                free[stage] = ready
            behind = [*behind[1:], free]
    return free[last]


def training_makespan(costs: Sequence[StageCosts], counts: Sequence[int], begin: Seconds = ()) -> float:
    """Seconds of `one_f_one_b` without the optimizer: `counts[i]` micro-batches of model i, the models one
    after the other in one pipeline; backwards are split where the first model's `weights` are given. `begin`
    as in `forward_makespan`.

    Round j has the forward of unit j + P - 1 - s on every stage s, which reads one of the round before, and
    the backward of unit j on all stages, the last one first. O(P M) time. Where stages of several models
    differ much, a schedule may take longer: its stages also wait until what they send is received.
    """
    num_stages, last, hosts = len(costs[0].forward), sum(counts) - 1, _Hosts(costs, begin)
    if num_stages > 1 and costs[0].weights:
        return _split_makespan(costs, counts, hosts)
    units = [model for model, count in zip(costs, counts, strict=True) for _ in range(count)]
    none = (0.0,) * num_stages
    free, sent = [0.0] * num_stages, [0.0] * num_stages
    for j in range(1 - num_stages, last + 1):
        back = units[j] if j >= 0 else None
        returned = 0.0
        for stage in range(num_stages - 1, -1, -1):
            clock, k = free[stage], j + num_stages - 1 - stage
            if 0 <= k <= last:
                unit = units[k]
                if stage and (ready := sent[stage - 1] + unit.hop) > clock:
                    clock = ready
                clock = hosts.done(stage, clock, unit.forward[stage], (unit.issued or none)[stage])
                sent[stage] = clock
            if back is not None:
                if returned > clock:
                    clock = returned
                clock = hosts.done(stage, clock, back.backward[stage], (back.issued_back or none)[stage])
                returned = clock + back.hop
            free[stage] = clock
    return max(free)


def training_least(costs: Sequence[StageCosts], counts: Sequence[int], begin: Seconds = ()) -> float:
    """What `training_makespan` never falls below, and is where stages are alike, one model's backwards whole
    and hosts not told apart: max over stages of sum(f before) + sum over models M (f + b) + sum(b before), or
    what the host of a stage issues. O(P) time.

    A stage begins when the first micro-batch has passed the stages before it, does all of its work, and the
    last backward then passes those stages. Weights' gradients that are split off may come in between.
    """
    first, last, best, before, after = costs[0], costs[-1], 0.0, 0.0, 0.0
    for stage in range(len(first.forward)):
        own = sum(
            count * (model.forward[stage] + model.backward[stage])
            for model, count in zip(costs, counts, strict=True)
        )
        best = max(best, before + own + (after if not last.weights else 0.0))
        before += first.forward[stage] + first.hop
        after += last.backward[stage] + last.hop
    late = begin or (0.0,) * len(first.forward)
    return max(best, *(a + b for a, b in zip(late, issued(costs, counts, True), strict=True)))


def _split_makespan(costs: Sequence[StageCosts], counts: Sequence[int], hosts: _Hosts) -> float:
    """The same where the gradients of weights come `stage` units after those of what a stage reads; a host
    takes half of a backward for either."""
    units = [model for model, count in zip(costs, counts, strict=True) for _ in range(count)]
    num_stages, last = len(costs[0].forward), len(units) - 1
    none = (0.0,) * num_stages
    free, sent, done = [0.0] * num_stages, [0.0] * num_stages, [0] * num_stages
    for j in range(1 - num_stages, last + 1):
        returned = 0.0
        for stage in range(num_stages - 1, -1, -1):
            k = j + num_stages - 1 - stage
            if 0 <= k <= last:
                unit = units[k]
                ready = max(free[stage], sent[stage - 1] + unit.hop if stage else 0.0)
                ready = hosts.done(stage, ready, unit.forward[stage], (unit.issued or none)[stage])
                sent[stage] = free[stage] = ready
            if j < 0:
                continue
            unit = units[j]
            rest, half = unit.backward[stage] - unit.weights[stage], (unit.issued_back or none)[stage] / 2
            free[stage] = hosts.done(stage, max(free[stage], returned), rest, half)
            returned = free[stage] + unit.hop
            due = last + 1 if j == last else max(0, j + 1 - stage)
            for one in units[done[stage] : due]:
                issue = (one.issued_back or none)[stage] / 2
                free[stage] = hosts.done(stage, free[stage], one.weights[stage], issue)
            done[stage] = due
    return max(free)
