"""PPO through the trainer, on gloo processes and in every layout, against the reference.

One start of processes runs many cases: what takes time is starting and importing.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import run_ranks
from tests.reference.same_tokens import TokenAgreement
from tests.reference.tiny import save_lm, save_value
from tests.rlhf import ppo_ranks
from tests.rlhf.ppo_ranks import Case, Watch
from tests.rlhf.ppo_truth import compare, drifted, truth

ITERATIONS = 3
LENGTHS = (3, 7, 1, 12, 5, 9, 2, 6, 4, 8)
STOP = 104
"""The noise of the seed draws it once in a while."""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"batch": 5, "algorithm": {"microbatch": 2}},
    "whitened": {
        "batch": 8,
        "generation": {"temperature": 0.8, "greedy": True, "early_stop": False},
        "algorithm": {
            "minibatch": 4,
            "epochs": 2,
            "microbatch": 1,
            "whiten": True,
            "entropy": 0.01,
            "gamma": 0.98,
            "kl": {"estimator": "k3"},
        },
    },
    "kl in loss": {
        "batch": 4,
        "generation": {"samples": 2},
        "algorithm": {
            "minibatch": 8,
            "microbatch_tokens": 24,
            "value_clip": None,
            "clip": 0.1,
            "reward_clip": 0.5,
            "old_logprobs": "recompute",
            "kl": {"estimator": "k2", "place": "loss"},
        },
        "reward": {"function": "tests.rlhf.test_trainer_reference:share_of_small", "workers": 0},
    },
    "no reference": {
        "batch": 8,
        "recompute": True,
        "algorithm": {"minibatch": 8, "microbatch": 8, "reference_free": True, "packing": False},
    },
    "groups": {
        "batch": 4,
        "generation": {"samples": 3, "temperature": 0.9},
        "algorithm": {"name": "grpo", "minibatch": 6, "microbatch": 2, "epochs": 2, "kl": {"coef": 0.1}},
        "reward": {"function": "tests.rlhf.test_trainer_reference:share_of_small", "workers": 0},
    },
    "leave one out": {
        "batch": 3,
        "generation": {"samples": 4},
        "algorithm": {"name": "rloo", "minibatch": 6, "microbatch": 3, "kl": {"coef": 0.2}},
    },
    "plain differences": {
        "batch": 4,
        "generation": {"samples": 2, "greedy": False},
        "algorithm": {"name": "dr_grpo", "microbatch": 2, "reward_clip": 1.0},
    },
    "groups alone": {
        "batch": 3,
        "generation": {"samples": 4},
        "algorithm": {
            "name": "grpo",
            "microbatch_tokens": 40,
            "reference_free": True,
            "loss_average": "token",
            "old_logprobs": "recompute",
            "entropy": 0.01,
        },
    },
    "truncated": {
        "batch": 8,
        "algorithm": {
            "minibatch": 4,
            "epochs": 2,
            "microbatch": 2,
            "entropy": 0.01,
            "old_logprobs": "recompute",
            "correction": {"kind": "truncate", "cap": 1.3},
        },
    },
    "masked": {
        "batch": 4,
        "generation": {"samples": 2},
        "algorithm": {
            "name": "grpo",
            "microbatch": 3,
            "old_logprobs": "recompute",
            "correction": {"kind": "mask", "level": "sequence", "low": 0.4, "high": 2.5},
        },
        "reward": {"function": "tests.rlhf.test_trainer_reference:share_of_small"},
    },
    "mean of means": {"batch": 8, "algorithm": {"microbatch": 1, "loss_average": "microbatch"}},
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "qwen3": {"family": "qwen3", "tie_word_embeddings": True},
    "qwen2": {"family": "qwen2"},
    "mistral": {"family": "mistral"},
}
# Options and models take turns over the layouts: (tp, pp, dp) or (tp, pp, dp, layers per stage) of all four
# models, or a mapping to models. There are 8 heads, 2 kv heads and 4 layers; M is 1 to 8.
Shape = tuple | dict[str, tuple]
MIXED: list[Shape] = [
    {"actor": (2, 2, 1), "critic": (1, 1, 4), "reference": (1, 4, 1), "reward": (4, 1, 1)},
    {
        "actor": (1, 2, 2),
        "generation": (2, 1, 2),
        "critic": (2, 1, 2),
        "reference": (2, 2, 1),
        "reward": (1, 4, 1),
    },
]
SHORT: dict[int, list[tuple[str, str, Shape]]] = {
    1: [("whitened", "llama", (1, 1, 1))],
    2: [
        ("kl in loss", "tied", (1, 2, 1, (3, 1))),
        ("plain", "qwen2", (2, 1, 1)),
        ("mean of means", "llama", (1, 1, 2)),
        ("truncated", "llama", (1, 1, 2)),
        ("groups", "qwen3", (1, 2, 1)),
    ],
    4: [
        ("whitened", "llama", (1, 1, 4)),
        ("whitened", "llama", (2, 1, 2)),
        ("plain", "tied", (1, 2, 2, (1, 3))),
        ("kl in loss", "qwen3", (4, 1, 1)),
        ("no reference", "tied", (1, 4, 1)),
        ("kl in loss", "mistral", MIXED[0]),
        ("plain", "qwen3", MIXED[1]),
        ("groups", "llama", (2, 1, 2)),
        ("leave one out", "qwen2", (2, 2, 1)),
        ("plain differences", "llama", (1, 2, 2)),
        ("masked", "llama", (1, 2, 2)),
        ("groups alone", "tied", {"actor": (1, 4, 1), "generation": (2, 2, 1), "reward": (1, 2, 2)}),
    ],
}
UNIFORM: list[Shape] = [
    *((t, p, d) for t in (1, 2, 4, 8) for p in (1, 2, 4) for d in (1, 2, 4) if t * p * d <= 8),
    (1, 2, 1, (3, 1)),
    (1, 3, 1, (1, 2, 1)),
    (2, 3, 1, (1, 1, 2)),
    (1, 3, 2, (2, 1, 1)),
    (1, 1, 3),
]
OTHERS: list[Shape] = [
    *MIXED,
    {"actor": (4, 2, 1), "critic": (1, 2, 4), "reference": (1, 4, 2), "reward": (8, 1, 1)},
    {"actor": (1, 4, 2), "critic": (2, 2, 2), "reference": (2, 1, 4), "reward": (2, 4, 1)},
]


def share_of_small(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward by function: what share of the response's ids is below 100, times 3."""
    ids = [[int(word) for word in response.split()] for response in responses]
    return [3.0 * sum(i < 100 for i in row) / len(row) for row in ids]


