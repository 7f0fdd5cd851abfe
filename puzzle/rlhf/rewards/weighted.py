"""The rewards of a run that are no models: several, with weights, computed beside what the trainer does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from puzzle.config.evaluation import EvaluationConfig
from puzzle.config.reward import RewardPart
from puzzle.config.run import TrainConfig
from puzzle.errors import UserError
from puzzle.rlhf.patience import Patience, end
from puzzle.rlhf.rewards import server
from puzzle.rlhf.rewards.batch import Arriving, RewardBatch
from puzzle.rlhf.rewards.functions import FunctionReward
from puzzle.rlhf.rewards.pool import Limits, PoolReward
from puzzle.rlhf.rewards.worker import Setup

OURS = "puzzle.rlhf.rewards:"
"""How the names of functions begin that need no process of their own."""
GRACE_SECONDS = 30.0
"""So much longer than `reward.timeout` is waited for a part, which ends itself."""
GIVEN = "given"
"""In the place of a function's name: the callable that Python hands over."""


Rewarded = TrainConfig | EvaluationConfig
"""What has a section `reward`."""


class Reward(Protocol):
    """Something that scores responses, wherever it computes. `each`: a call has one response."""

    what: str
    each: bool

    def columns(self, names: Collection[str], source: str) -> list[str]:
        """Which columns of a source it reads; UserError for one that it lacks."""
        ...

    def score(self, batch: RewardBatch) -> list[float]:
        """One finite number per response; UserError with one line for whatever went wrong."""
        ...

    def close(self) -> None:
        """End its processes and connections."""
        ...


@runtime_checkable
class EachReward(Reward, Protocol):
    """One whose calls have one response: it need not wait for the others."""

    def score_each(self, arriving: Arriving) -> list[float]:
        """As `score`, of responses as they come."""
        ...


@dataclass(frozen=True)
class Part:
    """One reward: its name in the log, and its weight in the sum."""

    name: str
    weight: float
    reward: Reward


@dataclass(frozen=True)
class Scored:
    """The scores of each part by name, when it computed, when the trainer asked for them (of
    `time.perf_counter`), and for how many seconds it waited."""

    scores: dict[str, list[float]]
    spans: dict[str, tuple[float, float]]
    asked: float
    waited: float

    @property
    def computed(self) -> float:
        """Seconds from the first part's start to the last one's end."""
        begins, ends = zip(*self.spans.values(), strict=True)
        return max(ends) - min(begins)


