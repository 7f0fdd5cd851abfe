"""Every algorithm, with a few options of its loss each, against the reference in one process, and in every
kind of layout against that process.

One start of processes runs all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from puzzle.config.run import TRAINED
from tests.rlhf.ppo_ranks import Boxes, Case, Watch
from tests.rlhf.ppo_truth import cover
from tests.rlhf.test_trainer_reference import Bench, Shape, run_all, world_of

ITERATIONS = 2
FUNCTION = {"function": "tests.rlhf.test_algorithm_layouts:begins_small", "workers": 0}
RUNS: dict[str, dict[str, Any]] = {
    "ppo, one ratio per response": {
        "algorithm": {
            "ratio": "sequence",
            "clip": 0.001,
            "clip_high": 0.002,
            "microbatch": 2,
            "minibatch": 2,
            "overlong": {"buffer": 3, "penalty": 0.5},
        },
    },
    "grpo, DAPO": {
        "generation": {"samples": 2},
        "algorithm": {
            "name": "grpo",
            "clip": 0.004,
            "clip_high": 0.008,
            "loss_average": "token",
            "dynamic_sampling": {"rounds": 2},
            "overlong": {"buffer": 4, "penalty": 0.25},
            "minibatch": 4,
            "microbatch": 3,
        },
        "reward": FUNCTION,
    },
    "grpo, GSPO without a reference": {
        "generation": {"samples": 2},
        "algorithm": {
            "name": "grpo",
            "reference_free": True,
            "ratio": "sequence",
            "clip": 0.001,
            "clip_high": 0.002,
            "minibatch": 4,
            "microbatch": 3,
        },
    },
    "dr_grpo, dual clip": {
        "generation": {"samples": 2},
        "algorithm": {"name": "dr_grpo", "clip": 0.004, "dual_clip": 1.005, "minibatch": 4, "microbatch": 2},
    },
    "rloo, weighted log-probs": {
        "generation": {"samples": 2},
        "algorithm": {
            "name": "rloo",
            "policy_loss": "cispo",
            "clip": 1.0,
            "clip_high": 0.004,
            "minibatch": 4,
            "microbatch_tokens": 30,
        },
    },
    "reinforce_pp": {
        "algorithm": {
            "name": "reinforce_pp",
            "gamma": 0.95,
            "clip": 0.004,
            "minibatch": 2,
            "kl": {"coef": 0.1},
        },
    },
    "reinforce_pp_baseline, fill": {
        "generation": {"samples": 2},
        "algorithm": {
            "name": "reinforce_pp_baseline",
            "policy_loss": "cispo",
            "ratio": "sequence",
            "clip": 0.002,
            "dynamic_sampling": {"rounds": 1},
            "loss_average": "microbatch",
            "minibatch": 4,
            "microbatch": 1,
            "kl": {"coef": 0.1},
        },
        "reward": {"function": "tests.rlhf.test_algorithm_layouts:begins_tiny", "workers": 0},
    },
    "remax": {
        "generation": {"samples": 2},
        "algorithm": {
            "name": "remax",
            "overlong": {"buffer": 6},
            "loss_average": "sequence",
            "clip": 0.004,
            "minibatch": 4,
            "microbatch": 2,
            "reward_norm": False,
        },
    },
}
FUSED: Shape = (1, 2, 1)
LAYOUTS: dict[str, Shape] = {
    "dp": (1, 1, 2),
    "re-shard": {"actor": (1, 2, 1), "generation": (2, 1, 1)},
    "tp": (2, 1, 1),
    "pp": (1, 2, 1, (1, 3)),
    "mixed": {
        "actor": (1, 2, 2),
        "generation": (2, 1, 2),
        "critic": (2, 1, 2),
        "reference": (2, 2, 1),
        "reward": (1, 4, 1),
    },
    "fused": FUSED,
}
SHORT = ("re-shard",)


def begins(responses: list[str], below: int) -> list[float]:
    return [float(int(response.split()[0]) < below) for response in responses]


def begins_small(prompts: list[str], responses: list[str]) -> list[float]:
    """1 where the first token's id is below 130, so that many a group has equal scores."""
    return begins(responses, 130)


def begins_tiny(prompts: list[str], responses: list[str]) -> list[float]:
    """The same below 60, so that most groups do."""
    return begins(responses, 60)


def of_tokens(name: str) -> Any:
    below = 130 if name.endswith("small") else 60
    return lambda prompts, responses: begins([" ".join(map(str, row)) for row in responses], below)