def same_for_tokens(prompts: list[list[int]], responses: list[list[int]]) -> list[float]:
    return share_of_small([], [" ".join(map(str, row)) for row in responses])


class Bench:
    """Model folders by kind, cases made of names, and the reference's answers, each found once."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.truths: dict[str, Any] = {}
        self.agreement = TokenAgreement()

    @functools.cache  # noqa: B019 - lives as long as the session
    def folders(self, kind: str) -> dict[str, dict[str, str]]:
        options, folder = MODELS[kind], self.base / kind
        lm = {role: save_lm(folder / role, seed=s, **options) for role, s in (("actor", 0), ("reference", 2))}
        value = {
            role: save_value(folder / role, seed=s, **options) for role, s in (("critic", 1), ("reward", 3))
        }
        return {role: {"model": str(path)} for role, path in (lm | value).items()}

    def case(self, option: str, kind: str, shape: Shape, **ppo: Any) -> Case:
        case = self.of(OPTIONS[option], kind, shape, **ppo)
        return replace(case, stop_ids=(STOP,) if option in ("plain", "whitened") else ())

    def of(self, given: dict[str, Any], kind: str, shape: Shape, **ppo: Any) -> Case:
        """A case of options that have no name."""
        options = {name: value for name, value in given.items() if name != "batch"}
        config: dict[str, Any] = {
            "iterations": ITERATIONS,
            "batch": given["batch"],
            "seed": 11,
            "checkpoint": {"save": False},
            "data": {"prompts": "given", "tokenizer": "bytes", "max_prompt_tokens": 32},
            **{role: dict(source) for role, source in self.folders(kind).items()},
            **options,
        }
        config["generation"] = {"max_new_tokens": 6, **options.get("generation", {})}
        config["algorithm"] = {**options["algorithm"], **ppo}
        for role in ("actor", "critic"):
            config[role]["optimizer"] = {"lr": 1e-4, "eps": 1e-4}
        if config["algorithm"].get("name", "ppo") != "ppo":
            del config["critic"]
        shapes = shape if isinstance(shape, dict) else {"": shape}
        for role, (tp, pp, dp, *stages) in shapes.items():
            layout = {"tp": tp, "pp": pp, "dp": dp, **({"stages": stages[0]} if stages else {})}
            if role in ("", "actor"):
                config["layout"] = layout
            if role in ("", "actor") or (role == "reward" and "function" in config["reward"]):
                continue
            if role in config:
                config[role]["layout"] = layout
        generator = torch.Generator().manual_seed(5)
        prompts = tuple(tuple(torch.randint(0, 259, (n,), generator=generator).tolist()) for n in LENGTHS)
        return Case(config, prompts, apart=0.5 if "correction" in config["algorithm"] else 0.0)

    def check(self, case: Case, watches: list[Watch], reward: Any = None) -> None:
        assert not drifted(watches)
        experiences = watches[0].experiences
        known = {k: v for k, v in case.config.items() if k != "layout"}
        named = {k: {n: x for n, x in v.items() if n != "layout"} if isinstance(v, dict) else v
                 for k, v in known.items()}  # fmt: skip
        key = repr((named, case.stop_ids, [(e.prompt_ids, e.responses) for e in experiences]))
        if key not in self.truths:
            function = "function" in case.config["reward"]
            reward = reward or (same_for_tokens if function else case.config["reward"]["model"])
            self.truths[key] = truth(case, experiences, reward)
        self.agreement += self.truths[key].agreement
        compare(case, watches, self.truths[key])


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("ppo"))


def run_all(cases: list[Case], world: int) -> list[list[Watch]]:
    """Per case the watches of all ranks."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    found = run_ranks(ppo_ranks.run, world, world, cases, timeout=1200.0)
    return [list(watches) for watches in zip(*found, strict=True)]


