"""The choice of streams: by simulation, with other winners for other costs."""

from itertools import permutations

import pytest

from puzzle.plan.pipeline import schedules
from puzzle.plan.pipeline.schedules import Order, PipelineModel
from puzzle.plan.simulate.check import check
from puzzle.plan.simulate.cost import CostTable
from puzzle.plan.simulate.search import (
    choose_fusion,
    inference_candidates,
    search_order,
    search_trials,
    training_candidates,
)
from puzzle.plan.simulate.simulate import simulate
from tests.plan.costs import uniform


def costs(**forward: float) -> CostTable:
    """Backwards of twice the forward; an optimizer in proportion to the model."""
    shares = {"forward": 1.0, "backward": 2.0, "reduce": 0.5, "norm": 0.01, "step": 0.5, "gather": 0.5}
    wires = {"activation": 0.01, "gradient": 0.01}
    return CostTable({m: {**{k: f * x for k, x in shares.items()}, **wires} for m, f in forward.items()})


def training(cost: CostTable, microbatches: int = 4, num_stages: int = 4) -> list[str]:
    models = [PipelineModel("actor", microbatches), PipelineModel("critic", microbatches)]
    estimates = choose_fusion(training_candidates(models, num_stages, cost), cost)
    for estimate in estimates:
        assert all(check(schedule) == [] for schedule in estimate.candidate.schedules)
        assert estimate.seconds == sum(simulate(s, cost).makespan for s in estimate.candidate.schedules)
        assert estimate.flushes == (2 if estimate.candidate.name == "apart" else 1)
    assert [e.seconds for e in estimates] == sorted(e.seconds for e in estimates)
    return [e.candidate.name for e in estimates]


def test_the_best_order_depends_on_the_costs() -> None:
    fixed = [n for n in training(costs(actor=1.0, critic=0.2)) if n != "searched"]
    other = [n for n in training(costs(actor=0.2, critic=1.0)) if n != "searched"]
    assert fixed[0] == "sequential actor critic"
    assert other[0] == "sequential critic actor"


def test_the_search_beats_the_plain_orders_for_unlike_models() -> None:
    """A small model at both ends makes fill and drain short."""
    assert training(costs(actor=1.0, critic=0.2))[0] == "searched"


def test_sharing_does_not_pay_on_one_stage() -> None:
    assert training(costs(actor=1.0, critic=0.2), num_stages=1)[-1] == "apart"
    free = uniform(["actor", "critic"])
    assert training(free, num_stages=1)[0] == "apart"


def test_split_backwards_are_tried_where_their_costs_are_known() -> None:
    models = [PipelineModel("actor", 4), PipelineModel("critic", 4)]
    whole = {"forward": 1.0, "backward": 2.0, "activation": 0.0, "gradient": 0.0, "reduce": 0.0}
    whole |= {"norm": 0.0, "step": 0.0, "gather": 0.0}

    def names(**parts: float) -> list[str]:
        cost = CostTable({m.name: {**whole, **parts} for m in models})
        return [e.candidate.name for e in choose_fusion(training_candidates(models, 4, cost, trials=1), cost)]

    assert not any("split" in name for name in names())
    cheap = names(backward_input=1.0, backward_weight=1.0)
    assert all("split" in name for name in cheap[:5])
    assert len(cheap) == 12
    assert "split" not in names(backward_input=2.0, backward_weight=1.0)[0]
    parts = {key: seconds for key, seconds in whole.items() if key != "backward"}
    parts |= {"backward_input": 1.0, "backward_weight": 1.0}
    cost = CostTable(dict.fromkeys(("actor", "critic"), parts))
    assert all("split" in c.name for c in training_candidates(models, 4, cost, trials=1))


