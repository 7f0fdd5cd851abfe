"""How the scores of several rewards become one, who computes them, and within which limits."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from puzzle.config.run import TrainConfig
from puzzle.errors import UserError
from puzzle.rlhf.rewards import weighted
from puzzle.rlhf.rewards.batch import Arriving, RewardBatch
from puzzle.rlhf.rewards.scores import LARGEST
from puzzle.rlhf.rewards.weighted import Part, Scored, WeightedRewards, function_rewards, runs_users_code
from puzzle.rlhf.scoring import Scorer
from tests.rlhf.one_process import INIT, configured, trainer_of

BATCH = RewardBatch(["p"] * 2, ["a", "b"], [[1]] * 2, [None] * 2, ["0", "1"], [True] * 2)


class Fixed:
    """A reward that gives what it was told to."""

    each = False

    def __init__(self, scores: list[float], reads: tuple[str, ...] = ()) -> None:
        self.what, self.scores, self.reads, self.closed = "fixed", scores, reads, 0

    def columns(self, names: Collection[str], source: str) -> list[str]:
        assert source == "data"
        return [name for name in names if name in self.reads]

    def score(self, batch: RewardBatch) -> list[float]:
        assert batch is BATCH
        return self.scores

    def close(self) -> None:
        self.closed += 1


class World:
    """One rank, and what it does while it waits."""

    def __init__(self, rank: int = 0, clock: Any = None) -> None:
        self.rank, self.size, self.device, self.clock = rank, 1, torch.device("cpu"), clock
        self.busy: list[tuple[str, float]] = []
        self.progress = SimpleNamespace(busy=self._busy)

    @contextmanager
    def _busy(self, what: str, limit: float) -> Any:
        self.busy.append((what, limit))
        yield

    def share(self, own: Any) -> Any:
        return own


def scorer(rewards: WeightedRewards | None, weight: float = 1.0, clock: Any = None) -> tuple[Scorer, World]:
    world: Any = World(clock=clock)
    config: Any = SimpleNamespace(weight=weight)
    return Scorer(world, config, rewards), world


@pytest.mark.parametrize("weight", [1.0, -2.0, 0.0])
def test_a_models_scores_alone_are_weighted(weight: float) -> None:
    scores = scorer(None, weight)[0].finish(None, torch.tensor([1.0, 3.0]))
    assert scores.total_B.tolist() == [weight, 3.0 * weight]
    assert scores.parts == {}
    assert scores.metrics() == {}


@pytest.mark.parametrize("model", [None, [10.0, math.nan], [10.0, 20.0]])
@pytest.mark.parametrize("count", [1, 2])
def test_scores_are_the_weighted_sum_and_each_is_told(model: list[float] | None, count: int) -> None:
    given, weights = [[1.0, -3.0], [0.5, 4.0]][:count], [2.0, -1.0][:count]
    parts = [Part(f"part{i}", w, Fixed(x)) for i, (x, w) in enumerate(zip(given, weights, strict=True))]
    asked, world = scorer(WeightedRewards(parts, 77.0), weight=0.25)
    pending = asked.begin(lambda: BATCH)
    assert pending is not None
    scores = asked.finish(pending, None if model is None else torch.tensor(model))
    assert world.busy == [("the reward function", 77.0)]
    rows = [*zip(given, weights, strict=True), *([] if model is None else [(model, 0.25)])]
    total = sum(np.array(x) * w for x, w in rows)
    np.testing.assert_allclose(scores.total_B.numpy(), np.array(total, dtype=np.float32))
    assert scores.total_B.dtype == torch.float32
    names = [f"part{i}" for i in range(count)] + ["model"] * (model is not None)
    if len(names) == 1:
        assert scores.parts == {}
        return
    assert list(scores.parts) == names
    for name, (x, _) in zip(names, rows, strict=True):
        np.testing.assert_array_equal(scores.parts[name].numpy(), x)
    found = scores.metrics()
    assert [found[f"reward{of}.part0"] for of in ("", "_min", "_max")] == [-1.0, -3.0, 1.0]
    assert len(found) == 3 * len(names)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("factor", [0.5, 0.49999])
def test_a_sum_that_float32_does_not_hold_is_named(sign: float, factor: float) -> None:
    parts = [Part(name, sign, Fixed([0.0, LARGEST * factor])) for name in ("a", "b", "c")][
        : 2 + (factor == 0.5)
    ]
    asked, _ = scorer(WeightedRewards(parts, 1.0))
    if factor < 0.5:
        assert abs(float(asked.finish(asked.begin(lambda: BATCH), None).total_B[1])) < LARGEST
        return
    with pytest.raises(UserError, match=r"^reward: the weighted sum of response 2 of 2 is -?5.1\d*e\+38; "):
        asked.finish(asked.begin(lambda: BATCH), None)


def test_seconds_are_those_since_they_were_asked_for_and_spans_are_traced() -> None:
    spans: list[tuple[str, str, float, float]] = []
    clock = SimpleNamespace(host_span=lambda *span: spans.append(span))
    asked, _ = scorer(WeightedRewards([Part("own", 1.0, Fixed([0.0, 0.0]))], 1.0), clock=clock)
    found = Scored({"own": [0.0, 0.0], "more": [0.0, 0.0]}, {"own": (1.0, 4.0), "more": (2.0, 5.5)}, 3.0, 2.5)
    asked.rewards = WeightedRewards([Part(n, 1.0, Fixed([0.0, 0.0])) for n in ("own", "more")], 1.0)
    for _ in range(2):
        asked.finish(lambda: found, None)
    assert asked.spent() == {"computed": 9.0, "waited": 5.0}
    assert asked.spent() == {"computed": 0.0, "waited": 0.0}
    assert spans[:3] == [
        ("reward own", "own", 1.0, 4.0),
        ("reward more", "more", 2.0, 5.5),
        ("reward wait", "wait", 3.0, 5.5),
    ]
    assert scorer(None)[0].spent() is None


def test_only_the_first_rank_asks_and_an_error_is_everybodys() -> None:
    rewards = WeightedRewards([Part("own", 1.0, Fixed([1.0, 2.0]))], 1.0)
    other: Any = World(rank=1)
    config: Any = SimpleNamespace(weight=1.0)
    assert Scorer(other, config, rewards).begin(lambda: BATCH) is None
    asked, _ = scorer(rewards)

    def fails() -> Scored:
        raise UserError("no scores")

    with pytest.raises(UserError, match="no scores"):
        asked.finish(fails, None)


def test_columns_are_those_of_all_parts_and_all_parts_are_closed() -> None:
    own = [Fixed([], ("a", "c")), Fixed([], ("b", "a"))]
    rewards = WeightedRewards([Part(str(i), 1.0, one) for i, one in enumerate(own)], 1.0)
    assert rewards.columns(["a", "b", "c", "d"], "data") == ["a", "c", "b"]
    assert not rewards.any_each
    rewards.close()
    assert [one.closed for one in own] == [1, 1]


def rewarded(reward: dict[str, Any], **sections: Any) -> TrainConfig:
    config = configured(**sections)
    return config.model_copy(update={"reward": type(config.reward).model_validate(reward)})


LIMITS: dict[str, Any] = {"timeout": 11.0, "response_timeout": 7.0, "timeout_score": -1.0}


def made(monkeypatch: pytest.MonkeyPatch, reward: dict[str, Any], **more: Any) -> list[tuple[str, Any]]:
    """Which rewards a section makes, and of what."""
    seen: list[tuple[str, Any]] = []
    for place, name in (
        (weighted, "FunctionReward"),
        (weighted, "PoolReward"),
        (weighted.server, "ServerReward"),
    ):
        monkeypatch.setattr(place, name, lambda *given, name=name: seen.append((name, given)))
    rewards = function_rewards(rewarded(reward, launch={"watchdog": 33.0}), **more)
    assert rewards is not None
    assert rewards.longest == reward.get("timeout", 3600.0)
    assert len(rewards.parts) == len(seen)
    return seen


@pytest.mark.parametrize(
    ("name", "workers", "kind"),
    [
        ("puzzle.rlhf.rewards:letter_share", None, "FunctionReward"),
        ("puzzle.rlhf.rewards:letter_share", 0, "FunctionReward"),
        ("puzzle.rlhf.rewards:letter_share", 2, "PoolReward"),
        ("mine:score", None, "PoolReward"),
        ("mine:score", 0, "FunctionReward"),
        ("mine:score", 2, "PoolReward"),
    ],
)
def test_where_a_function_is_called_and_how_long(
    monkeypatch: pytest.MonkeyPatch, name: str, workers: int | None, kind: str
) -> None:
    limits = LIMITS if workers else {"timeout": 11.0}

    def give_up(_line: str) -> None:
        pass

    ((found, given),) = made(monkeypatch, {"function": name, "workers": workers, **limits}, give_up=give_up)
    assert found == kind
    if kind == "FunctionReward":
        allowed = given[1]
        assert (given[0], given[2]) == (name, None)
        assert (allowed.limit, allowed.notice, allowed.key) == (11.0, 33.0, "reward.timeout")
        assert allowed.give_up is give_up
        return
    setup, most, whole = given
    assert most == workers
    assert (setup.name, setup.notice, setup.pickled) == (name, 33.0, None)
    expected = (7.0, "reward.response_timeout") if workers else (11.0, "reward.timeout")
    assert (setup.limit, setup.key) == expected
    assert (whole.batch, whole.notice) == (11.0, 33.0)
    assert (whole.response, whole.late_score) == ((7.0, -1.0) if workers else (None, None))


def test_a_server_has_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"url": "http://here/s", "workers": 3, "retries": 5, "token_env": "T", **LIMITS}
    ((kind, (url, token, workers, limits)),) = made(monkeypatch, section)
    assert (kind, url, token, workers) == ("ServerReward", "http://here/s", "T", 3)
    assert (limits.batch, limits.response, limits.retries, limits.late_score) == (11.0, 7.0, 5, -1.0)


def test_parts_keep_their_order_names_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = [{"function": "m:a", "weight": 2.0}, {"url": "http://b/", "name": "judge", "weight": -1.0}]
    monkeypatch.setattr(weighted, "PoolReward", lambda *_: Fixed([]))
    monkeypatch.setattr(weighted.server, "ServerReward", lambda *_: Fixed([]))
    rewards = function_rewards(rewarded({"functions": functions, "init": INIT}))
    assert rewards is not None
    assert [(part.name, part.weight) for part in rewards.parts] == [("a", 2.0), ("judge", -1.0)]
    assert function_rewards(configured()) is None


def test_a_given_function_goes_where_its_name_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(responses: list[str]) -> list[float]:
        return [1.0 for _ in responses]

    ((kind, given),) = made(monkeypatch, {"function": "given", "workers": 0}, given=mine)
    assert (kind, given[0], given[2]) == ("FunctionReward", "given", mine)
    pytest.importorskip("dill")
    ((kind, given),) = made(monkeypatch, {"function": "given"}, given=mine)
    assert kind == "PoolReward"
    there = weighted.unpickled_function(given[0].pickled)
    assert there(["a", "b"]) == [1.0, 1.0]
    for reward, function, words in (
        ({"function": "given"}, None, "stands for a callable that Python gives"),
        ({"function": "m:f"}, mine, "the configuration names another"),
    ):
        with pytest.raises(UserError, match=words):
            made(monkeypatch, reward, given=function)


@pytest.mark.parametrize(
    ("section", "users"),
    [
        ({"function": "mine:score", "workers": 0}, True),
        ({"function": "mine:score", "workers": 1}, False),
        ({"function": "mine:score"}, False),
        ({"function": "puzzle.rlhf.rewards:letter_share", "workers": 0}, False),
        ({"function": "given", "workers": 0}, False),
        (
            {
                "functions": [{"function": "puzzle.rlhf.rewards:letter_share"}, {"function": "m:f"}],
                "workers": 0,
            },
            True,
        ),
        ({"url": "http://here/"}, False),
        ({"init": INIT}, False),
    ],
)
def test_whose_code_the_trainer_runs(section: dict[str, Any], users: bool) -> None:
    assert runs_users_code(rewarded(section)) is users


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("overlap", ["auto", False])
def test_responses_are_heard_early_where_that_helps_and_is_wanted(overlap: Any, each: bool) -> None:
    reward = {"function": "mine:score", "workers": 2 if each else None}
    config = rewarded(reward, intra={"overlap_rollout": overlap})
    assert trainer_of(config).scorer.listens is (each and overlap is not False)


class Each(Fixed):
    """One that is called for each response, as they come."""

    each = True

    def score_each(self, arriving: Arriving) -> list[float]:
        found: dict[int, float] = {}
        while (taken := arriving.get()) is not None:
            row, one = taken
            assert len(one) == 1
            found[row] = float(ord(one.responses[0]))
        return [found[row] for row in range(arriving.count)]


@pytest.mark.parametrize("early", [[], [1], [1, 0], [0, 0]])
def test_what_came_early_is_scored_once_and_the_rest_when_all_is_there(early: list[int]) -> None:
    own = [Part("each", 1.0, Each([])), Part("whole", 1.0, Fixed([7.0, 8.0]))]
    rewards = WeightedRewards(own, 30.0)
    assert rewards.any_each
    opened = rewards.open(2)
    for row in early:
        opened.add(row, BATCH.row(row))
    found = opened.complete(BATCH)()
    assert found.scores == {"each": [97.0, 98.0], "whole": [7.0, 8.0]}
    assert set(found.spans) == {"each", "whole"}
    assert all(began <= ended for began, ended in found.spans.values())
    assert 0 <= found.waited < 30
    assert found.computed == max(e for _, e in found.spans.values()) - min(b for b, _ in found.spans.values())


def test_a_run_that_ends_early_does_not_wait_for_responses() -> None:
    """What was listening for them is a daemon, and says by its name what it does."""
    before = set(threading.enumerate())
    asked, world = scorer(WeightedRewards([Part("each", 1.0, Each([]))], 30.0))
    asked.listens = True
    actor: Any = SimpleNamespace(
        coord=SimpleNamespace(d=0),
        placement=SimpleNamespace(coord_of=lambda _: SimpleNamespace(d=0), layout=SimpleNamespace(dp=1)),
        rows=range,
    )
    heard = asked.listen(actor, 2, lambda row, _tokens: BATCH.row(row))
    assert heard is not None
    new = set(threading.enumerate()) - before
    assert {thread.name for thread in new} == {"rewards begin", "reward each"}
    assert all(thread.daemon for thread in new)
    heard(1, (1,))
    scores = asked.finish(asked.begin(lambda: BATCH), None)
    assert scores.total_B.tolist() == [97.0, 98.0]
    assert world.busy
