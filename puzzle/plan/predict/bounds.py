"""What bounds each stage of a predicted iteration: whose lane is full, and how much is neither lane's."""

from __future__ import annotations

from collections.abc import Sequence

from puzzle.plan.predict.costs import Costs, Pass, tensor_apart
from puzzle.plan.predict.iteration import (
    Part,
    Workload,
    decode_cut,
    decode_seconds,
    generation_seconds,
    inference_seconds,
    pipeline_costs,
    step_seconds,
    training_seconds,
)
from puzzle.plan.predict.passes import decode_stages


def bounds(work: Workload, costs: Costs) -> dict[str, str]:
    """A few words on every stage."""
    found = {
        "switch": "nothing is moved" if work.generation == work.actor.layout else "messages",
        "generation": _generation(work, costs),
        "inference": _pipeline(work, work.inferred, work.sequences, 1, inference_seconds(work, costs), costs),
    }
    seconds = training_seconds(work, costs)
    said = _pipeline(work, work.trained, work.minibatch, work.steps, seconds, costs)
    steps = work.steps * sum(step_seconds(part, costs) for part in work.trained[: work.stepped])
    return found | {"training": f"{said}, {steps / seconds:.0%} optimizer"}


def _generation(work: Workload, costs: Costs) -> str:
    size, count = decode_cut(work)
    cached = work.prompt + work.response / 2
    ring = decode_stages(work.actor.spec, work.generation, size, cached, costs, work.graphs)
    ways = {
        "hosts issue decode passes": count * max(ring.host),
        "devices run decode passes": count * max(ring.device),
        "a micro-batch goes round the ring alone": sum(ring.device) + ring.sampling,
    }
    whole = generation_seconds(work, costs)
    rest = whole - decode_seconds(work, costs)
    return f"{max(ways, key=lambda name: ways[name])}, {rest / whole:.0%} before the first of them"


def _pipeline(
    work: Workload, parts: Sequence[Part], sequences: int, times: int, whole: float, costs: Costs
) -> str:
    """Idle is what the busiest stage does not work."""
    trained = parts is work.trained
    stages, counts = pipeline_costs(parts, work, sequences, costs, trained)
    stages = [one.alone() for one in stages]
    busy = max(
        sum(
            count * (one.forward[stage] + (one.backward[stage] if trained else 0.0))
            for one, count in zip(stages, counts, strict=True)
        )
        for stage in range(len(stages[0].forward))
    )
    if trained:
        busy += sum(step_seconds(part, costs) for part in parts[: work.stepped])
    part, length = parts[0], round(work.tokens)
    tp, rows = part.layout.tp, min(sequences, work.microbatch or sequences)
    one = Pass(rows * length, length, rows * length, trained)
    layer = costs.layer(part.spec, tp, one, tensor_apart(costs.nodes, tp))
    host = layer.issue_forward + layer.issue_backward * trained > layer.forward + layer.backward * trained
    return f"{'hosts issue' if host else 'devices compute'}, {max(0.0, 1 - times * busy / whole):.0%} idle"