def test_search_finds_the_best_of_all_orders() -> None:
    """Brute force over the 35 orders of 4 + 3 micro-batches."""
    models, cost = [PipelineModel("a", 4), PipelineModel("b", 3)], costs(a=1.0, b=0.3)

    def seconds(order: Order) -> float:
        return simulate(schedules.one_f_one_b(models, 3, order), cost).makespan

    every = {seconds(order) for order in set(permutations("aaaabbb"))}
    found = seconds(search_order("aaaabbb", seconds, trials=400))
    assert found < seconds("aaaabbb")
    assert found == min(every)


def test_long_schedules_are_simulated_less_often() -> None:
    """At most 200 times, and about 2^15 passes in all."""
    models = [PipelineModel("actor", 64), PipelineModel("critic", 64)]
    assert search_trials(models, 8) == 32
    assert [search_trials(models, stages) for stages in (1, 1024)] == [200, 1]


def test_what_costs_nothing_idles_nothing() -> None:
    """And of two pipelines one after the other, idle time is a share of both."""
    models = [PipelineModel("actor", 3), PipelineModel("critic", 6)]
    for estimate in choose_fusion(inference_candidates(models, 2), uniform(["actor", "critic"], 0.0)):
        assert (estimate.seconds, estimate.bubble_share) == (0.0, 0.0)
    every = choose_fusion(inference_candidates(models, 2), uniform(["actor", "critic"]))
    # Of two stages each idles for one pass while a pipeline fills or drains: 4 + 7 passes, or 10.
    shares = {e.candidate.name: (e.seconds, e.bubble_share) for e in every}
    assert shares["actor | critic"] == (11.0, pytest.approx(2 / 11))
    assert shares["actor critic"] == (10.0, pytest.approx(1 / 10))


def test_the_search_keeps_to_its_trials() -> None:
    asked = []
    search_order("aaaabbbb", lambda order: asked.append(order) or len(set(order[:4])), trials=10)
    assert len(asked) == 10


def test_the_search_goes_on_from_the_first_order_that_is_better() -> None:
    """Every order that is asked for is the best one so far with a run moved elsewhere; it ends where no run
    that may be moved helps."""
    costs = {}

    def seconds(order: Order) -> float:
        """How far the b's are from the front."""
        text = "".join(order)
        costs[text] = sum(i for i, name in enumerate(text) if name == "b")
        return costs[text]

    found = "".join(search_order("aaaaabb", seconds, trials=1000))
    asked = list(costs)
    assert asked[0] == "aaaaabb"
    best = asked[0]
    for text in asked[1:]:
        runs = [(i, j) for i in range(7) for j in range(i + 1, 8)]
        moved = {
            rest[:k] + best[i:j] + rest[k:]
            for i, j in runs
            for rest in [best[:i] + best[j:]]
            for k in range(len(rest) + 1)
        }
        assert text in moved
        if costs[text] < costs[best]:
            best = text
    assert found == best == "bbaaaaa"


def test_the_search_begins_with_the_best_plain_order() -> None:
    """With a single trial there is nothing else: the best of the plain orders, not the first of a list."""
    for sizes in ({"actor": 1.0, "critic": 0.2}, {"actor": 0.2, "critic": 1.0}):
        cost = costs(**sizes)
        models = [PipelineModel("actor", 4), PipelineModel("critic", 4)]
        found = {
            e.candidate.name: e.seconds
            for e in choose_fusion(training_candidates(models, 4, cost, trials=1), cost)
        }
        plain = [seconds for name, seconds in found.items() if name not in ("apart", "searched")]
        assert len(plain) == 4
        assert found["searched"] == min(plain) < max(plain)


def test_inference_groups() -> None:
    models = [PipelineModel("reference", 4), PipelineModel("critic", 4), PipelineModel("reward", 4)]
    cost = uniform([m.name for m in models])
    every = choose_fusion(inference_candidates(models, 4), cost)
    assert len(every) == 6 + 3 * 2 + 1
    assert every[0].flushes == 1
    assert every[0].seconds == 12 + 3
    assert every[-1].candidate.name == "reference | critic | reward"
    assert every[-1].seconds == 3 * (4 + 3)
