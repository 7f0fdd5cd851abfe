"""What searches of layouts are tested with: PPO of a small model with four roles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from puzzle.plan.layout import Layout
from puzzle.plan.predict.iteration import Part, Workload
from puzzle.plan.predict.job import Job, Role, Sizes
from puzzle.spec.model import ModelSpec


def cut(spec: ModelSpec, laid: Sizes) -> Layout:
    """Layers shared evenly."""
    return Layout.even(*laid, spec.num_layers)


def workload(spec: ModelSpec, sequences: int, prompt: int, response: int, **more: Any) -> Workload:
    """Two steps on half of the sequences each; layouts and parts are left to the search."""
    part = Part(spec, cut(spec, (1, 1, 1)))
    return Workload(
        actor=part,
        generation=part.layout,
        trained=(part,),
        inferred=(part,),
        stepped=2,
        sequences=sequences,
        minibatch=sequences // 2,
        steps=2,
        prompt=prompt,
        response=response,
        microbatch=None,
        **more,
    )


def job(spec: ModelSpec, work: Workload, offload_reference: bool = False, **more: Any) -> Job:
    """An actor, a critic, a reference and a reward model, all of one shape."""
    value = replace(spec, head="value")
    usual: dict[str, Any] = {
        "per_node": 8,
        "memory": 1 << 40,
        "itemsize": 2,
        "fused": True,
        "compiled": False,
        "staging": 1 << 16,
        "exact": True,
    }
    return Job(
        roles=(
            Role("actor", spec, True),
            Role("critic", value, True),
            Role("reference", spec, False, offload=offload_reference),
            Role("reward", value, False),
        ),
        trained=("actor", "critic"),
        inferred=("reference", "critic", "reward"),
        work=work,
        layout=cut,
        **{**usual, **more},
    )