class _Call:
    """One part on its way, with a batch or with what comes of one."""

    def __init__(self, part: Part, source: RewardBatch | Arriving) -> None:
        self.part, self._source = part, source
        self.began = self.ended = time.perf_counter()
        self._found: list[float] | BaseException = []
        self._thread: threading.Thread | None = None
        if not isinstance(part.reward, FunctionReward):
            self._thread = threading.Thread(target=self._run, name=f"reward {part.name}", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        self.began = time.perf_counter()
        try:
            self._found = self._score()
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self._found = error
        self.ended = time.perf_counter()
        if isinstance(self._source, Arriving) and self._source.first_at is not None:
            self.began = self._source.first_at

    def _score(self) -> list[float]:
        reward, source = self.part.reward, self._source
        if not isinstance(source, Arriving):
            return reward.score(source)
        assert isinstance(reward, EachReward)
        return reward.score_each(source)

    def scores(self, longest: float) -> list[float]:
        """Wait for them, little more than `longest` seconds; functions of this process are called now."""
        if self._thread is None:
            self.began = time.perf_counter()
            self._found = self._score()
            self.ended = time.perf_counter()
        else:
            self._thread.join(min(longest + GRACE_SECONDS, threading.TIMEOUT_MAX))
            if self._thread.is_alive():
                raise UserError(f"{self.part.reward.what} did not end after {longest:g} s (reward.timeout)")
        if isinstance(self._found, BaseException):
            raise self._found
        return self._found


class Opened:
    """A batch that is scored before all of it is there, by the parts that are called for each response."""

    def __init__(self, parts: Sequence[Part], longest: float, count: int) -> None:
        """`count` responses will come."""
        self._parts, self._longest = parts, longest
        self._arriving = {part.name: Arriving(count) for part in parts if part.reward.each}
        each = [part for part in parts if part.name in self._arriving]
        self._calls = {part.name: _Call(part, self._arriving[part.name]) for part in each}

    def add(self, row: int, one: RewardBatch) -> None:
        """A response is there; one that is known is left."""
        for arriving in self._arriving.values():
            arriving.put(row, one)

    def complete(self, batch: RewardBatch) -> Callable[[], Scored]:
        """All are there: the other parts begin. What is returned waits for all, and raises the first
        UserError."""
        if self._arriving:
            for row in range(len(batch)):
                self.add(row, batch.row(row))
        calls = [self._calls.get(part.name) or _Call(part, batch) for part in self._parts]

        def finish() -> Scored:
            asked = time.perf_counter()
            scores = {call.part.name: call.scores(self._longest) for call in calls}
            spans = {call.part.name: (call.began, call.ended) for call in calls}
            return Scored(scores, spans, asked, time.perf_counter() - asked)

        return finish


class WeightedRewards:
    """Parts that are scored at the same time."""

    def __init__(self, parts: Sequence[Part], longest: float) -> None:
        """`longest` seconds may a batch take, perhaps infinitely many."""
        self.parts, self.longest = tuple(parts), longest

    def columns(self, names: Collection[str], source: str) -> list[str]:
        """Which columns of a source the parts read; UserError for one that is not there."""
        found = [name for part in self.parts for name in part.reward.columns(names, source)]
        return list(dict.fromkeys(found))

    def begin(self, batch: RewardBatch) -> Callable[[], Scored]:
        """Have all parts score a batch; what is returned waits for them, and raises the first UserError."""
        return self.open(len(batch)).complete(batch)

    @property
    def any_each(self) -> bool:
        """Whether a part is called for each response, and so need not wait for the batch."""
        return any(part.reward.each for part in self.parts)

    def open(self, count: int) -> Opened:
        """Begin with a batch of `count` responses that are not there yet."""
        return Opened(self.parts, self.longest, count)

    def close(self) -> None:
        """End all processes and connections."""
        for part in self.parts:
            part.reward.close()


def function_rewards(
    config: Rewarded, give_up: Callable[[str], None] = end, given: Callable[..., Any] | None = None
) -> WeightedRewards | None:
    """The run's rewards that are no model; None where there are none. UserError for what they lack.

    `give_up` is called with a line when a function of this process does not let itself be ended after
    `reward.timeout`; `given` is the function called `given`.
    """
    if given is not None and all(part.function != GIVEN for part in config.reward.parts):
        raise UserError(
            f"a reward was given from Python, but the configuration names another: say {GIVEN!r} in"
            " reward.function, or in one of reward.functions"
        )
    if not config.reward.parts:
        return None
    parts = [
        Part(part.label, part.weight, _reward(config, part, give_up, given)) for part in config.reward.parts
    ]
    return WeightedRewards(parts, Patience(config.reward.timeout).longest)


def _reward(
    config: Rewarded, part: RewardPart, give_up: Callable[[str], None], given: Callable[..., Any] | None
) -> Reward:
    options, notice = config.reward, config.launch.watchdog
    if part.url is not None:
        asked = server.Limits(
            options.timeout, options.response_timeout, options.retries, options.timeout_score
        )
        return server.ServerReward(part.url, options.token_env, options.workers, asked)
    name = part.function
    assert name is not None
    if name == GIVEN and given is None:
        raise UserError(f"reward.function {GIVEN}: it stands for a callable that Python gives to `start`")
    function = given if name == GIVEN else None
    if options.workers == 0 or (options.workers is None and name.startswith(OURS)):
        return FunctionReward(name, Patience(options.timeout, notice, give_up=give_up), function)
    each = options.workers is not None
    limit, key = (options.response_timeout, "response_timeout") if each else (options.timeout, "timeout")
    pickled = None if function is None else pickled_function(function)
    setup = Setup(name, limit, notice, f"reward.{key}", pickled)
    limits = Limits(options.timeout, options.response_timeout, notice, options.timeout_score)
    return PoolReward(setup, options.workers, limits)


def pickled_function(function: Callable[..., Any]) -> bytes:
    """A callable for another process: by dill, which takes those of a notebook and closures too."""
    try:
        import dill
    except ImportError:
        raise UserError(
            f"reward.function {GIVEN}: another process gets it by the package dill, which is not installed;"
            " install it, or name the function as module:name"
        ) from None
    try:
        return dill.dumps(function, recurse=True)
    except Exception as error:  # noqa: BLE001 - whatever a user's object does
        raise UserError(
            f"reward.function {GIVEN}: it cannot be pickled for another process: {error!r}; make what it"
            " needs inside the function, or put it into a module and name it as module:name"
        ) from None


def unpickled_function(pickled: bytes) -> Callable[..., Any]:
    """The callable that `pickled_function` took."""
    import dill

    return dill.loads(pickled)


def runs_users_code(config: Rewarded) -> bool:
    """Whether the trainer's own process calls a named function that is not this project's."""
    names = [part.function for part in config.reward.parts if part.function not in (None, GIVEN)]
    return config.reward.workers == 0 and any(not name.startswith(OURS) for name in names if name)


def probe(config: Rewarded) -> WeightedRewards | None:
    """The rewards of a run as far as they can be had before it: those that Python gives are left out. To be
    closed. A user's module is imported in a process of its own, for it may end its process."""
    parts = tuple(part for part in config.reward.parts if part.function != GIVEN)
    options = config.reward.model_copy(update={"function": None, "url": None, "functions": parts})
    if options.workers == 0:
        options = options.model_copy(update={"workers": None})
    return function_rewards(config.model_copy(update={"reward": options}))
