"""Parts of a run's plan: what they count, what they say to people and logs, who may share a pipeline."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest

from puzzle.plan.cluster import Cluster
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.run import BatchPlan, ModelPlan, SharedPipeline, SwitchRequest
from puzzle.spec.published import published

SPEC = published("350m")


def model(role: str, pp: int, trained: bool = True) -> ModelPlan:
    return ModelPlan(role, SPEC, Placement.default(Layout.even(1, pp, 4 // pp, 16)), trained)


@pytest.mark.parametrize(
    ("fuse", "stages", "text", "may_share"),
    [
        (True, (2, 2), "actor, critic: in one pipeline", True),
        ("auto", (2, 2), "actor, critic: in one pipeline if that is faster", True),
        (False, (2, 2), "actor, critic: one after the other", False),
        ("auto", (2, 4), "actor, critic: one after the other, as actor has pp=2 and critic has pp=4", False),
        (False, (2, 4), "actor, critic: one after the other", False),
        (True, (2,), "actor", False),
        (False, (2,), "actor", False),
    ],
)
def test_models_share_a_pipeline_where_that_is_asked_for_and_possible(
    fuse: bool | Literal["auto"], stages: tuple[int, ...], text: str, may_share: bool
) -> None:
    models = tuple(model(role, pp) for role, pp in zip(("actor", "critic"), stages, strict=False))
    shared = SharedPipeline(models, fuse)
    assert (str(shared), shared.may_share) == (text, may_share)
    obstacle = "actor has pp=2 and critic has pp=4" if stages == (2, 4) else None
    assert shared.describe() == {"roles": list(shared.roles), "fuse": fuse, "obstacle": obstacle}
    assert shared.roles == ("actor", "critic")[: len(stages)]


def test_a_batch_counts_sequences_tokens_and_steps() -> None:
    """Of 6 prompts with 4 samples each, in minibatches of 8, twice; 10 iterations."""
    batch = BatchPlan(iterations=10, prompts=6, samples=4, minibatch=8, epochs=2, prompt=5, response=7)
    rows = [(prompt, sample) for prompt in range(6) for sample in range(4)]
    steps = [(epoch, rows[i : i + 8]) for epoch in range(2) for i in range(0, len(rows), 8)]
    assert (batch.sequences, batch.steps, batch.all_steps) == (len(rows), len(steps), 10 * len(steps))
    assert batch.describe() == {
        "iterations": 10,
        "prompts": 6,
        "samples": 4,
        "sequences": 24,
        "minibatch": 8,
        "optimizer_steps": 6,
        "most_tokens": 12,
    }


def test_a_model_says_its_shape_and_layout() -> None:
    value = replace(SPEC, head="value")
    found = ModelPlan("critic", value, Placement.default(Layout(2, 3, 1, (6, 5, 5))), False).describe()
    assert found == {
        "family": "llama",
        "layers": 16,
        "hidden": 512,
        "vocabulary": 32000,
        "head": "value",
        "parameters": value.parameters,
        "layout": {"tp": 2, "pp": 3, "dp": 1, "stage_layers": [6, 5, 5]},
        "trained": False,
    }


def test_a_switch_out_of_zero_shards_saves_what_replicas_would_have_gathered_first() -> None:
    """One stage of two replicas to two stages: either way a rank ends with one half of the layers. Gathered
    weights have brought it the other replica's rows of all layers; out of shards only those of its half."""
    source, destination = (Placement.default(Layout.even(*sizes, 16)) for sizes in ((1, 1, 2), (1, 2, 1)))
    request = SwitchRequest(SPEC, source, destination, Cluster(8), "planned", 2, 1 << 20, zero=True)
    # Rows of every matrix halve evenly, so that both replicas step half of all elements.
    whole = 2 * SPEC.parameters
    gathered = 2 * whole // 2  # two ranks, each half of the model
    assert request.plan.zero
    assert request.saved_bytes == gathered - request.plan.bytes_received
    assert request.plan.bytes_received == pytest.approx(whole / 2, rel=0.01)
    assert request.describe() == {
        "from": {"tp": 1, "pp": 1, "dp": 2, "stage_layers": [16]},
        "to": {"tp": 1, "pp": 2, "dp": 1, "stage_layers": [8, 8]},
        "devices_per_node": 8,
        "strategy": "planned",
        "itemsize": 2,
        "staging_bytes": 1 << 20,
        "zero": True,
    }
    plain = replace(request, zero=False)
    assert plain.saved_bytes == 0
    assert not plain.plan.zero
    assert plain.plan.bytes_received == 0  # every rank has the whole model
    # Onto other ranks what travels after the gather counts, too.
    away = replace(request, destination=Placement.default(Layout.even(1, 2, 1, 16), 2))
    assert away.saved_bytes == gathered + whole - away.plan.bytes_received
    assert away.plan.bytes_received == whole