def check_all(bench: Bench, names: list[tuple[str, str, Shape]], world: int) -> list[list[Watch]]:
    cases = [bench.case(*name) for name in names]
    found = run_all(cases, world)
    wrong = []
    for name, case, watches in zip(names, cases, found, strict=True):
        try:
            bench.check(case, watches)
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, "\n".join(wrong)
    return found


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_ppo_equals_the_reference(bench: Bench, world: int) -> None:
    found = check_all(bench, SHORT[world], world)
    if world == 2:
        lengths = {len(r) for watches in found for e in watches[0].experiences for r in e.responses}
        assert min(lengths) < 6, "no response ended early"


@pytest.mark.parametrize("what", ["sharers", "replicas"])
def test_a_gradient_sum_left_out_is_seen(bench: Bench, what: str) -> None:
    """Without the sum over holders they drift apart; without the sum over replicas all are wrong alike."""
    case = bench.case("plain", "tied", (2, 1, 1) if what == "sharers" else (1, 1, 2))
    (watches,) = run_all([replace(case, break_=what)], 2)
    if what == "sharers":
        apart = drifted(watches)
        assert "actor model.norm.weight" in apart
        assert "actor model.embed_tokens.weight" not in apart, "its rows are on one rank each"
        assert not any(name.startswith("critic") for name in apart)
    with pytest.raises(AssertionError):
        bench.check(case, watches)


def world_of(shape: Shape) -> int:
    tp, pp, dp, *_ = shape["actor"] if isinstance(shape, dict) else shape
    return tp * pp * dp


def everything() -> dict[int, list[tuple[str, str, Shape]]]:
    """Every layout with two options each, options and models in turn, by the number of processes."""
    cases: dict[int, list[tuple[str, str, Shape]]] = {}
    options, kinds = list(OPTIONS), list(MODELS)
    for i, shape in enumerate([*UNIFORM, *OTHERS]):
        for j in (2 * i, 2 * i + 1):
            name = (options[j % len(options)], kinds[(j + j // len(kinds)) % len(kinds)], shape)
            cases.setdefault(world_of(shape), []).append(name)
    return cases


@pytest.mark.long
@pytest.mark.parametrize("world", sorted(everything()))
def test_every_layout(bench: Bench, world: int) -> None:
    check_all(bench, everything()[world], world)


@pytest.mark.long
def test_near_ties_are_rare(bench: Bench) -> None:
    """Over all rows that the tests of this file have drawn."""
    assert bench.agreement.rows
    assert bench.agreement.ok, bench.agreement
    print(f"{bench.agreement.rows} rows, {bench.agreement.near} near ties, {len(bench.truths)} references")
