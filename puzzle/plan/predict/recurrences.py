"""How long pipelines take, without making their schedules.

The same virtual time as `plan.simulate` of `plan.pipeline.schedules`, by the recurrences that those schedules
obey: a pass begins when the pass before it on its stage and the one that it reads have ended. Unit k is the
k-th micro-batch of all models in the order of their forwards.
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
    result, while both stages go on."""

    forward: Seconds
    backward: Seconds = ()
    weights: Seconds = ()
    hop: float = 0.0


def forward_makespan(costs: Sequence[StageCosts], counts: Sequence[int]) -> float:
    """Seconds of `forward_only`: `counts[i]` micro-batches of model i, the models one after the other.

    Of one model sum(f) + (P - 1) hop + (M - 1) max(f); of several the recurrence of a permutation flow shop.
    A stage sends unit k once unit k - 1 has left, which is received from the end of unit k - 3 on.
    """
    last = len(costs[0].forward) - 1
    if len(costs) == 1:
        model = costs[0]
        return sum(model.forward) + last * model.hop + (counts[0] - 1) * max(model.forward)
    free = [0.0] * (last + 1)
    behind = [free] * 3
    for model, count in zip(costs, counts, strict=True):
        for _ in range(count):
            ready, free = -model.hop, list(free)
            for stage, seconds in enumerate(model.forward):
                ready = max(free[stage], ready + model.hop) + seconds
                if stage < last and (received := behind[0][stage + 1]) > ready:
                    ready = received
                free[stage] = ready
            behind = [*behind[1:], free]
    return free[last]


def training_makespan(costs: Sequence[StageCosts], counts: Sequence[int]) -> float:
    """Seconds of `one_f_one_b` without the optimizer: `counts[i]` micro-batches of model i, the models one
    after the other in one pipeline; backwards are split where the first model's `weights` are given.

    Round j has the forward of unit j + P - 1 - s on every stage s, which reads one of the round before, and
    the backward of unit j on all stages, the last one first. O(P M) time. Where stages of several models
    differ much, a schedule may take longer: its stages also wait until what they send is received.
    """
    num_stages, last = len(costs[0].forward), sum(counts) - 1
    if num_stages > 1 and costs[0].weights:
        return _split_makespan(costs, counts)
    units = [model for model, count in zip(costs, counts, strict=True) for _ in range(count)]
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
                clock += unit.forward[stage]
                sent[stage] = clock
            if back is not None:
                if returned > clock:
                    clock = returned
                clock += back.backward[stage]
                returned = clock + back.hop
            free[stage] = clock
    return max(free)


def training_least(costs: Sequence[StageCosts], counts: Sequence[int]) -> float:
    """What `training_makespan` never falls below, and is where stages are alike and one model's backwards
    whole: max over stages of sum(f before) + sum over models M (f + b) + sum(b before). O(P) time.

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
    return best


def _split_makespan(costs: Sequence[StageCosts], counts: Sequence[int]) -> float:
    """The same where the gradients of weights come `stage` units after those of what a stage reads."""
    units = [model for model, count in zip(costs, counts, strict=True) for _ in range(count)]
    num_stages, last = len(costs[0].forward), len(units) - 1
    free, sent, done = [0.0] * num_stages, [0.0] * num_stages, [0] * num_stages
    for j in range(1 - num_stages, last + 1):
        returned = 0.0
        for stage in range(num_stages - 1, -1, -1):
            k = j + num_stages - 1 - stage
            if 0 <= k <= last:
                ready = sent[stage - 1] + units[k].hop if stage else 0.0
                sent[stage] = free[stage] = max(free[stage], ready) + units[k].forward[stage]
            if j < 0:
                continue
            rest = units[j].backward[stage] - units[j].weights[stage]
            free[stage] = max(free[stage], returned) + rest
            returned = free[stage] + units[j].hop
            due = last + 1 if j == last else max(0, j + 1 - stage)
            free[stage] += sum(units[i].weights[stage] for i in range(done[stage], due))
            done[stage] = due
    return max(free)
