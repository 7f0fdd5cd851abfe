"""Rows of replicas by length: the assignment against brute force, and whole runs with it and without."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puzzle.config.resolve import resolve
from puzzle.config.run import TrainConfig
from puzzle.errors import UserError
from puzzle.rlhf.balance import balanced, contiguous
from puzzle.rlhf.experience import minibatches
from tests.rlhf.one_process import configured
from tests.rlhf.ppo_ranks import Watch
from tests.rlhf.test_trainer_reference import Bench, run_all

LIMIT = 1.2


def loads(shares: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[i] for i in part) for part in shares]


def ratio(shares: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
    """The fullest replica over the average one."""
    found = loads(shares, lengths)
    return max(found) / (sum(found) / len(found))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 8))
def test_every_row_once_and_as_many_for_each_as_before(lengths: list[int], replicas: int) -> None:
    shares = balanced(lengths, replicas)
    assert sorted(i for part in shares for i in part) == list(range(len(lengths)))
    assert list(map(len, shares)) == list(map(len, contiguous(len(lengths), replicas)))
    assert all(part == sorted(part) for part in shares)
    assert max(loads(shares, lengths)) <= -(-len(lengths) // replicas) * max(lengths), "memory's worst case"
    if replicas == 1:
        assert shares == [list(range(len(lengths)))]


@functools.cache
def cuts(count: int, replicas: int) -> list[list[tuple[int, ...]]]:
    """All ways to give out rows in the numbers that `contiguous` has."""

    def rest(left: tuple[int, ...], sizes: tuple[int, ...]) -> list[list[tuple[int, ...]]]:
        if not sizes:
            return [[]]
        return [
            [taken, *others]
            for taken in itertools.combinations(left, sizes[0])
            for others in rest(tuple(i for i in left if i not in taken), sizes[1:])
        ]

    return rest(tuple(range(count)), tuple(len(part) for part in contiguous(count, replicas)))


@pytest.mark.parametrize("replicas", [2, 3])
def test_near_the_best_of_all_assignments(replicas: int) -> None:
    worst = 1.0
    for count in range(replicas, 7):
        for lengths in itertools.combinations_with_replacement((1, 2, 3, 5, 9, 20), count):
            best = min(max(loads(shares, lengths)) for shares in cuts(count, replicas))
            worst = max(worst, max(loads(balanced(lengths, replicas), lengths)) / best)
    print(f"{replicas} replicas: at worst {worst:.3f} of the best")
    assert worst <= LIMIT


def test_exponential_lengths() -> None:
    """256 responses of mean 256, at most 1024, over 8 replicas."""
    generator = np.random.default_rng(0)
    before, after = [], []
    for _ in range(40):
        lengths = np.minimum(1024, 1 + generator.exponential(256, 256).astype(int)).tolist()
        before.append(ratio(contiguous(256, 8), lengths))
        after.append(ratio(balanced(lengths, 8), lengths))
    print(f"contiguous {np.mean(before):.3f}, balanced {np.mean(after):.4f}, at most {max(after):.4f}")
    assert np.mean(before) > 1.2
    assert max(after) <= 1.05


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], list[Watch]]:
    """Of two options, each in a layout of several replicas, with rows by length and without."""
    bench = Bench(tmp_path_factory.mktemp("balance"))
    names = [("plain", (1, 2, 2), {}), ("whitened", (1, 1, 4), {"minibatch": 8})]
    asked = [(*name, on) for name in names for on in (True, False)]
    cases = [bench.case(option, "llama", shape, balance=on, **more) for option, shape, more, on in asked]
    return {
        (option, on): watches for (option, _, _, on), watches in zip(asked, run_all(cases, 4), strict=True)
    }


@pytest.mark.parametrize(("option", "dp"), [("plain", 2), ("whitened", 4)])
def test_runs_are_the_same_with_it_and_without(runs: dict, option: str, dp: int) -> None:
    with_it, without = runs[option, True], runs[option, False]
    for a, b in zip(with_it[0].experiences, without[0].experiences, strict=True):
        assert a.responses == b.responses
        for name in ("logprobs_BS", "ref_logprobs_BS", "values_BS", "scores_B", "advantages_BS"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=2e-6)
    for a, b in zip(with_it[0].metrics, without[0].metrics, strict=True):
        for name in ("actor_loss", "critic_loss", "actor_grad_norm", "critic_grad_norm", "kl"):
            assert a[name] == pytest.approx(b[name], rel=2e-5, abs=1e-6), name
        for name in ("clip_frac", "value_clip_frac"):
            assert a[name] == pytest.approx(b[name], abs=0.02), (
                "a token on the edge of the clip may change sides"
            )
    for role in ("actor", "critic"):
        for a, b in zip(with_it, without, strict=True):
            for (name, box, x), (other, same, y) in zip(a.weights[role], b.weights[role], strict=True):
                assert (name, box) == (other, same)
                torch.testing.assert_close(x, y, rtol=0, atol=2e-6)
    assert any(
        a["balance"] < b["balance"] for a, b in zip(with_it[0].metrics, without[0].metrics, strict=True)
    )


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize(
    ("option", "dp", "size", "epochs", "count"), [("plain", 2, 5, 1, 5), ("whitened", 4, 8, 2, 8)]
)
def test_the_log_tells_the_balance(
    runs: dict, option: str, dp: int, size: int, epochs: int, count: int, on: bool
) -> None:
    first = runs[option, on][0]
    for iteration, (experience, metrics) in enumerate(zip(first.experiences, first.metrics, strict=True)):
        most = mean = 0.0
        for epoch in range(epochs):
            for rows in minibatches(count, size, 11, iteration, epoch):
                lengths = [len(experience.prompt(row)) + len(experience.responses[row]) for row in rows]
                shares = balanced(lengths, dp) if on else contiguous(size, dp)
                found = loads(shares, lengths)
                most, mean = most + max(found), mean + sum(found) / dp
        assert metrics["balance"] == pytest.approx(most / mean)


def test_a_mean_over_microbatches_keeps_their_cut() -> None:
    assert configured().algorithm.balance
    assert not configured(algorithm={"loss_average": "microbatch"}).algorithm.balance
    with pytest.raises((UserError, ValueError), match="balance would change the loss"):
        configured(algorithm={"loss_average": "microbatch", "balance": True})


def limits(pp: int = 1, dp: int = 1, **options: object) -> tuple[int | None, int | None]:
    config = configured(
        batch=64,
        layout={"pp": pp, "dp": dp},
        data={"max_prompt_tokens": 24, "eval_prompts": None},
        generation={"max_new_tokens": 40},
        algorithm=options,
    )
    found = resolve(TrainConfig.model_validate(config.resolved())).config.algorithm
    return found.microbatch, found.microbatch_tokens


def test_passes_have_a_limit_where_none_is_given() -> None:
    """16384 tokens; of a pipeline's stages four passes each, and never less than the longest sequence."""
    assert limits() == (None, 16384)
    assert limits(pp=2) == (None, 64 * 64 // 8)
    assert limits(pp=2, dp=8) == (None, 64)
    assert limits(packing=False) == (256, None)
    assert limits(pp=2, packing=False) == (8, None)
    assert limits(microbatch=3) == (3, None)
    assert limits(pp=2, microbatch_tokens=100) == (None, 100)


def test_the_plan_says_the_cut() -> None:
    config = configured(data={"eval_prompts": None})
    assert "passes     at most 16384 tokens, rows by length" in resolve(config).table()
