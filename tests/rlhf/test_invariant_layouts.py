"""Runs with invariant numerics: the same tokens, log-probs and weights, bit for bit, whatever the layouts.

One start of processes runs all cases of a number of ranks. Where they have one replica, they must equal the
run of one process, weights after the last step included; with several, the run whose layouts come first.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch

from puzzle.config.load import merge
from tests.rlhf.ppo_ranks import Boxes, Case, Watch
from tests.rlhf.test_algorithm_layouts import assembled
from tests.rlhf.test_trainer_reference import run_all

Layout = tuple[int, int, int]
"""tp, pp, dp."""
Pair = tuple[Layout, Layout]
"""Layouts of training and generation."""

ALONE: Layout = (1, 1, 1)
MODELS = tuple(product(("llama", "qwen2", "qwen3"), ("fp32", "bf16")))
OF_FOUR: tuple[Layout, ...] = ((4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4))
OF_TWO: tuple[Layout, ...] = ((2, 1, 1), (1, 2, 1), (1, 1, 2))
ALGORITHMS: tuple[dict[str, Any], ...] = (
    {"generation": {"max_sequences": 3}, "algorithm": {"microbatch": 3, "minibatch": 4, "entropy": 0.01}},
    {
        "generation": {"samples": 2},
        "algorithm": {"name": "grpo", "microbatch_tokens": 30, "minibatch": 8, "epochs": 2},
    },
)


def prompts() -> tuple[tuple[int, ...], ...]:
    """Of 1 to 9 tokens."""
    generator = torch.Generator().manual_seed(6)
    return tuple(
        tuple(torch.randint(0, 61, (n,), generator=generator).tolist()) for n in (3, 9, 1, 5, 7, 2, 4, 8)
    )


def section(layout: Layout) -> dict[str, int]:
    """As a configuration has it."""
    return dict(zip(("tp", "pp", "dp"), layout, strict=True))


def case(pair: Pair, family: str, dtype: str, kind: int, numerics: str = "invariant", parts: int = 4) -> Case:
    """Two iterations; the second one's tokens come from stepped weights. `parts` are those of all layouts."""
    training, generating = pair
    algorithm = ALGORITHMS[kind]
    shape: dict[str, Any] = {
        "model_type": family,
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
    }
    config: dict[str, Any] = {
        "iterations": 2,
        "batch": 8 if kind == 0 else 4,
        "seed": 5,
        "dtype": dtype,
        "device": "cpu",
        "numerics": numerics,
        "layout": section(training),
        "actor": {"init": shape, "optimizer": {"lr": 1e-3}},
        "reward": {"init": shape},
        "data": {"prompts": "given", "tokenizer": "bytes", "max_prompt_tokens": 9},
        "checkpoint": {"save": False},
        **algorithm,
        "generation": {
            "max_new_tokens": 6,
            "layout": section(generating),
            "temperature": 0.8,
            **algorithm["generation"],
        },
    }
    if numerics == "invariant":
        config["numerics_parts"] = parts
    if kind == 0:
        config["critic"] = {"init": shape, "optimizer": {"lr": 1e-3}}
    return Case(config, prompts(), stop_ids=(7, 11, 30))


@cache
def alone(family: str, dtype: str, kind: int) -> Watch:
    """The run of one process."""
    return run_all([case((ALONE, ALONE), family, dtype, kind)], 1)[0][0]


def whole(watches: list[Watch], role: str) -> dict[str, torch.Tensor]:
    """The weights of a model, wherever they lie."""
    pieces: Boxes = [piece for watch in watches for piece in watch.weights[role]]
    return assembled(pieces)


def same(found: list[Watch], expected: list[Watch], weights: bool = True) -> None:
    """Tokens, log-probs and values of every iteration and weights at the end are equal."""
    for a, b in zip(found[0].experiences, expected[0].experiences, strict=True):
        assert a.responses == b.responses
        for name in ("sampled_logprobs_BS", "ref_logprobs_BS", "values_BS"):
            mine, theirs = getattr(a, name), getattr(b, name)
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs), name
        if not weights:
            return  # of other steps
    for role in expected[0].weights:
        for name, values in whole(expected, role).items():
            assert torch.equal(whole(found, role)[name], values), f"{role} {name}"


def no_gap(watches: list[Watch]) -> None:
    """The policy that is trained is the one that generated."""
    for metrics in watches[0].metrics:
        assert metrics["first_ratio_gap"] == 0
        assert metrics["logprob_gap_max"] == 0


def check(pairs: list[Pair], world: int, models: tuple[tuple[str, str], ...]) -> None:
    """Run all pairs for all models, by the algorithms in turns."""
    names = [
        (pair, family, dtype, kind)
        for m, (family, dtype) in enumerate(models)
        for p, pair in enumerate(pairs)
        for kind in range(len(ALGORITHMS))
        if (m + p) % len(ALGORITHMS) == kind
    ]
    found = dict(zip(names, run_all([case(*name) for name in names], world), strict=True))
    firsts: dict[Any, list[Watch]] = {}
    wrong = []
    for name, watches in found.items():
        (training, _), family, dtype, kind = name
        try:
            no_gap(watches)
            one = [alone(family, dtype, kind)]
            if training[2] == 1:
                same(watches, one)
            else:
                same(watches, one, weights=False)
                same(watches, firsts.setdefault((training[2], family, dtype, kind), watches))
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, "\n".join(wrong)


def test_two_ranks_equal_one() -> None:
    check([((2, 1, 1), (1, 2, 1)), ((1, 1, 2), (2, 1, 1))], 2, MODELS[3:4])


@pytest.mark.long
def test_four_ranks_equal_one() -> None:
    check([((2, 2, 1), (4, 1, 1)), ((1, 4, 1), (2, 2, 1)), ((2, 1, 2), (1, 1, 4))], 4, MODELS[3:4])


@pytest.mark.long
@pytest.mark.parametrize("world", [2, 4])
def test_all_pairs(world: int) -> None:
    layouts = OF_TWO if world == 2 else OF_FOUR
    check(list(product(layouts, layouts)), world, MODELS)


@pytest.mark.long
def test_holders_of_one_head_agree_on_several_stages() -> None:
    """Four ranks have parts of the only key/value head's gradient: they add them in one order."""
    one_stage = case(((4, 1, 1), (4, 1, 1)), "llama", "fp32", 0)
    two_stages = case(((4, 2, 1), (4, 1, 2)), "llama", "fp32", 0)
    for role in ("actor", "critic", "reward"):
        for one in (one_stage, two_stages):
            one.config[role] = merge(one.config[role], {"init": {"num_key_value_heads": 1}})
    found = run_all([two_stages], 8)[0]
    no_gap(found)
    same(found, run_all([one_stage], 4)[0])


def test_fast_numerics_do_differ() -> None:
    """What the other tests look at sees rounding."""
    pair: Pair = ((2, 1, 1), (1, 2, 1))
    fast = run_all([case(pair, "llama", "bf16", 0, numerics="fast")], 2)[0]
    assert fast[0].metrics[0]["logprob_gap_max"] > 0
