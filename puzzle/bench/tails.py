"""`puzzle bench tails`: rewards that begin while the longest responses are decoded, or after them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Annotated

from puzzle.bench import device, harness
from puzzle.bench.generate import GenerateBench, Subject
from puzzle.bench.harness import Row, option
from puzzle.bench.requests import Given
from puzzle.cli import real
from puzzle.config.reward import RewardConfig
from puzzle.engine.generate.model_runner import ModelRunner
from puzzle.engine.runtime.world import World
from puzzle.plan.simulate.arrivals import done_at
from puzzle.rlhf.rewards.batch import ARGUMENTS, RewardBatch
from puzzle.rlhf.rewards.pool import Limits, PoolReward
from puzzle.rlhf.rewards.weighted import Part, WeightedRewards
from puzzle.rlhf.rewards.worker import Setup
from puzzle.rlhf.scoring import Scorer

WAYS = {"after": False, "beside": True}


@dataclass(frozen=True, kw_only=True)
class TailsBench(GenerateBench):
    """Time generation and a reward of each response, which begins when all have ended or when it has."""

    lengths: Annotated[Sequence[str], option(nargs="+", help="exponential or FILE, as of generate")] = (
        "exponential",
    )
    modes: Annotated[Sequence[str], harness.several("eager", "graphs", "kept")] = ("kept",)
    reward_seconds: Annotated[
        float, option(type=real(0.0, 3600.0), help="that a response's reward takes")
    ] = 0.1
    workers: Annotated[int, harness.count(help="rewards at a time")] = 4

    def measure(self, world: World) -> Iterator[Row]:
        subject = Subject(self, world)
        for count, mode, lengths in (
            (c, m, n) for c in self.sequences for m in self.modes for n in self.lengths
        ):
            found = Tails(self, subject).both(mode, self.requests.given(count, lengths))
            yield found | {"sequences": count, "mode": mode, "lengths": lengths}

    def line(self, row: Row) -> str:
        times = "  ".join(
            f"rewards {way}: generation {median(row['generation_s'][way]):.3f} s, then waited"
            f" {median(row['waited_s'][way]):.3f} s"
            for way in WAYS
        )
        asked = f"{row['sequences']:>4} sequences  {row['tokens']} tokens, at most {self.new}"
        each = f"{self.reward_seconds:g} s each on {self.workers}"
        return (
            f"tails {self.title}  {asked}  {each}  {times}  waited less by {row['saved_s']:.3f} s,"
            f" simulated {row['simulated_s']:.3f} s"
        )


class Tails:
    """Both ways for one model."""

    def __init__(self, bench: TailsBench, subject: Subject) -> None:
        self.bench, self.subject, self.world = bench, subject, subject.world
        self.ends: list[float] = []

    def _one(self, _: int, tokens: Sequence[int]) -> RewardBatch:
        return RewardBatch([str(self.bench.reward_seconds)], [""], [list(tokens)], [None], [""], [True])

    def both(self, mode: str, given: Given) -> Row:
        """Seconds of generation in every run of both, in alternation after one each, and seconds that rewards
        were waited for behind it; what is saved of those, measured and simulated with the times at which
        responses ended when rewards came after them."""
        bench, setup = (
            self.bench,
            Setup("puzzle.bench.sleeping:sleeps", None, 600.0, "reward.response_timeout"),
        )
        pool = PoolReward(setup, bench.workers, Limits())
        rewards = WeightedRewards([Part("sleeps", 1.0, pool)], 3600.0)
        try:
            with ModelRunner(self.subject.runtime.decoder, graphs=mode != "eager") as passes:
                scorers = {w: Scorer(self.world, RewardConfig(), rewards, early) for w, early in WAYS.items()}
                ways = {way: partial(self._once, passes, given, scorer) for way, scorer in scorers.items()}
                runs = device.alternated(ways, 1 + bench.repeats)
        finally:
            rewards.close()
        made = {way: [part for _, part, _ in every[1:]] for way, every in runs.items()}
        waited = {way: [whole - part for whole, part, _ in every[1:]] for way, every in runs.items()}
        generation = median(made["after"])
        ends = [x for part in self.world.gather(runs["after"][-1][2]) for x in part]
        each = (bench.reward_seconds, bench.workers)
        beside = max(generation, done_at(ends, *each))
        return {
            "tokens": sum(given[1]),
            "generation_s": made,
            "waited_s": waited,
            "saved_s": median(waited["after"]) - median(waited["beside"]),
            "simulated_s": done_at([generation] * len(ends), *each) - beside,
        }

    def _once(self, passes: ModelRunner, given: Given, scorer: Scorer) -> tuple[float, float, list[float]]:
        """Seconds until all is scored and until all is generated; when the responses of this rank ended, if
        it speaks for its replica."""
        runtime, count = self.subject.runtime, len(given[0])
        device.meet(self.world)
        began, ends, rows = time.perf_counter(), list[float](), runtime.rows(count)
        heard = scorer.listen(runtime, count, self._one)

        def hear(request: int, tokens: Sequence[int]) -> None:
            ends.append(time.perf_counter() - began)
            if heard is not None:
                heard(rows[request], tokens)

        self.subject.seconds(passes, given, self.bench.new, heard=hear)
        made = device.most(self.world, time.perf_counter() - began)
        one = self._one(0, [0])
        batch = RewardBatch(**{name: getattr(one, name) * count for name in ARGUMENTS})
        scorer.finish(scorer.begin(lambda: batch), None)
        whole = device.most(self.world, time.perf_counter() - began)
        return whole, made, ends if runtime.owns_results else []
