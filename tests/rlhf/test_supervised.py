"""Supervised training on real ranks against transformers: losses, gradients, packing, resuming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from puzzle.data.examples import Example
from puzzle.data.masks import Labelled
from puzzle.rlhf.supervised.objectives import DPO, BradleyTerry, CrossEntropy, pair_metrics, pair_sums
from tests.helpers import run_ranks
from tests.reference.tiny import save_lm, save_value
from tests.rlhf import supervised_truth as truth
from tests.rlhf.supervised_ranks import Case, Seen, run

LAYOUTS = {
    "tp2-pp2": {"tp": 2, "pp": 2, "dp": 1},
    "pp4": {"tp": 1, "pp": 4, "dp": 1},
    "dp4": {"tp": 1, "pp": 1, "dp": 4},
    "tp2-dp2": {"tp": 2, "pp": 1, "dp": 2},
}
CLOSE = 1e-5


def rows(count: int, seed: int) -> list[truth.Row]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(4, 14, (), generator=generator))
        tokens = tuple(torch.randint(0, 259, (length,), generator=generator).tolist())
        start = int(torch.randint(0, length - 2, (), generator=generator))
        found.append((tokens, (start, int(torch.randint(start + 2, length + 1, (), generator=generator)))))
    return found


def examples(groups: list[list[truth.Row]], margins: Sequence[float] = ()) -> tuple[Example, ...]:
    made = [tuple(Labelled(tokens, (span,)) for tokens, span in group) for group in groups]
    return tuple(
        Example(number, sequences, margins[number] if margins else 0.0)
        for number, sequences in enumerate(made)
    )


TRAIN = [[row] for row in rows(8, 1)]
HELD_OUT = [[row] for row in rows(9, 2)]  # more than a batch: one replica alone has the last one


def sft(folder: Path, layout: dict[str, int], **changes: Any) -> Case:
    algorithm = {"microbatch_tokens": 32, **changes.pop("algorithm", {})}
    config = {
        "task": "sft",
        "iterations": 1,
        "batch": 8,
        "device": "cpu",
        "layout": layout,
        "actor": {"model": str(folder), "optimizer": {"grad_clip": None, "lr": 1e-3}},
        "data": {"examples": "given", "tokenizer": "bytes", "max_tokens": 16, "shuffle": False},
        "algorithm": {name: value for name, value in algorithm.items() if value is not None},
        **changes,
    }
    return Case(config, examples(TRAIN), examples(HELD_OUT))


PAIRS = [list(pair) for pair in zip(rows(6, 3), rows(6, 4), strict=True)]
HELD_OUT_PAIRS = [list(pair) for pair in zip(rows(7, 5), rows(7, 6), strict=True)]
MARGINS = (0.0, 0.5, 1.0, -0.25, 0.0, 2.0)


def preferring(task: str, folder: Path, layout: dict[str, int], **changes: Any) -> Case:
    """A run that learns from pairs."""
    case = sft(folder, layout, **changes)
    config = {**case.config, "task": task, "batch": 6}
    if task == "reward-model":
        config["reward"] = config.pop("actor")
    margins = MARGINS if task == "reward-model" else ()
    return Case(config, examples(PAIRS, margins), examples(HELD_OUT_PAIRS))


def whole(seen: list[Seen], shapes: dict[str, Any]) -> dict[str, Tensor]:
    """The gradients of the first step, put together of what ranks own."""
    found = {name: torch.full(tuple(shape), torch.nan) for name, shape in shapes.items()}
    for one in seen:
        for name, intervals, values in one.grads[0]:
            found[name][tuple(slice(a, b) for a, b in intervals)] = values
    return found


def assert_close(seen: list[Seen], loss: float, grads: dict[str, Tensor], name: str) -> None:
    for one in seen:
        assert one.metrics[0][f"{name}_loss"] == pytest.approx(loss, rel=CLOSE, abs=CLOSE)
    found = whole(seen, {key: value.shape for key, value in grads.items()})
    for key, wanted in grads.items():
        torch.testing.assert_close(
            found[key], wanted, rtol=CLOSE, atol=CLOSE, msg=partial("{}: {}".format, key)
        )


def resuming(case: Case, folder: Path) -> list[Case]:
    """Four steps, with a checkpoint after the second; from there under another layout; and once more."""
    config = {**case.config, "iterations": 4, "batch": 3, "data": {**case.config["data"], "shuffle": True}}
    straight = replace(case, config=config, folder=str(folder), save_at=2)
    other = {**config, "layout": LAYOUTS["pp4"]}
    return [straight, replace(straight, config=other), straight]


def assert_resumed(found: list[list[Seen]]) -> None:
    """The last case went on from what the third last saved, bitwise as that one itself did; the one between
    them as well but for rounding."""
    for rank in found:
        straight, elsewhere, resumed = rank[-3:]
        for a, b in zip(elsewhere.metrics, straight.metrics[2:], strict=True):
            assert a["actor_loss"] == pytest.approx(b["actor_loss"], rel=1e-4)
            assert a["epoch"] == b["epoch"]
        assert len(straight.metrics) == 4
        assert len(resumed.metrics) == 2
        for name in straight.metrics[0].keys() - {"tokens_per_device_second"}:
            assert [m[name] for m in resumed.metrics] == [m[name] for m in straight.metrics[2:]], name
        for (_, _, before), (_, _, after) in zip(straight.weights, resumed.weights, strict=True):
            assert torch.equal(before, after)


def test_sft_is_the_cross_entropy_of_transformers_in_every_layout(tmp_path: Path) -> None:
    """And packed sequences are as sequences alone, whatever a pass holds; so is recomputation."""
    folder = save_lm(tmp_path / "lm")
    model = truth.causal(folder)
    wanted = {
        average: truth.gradients(model, lambda m, a=average: truth.cross_entropy(m, TRAIN, a))
        for average in ("token", "sequence")
    }
    with torch.no_grad():
        held_out = {a: float(truth.cross_entropy(model, HELD_OUT, a)) for a in wanted}
    goes_on = resuming(sft(folder, LAYOUTS["tp2-dp2"]), tmp_path / "states")
    cases = [
        *(sft(folder, layout) for layout in LAYOUTS.values()),
        sft(folder, LAYOUTS["tp2-dp2"], algorithm={"loss_average": "sequence"}),
        sft(folder, LAYOUTS["pp4"], algorithm={"microbatch_tokens": None, "microbatch": 1}, recompute=True),
        sft(folder, LAYOUTS["dp4"], algorithm={"microbatch_tokens": None, "microbatch": 2, "packing": False}),
    ]
    found = run_ranks(run, 4, 4, [*cases, *goes_on])
    assert_resumed(found)
    for number, case in enumerate(cases):
        average = case.config["algorithm"].get("loss_average", "token")
        seen = [rank[number] for rank in found]
        assert_close(seen, *wanted[average], "actor")
        assert seen[0].metrics[0]["tokens"] == sum(stop - max(1, start) for ((_, (start, stop)),) in TRAIN)
        for one in seen:
            assert one.evaluated is not None
            assert one.evaluated["loss"] == pytest.approx(held_out[average], rel=CLOSE)


def assert_pairs(found: dict[str, float], scores: list[tuple[float, float]]) -> None:
    """Accuracy, its interval and the gap of the scores of pairs."""
    share = sum(a > b for a, b in scores) / len(scores)
    assert found["accuracy"] == pytest.approx(share)
    interval = binomtest(round(share * len(scores)), len(scores)).proportion_ci(method="wilson")
    assert found["accuracy_ci95"] == pytest.approx((interval.high - interval.low) / 2, rel=1e-4)
    assert found["score_gap"] == pytest.approx(
        sum(a - b for a, b in scores) / len(scores), rel=CLOSE, abs=CLOSE
    )


def test_equal_scores_are_half_right() -> None:
    sums = {name: float(x) for name, x in pair_sums(torch.tensor([1.0, 1.0, 2.0, 1.0, 0.0, 3.0])).items()}
    assert sums == {"pairs": 3.0, "right": 1.5, "gap": -2.0}
    assert pair_metrics(sums)["accuracy"] == 0.5


@pytest.mark.parametrize(("right", "pairs"), [(0, 1), (1, 1), (0, 9), (5, 9), (9, 9), (700, 1000)])
def test_the_interval_of_a_share_of_pairs_is_wilsons(right: int, pairs: int) -> None:
    scores_R = torch.tensor([[2.0, 0.5]] * right + [[0.5, 1.5]] * (pairs - right)).flatten()
    found = pair_metrics({name: float(x) for name, x in pair_sums(scores_R).items()})
    interval = binomtest(right, pairs).proportion_ci(method="wilson")
    assert found["accuracy"] == pytest.approx(right / pairs)
    assert found["accuracy_ci95"] == pytest.approx((interval.high - interval.low) / 2, rel=1e-4)
    assert found["score_gap"] == pytest.approx((1.5 * right - (pairs - right)) / pairs)


def test_metrics_of_objectives_are_means_of_what_was_summed() -> None:
    """Of four pairs, hence eight answers; by hand."""
    pairs = {"pairs": 4.0, "right": 3.0, "gap": 10.0}
    judged = object.__new__(BradleyTerry).metrics({**pairs, "score": 20.0})
    assert judged == {**pair_metrics(pairs), "score": 2.5}
    chosen = object.__new__(DPO).metrics({**pairs, "chosen": 2.0, "rejected": -8.0, "tokens": 30.0})
    rewards = {"chosen_reward": 0.5, "rejected_reward": -2.0}
    assert chosen == {**pair_metrics(pairs), **rewards, "tokens": 30.0}
    assert (judged["accuracy"], judged["score_gap"]) == (0.75, 2.5)
    assert object.__new__(CrossEntropy).metrics({"tokens": 7.0}) == {"tokens": 7.0}


def test_bradley_terry_and_dpo_are_those_of_transformers_in_every_layout(tmp_path: Path) -> None:
    """In four layouts, with pairs in passes together, alone, and padded; a head that the folder lacks is the
    same in every layout; resumed runs go on bitwise."""
    judge, folder = save_value(tmp_path / "judge"), save_lm(tmp_path / "lm")
    later = save_lm(tmp_path / "later", seed=8)  # DPO learns something only where actor and reference differ
    kinds = list(LAYOUTS.values())
    apart = {"microbatch_tokens": None, "microbatch": 1, "packing": False}
    judging = [
        *(preferring("reward-model", judge, layout) for layout in kinds),
        preferring("reward-model", judge, LAYOUTS["pp4"], algorithm=apart, recompute=True),
    ]
    options = {"beta": 0.3, "label_smoothing": 0.1}
    choosing = [
        *(preferring("dpo", folder, layout, algorithm=options) for layout in kinds),
        preferring("dpo", folder, LAYOUTS["dp4"], algorithm={**options, **apart}),
    ]
    fresh = [preferring("reward-model", folder, LAYOUTS[name]) for name in ("tp2-pp2", "dp4")]
    cases = [*judging, *(replace(case, begin=str(later)) for case in choosing), *fresh]
    goes_on = resuming(preferring("dpo", folder, LAYOUTS["tp2-dp2"], algorithm=options), tmp_path / "states")
    found = run_ranks(run, 4, 4, [*cases, *goes_on])
    assert_resumed(found)
    model = truth.classifier(judge)
    wanted = truth.gradients(model, lambda m: truth.bradley_terry(m, PAIRS, MARGINS))
    for number in range(len(judging)):
        seen = [rank[number] for rank in found]
        assert_close(seen, *wanted, "reward")
    with torch.no_grad():
        scores = [(float(truth.score(model, a)), float(truth.score(model, b))) for a, b in PAIRS]
        held_out = [(float(truth.score(model, a)), float(truth.score(model, b))) for a, b in HELD_OUT_PAIRS]
        unseen = float(truth.bradley_terry(model, HELD_OUT_PAIRS, [0.0] * 7))
    assert_pairs(found[0][0].metrics[0], scores)
    for rank in found:
        assert rank[0].evaluated is not None
        assert_pairs(rank[0].evaluated, held_out)
        assert rank[0].evaluated["loss"] == pytest.approx(unseen, rel=CLOSE)
    actor, before = truth.causal(later), truth.causal(folder)
    wanted = truth.gradients(actor, lambda m: truth.dpo(m, before, PAIRS, 0.3, 0.1))
    for number in range(len(judging), len(judging) + len(choosing)):
        assert_close([rank[number] for rank in found], *wanted, "actor")
    one, other = ([rank[number] for rank in found] for number in (-5, -4))
    assert one[0].metrics[0]["reward_loss"] == pytest.approx(other[0].metrics[0]["reward_loss"], rel=CLOSE)