class Runs:
    """What one process finds of every run, and the cases in layouts."""

    def __init__(self, base: Path) -> None:
        self.bench = Bench(base)
        self.alone = {
            name: watches[0] for name, (watches) in zip(RUNS, run_all(self.cases((1, 1, 1)), 1), strict=True)
        }

    def cases(self, shape: Shape, fuse: bool = False) -> list[Case]:
        made = []
        for name, options in RUNS.items():
            case = self.bench.of({"batch": 4, **options}, "llama", shape)
            case.config["iterations"] = ITERATIONS
            if fuse:
                trained = len(TRAINED[options["algorithm"].get("name", "ppo")])
                case.config["intra"] = {"fuse_inference": True, "fuse_training": trained > 1}
            made.append(Case(case.config, case.prompts, (104,) if name == "remax" else ()))
        return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("algorithms"))


def test_all_algorithms_are_here() -> None:
    assert {options["algorithm"].get("name", "ppo") for options in RUNS.values()} == set(TRAINED)


@pytest.mark.parametrize("name", RUNS)
def test_one_process_equals_the_reference(runs: Runs, name: str) -> None:
    case = dict(zip(RUNS, runs.cases((1, 1, 1)), strict=True))[name]
    function = case.config["reward"].get("function")
    reward = case.config["reward"]["model"] if function is None else of_tokens(function)
    runs.bench.check(case, [runs.alone[name]], reward)


def test_the_options_do_something(runs: Runs) -> None:
    """What they hold back, take off and draw again happens in these runs."""
    for name, watch in runs.alone.items():
        clipped = [metrics["clip_frac"] for metrics in watch.metrics]
        assert 0 < max(clipped) < 1, f"{name}: {clipped}"
        if "overlong" in RUNS[name]["algorithm"]:
            assert all(metrics["overlong_reward"] < 0 for metrics in watch.metrics), name
    dapo, fill = runs.alone["grpo, DAPO"].metrics, runs.alone["reinforce_pp_baseline, fill"].metrics
    assert max(metrics["sampling_rounds"] for metrics in dapo) >= 1
    assert max(metrics["dropped_frac"] for metrics in dapo) > 0
    assert any(0 < metrics["fill_frac"] < 1 for metrics in fill), fill


def same(alone: Watch, watches: list[Watch]) -> None:
    """Tokens are equal, losses and other metrics to 1e-5, weights to 1e-5."""
    for ours, theirs in zip(watches[0].experiences, alone.experiences, strict=True):
        assert (ours.responses, ours.prompt_ids, ours.fill) == (
            theirs.responses,
            theirs.prompt_ids,
            theirs.fill,
        )
    for found, expected in zip(watches[0].metrics, alone.metrics, strict=True):
        for name in expected:
            if name.endswith("_loss"):
                assert abs(found[name] - expected[name]) <= 1e-5, name
        skipped = ("balance", "useful_token_share", "first_ratio_gap", "logprob_gap", "logprob_gap_max")
        both = [{k: v for k, v in m.items() if k not in skipped} for m in (found, expected)]
        assert both[0] == pytest.approx(both[1], rel=2e-4, abs=1e-5)
    for role, boxes in alone.weights.items():
        whole = assembled(boxes)
        found = [piece for watch in watches for piece in watch.weights[role]]
        cover(found, whole, dict.fromkeys(whole, 1e-5), f"{role} weight")


def assembled(boxes: Boxes) -> dict[str, torch.Tensor]:
    """Whole tensors by name, of one process's pieces."""
    ends = {name: [0] * len(intervals) for name, intervals, _ in boxes}
    for name, intervals, _ in boxes:
        ends[name] = [max(end, stop) for end, (_, stop) in zip(ends[name], intervals, strict=True)]
    whole = {name: torch.full(shape, torch.nan) for name, shape in ends.items()}
    for name, intervals, values in boxes:
        whole[name][tuple(slice(*interval) for interval in intervals)] = values
    return whole


@pytest.mark.parametrize(
    "layout", [n if n in SHORT else pytest.param(n, marks=pytest.mark.long) for n in LAYOUTS]
)
def test_layouts_equal_one_process(runs: Runs, layout: str) -> None:
    shape = LAYOUTS[layout]
    found = run_all(runs.cases(shape, fuse=layout == "fused"), world_of(shape))
    wrong = []
    for name, watches in zip(RUNS, found, strict=True):
        try:
            same(runs.alone[name], watches)
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, "\n".join(wrong)
