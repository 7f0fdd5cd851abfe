"""Response lengths: distributions, and queues of decode passes against one step at a time."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.cli.workloads import remapped
from puzzle.errors import UserError
from puzzle.plan.memory import RankMemory
from puzzle.plan.pages import Cache, kv_bytes
from puzzle.plan.predict.bounds import bounds
from puzzle.plan.predict.calibration import read_calibration
from puzzle.plan.predict.costs import Fixed
from puzzle.plan.predict.iteration import decode_cut, generation_seconds, predict
from puzzle.plan.predict.lengths import Lengths, merged, stretches
from puzzle.plan.predict.passes import decode_stages
from tests.plan.test_predict import workload

RATES = read_calibration("h200").rates


def step_by_step(lengths: list[int], slots: int) -> list[tuple[int, float]]:
    """(sequences, tokens they attend to on average, without the prompt) of every decode pass."""
    waiting = [length for length in lengths if length > 1]
    running: list[list[int]] = []
    found = []
    while waiting or running:
        while waiting and len(running) < slots:
            running.append([1, waiting.pop(0)])
        found.append((len(running), sum(have for have, _ in running) / len(running)))
        running = [[have + 1, wanted] for have, wanted in running if have + 1 < wanted]
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 40))
def test_queues_are_those_of_one_step_at_a_time(lengths: list[int], slots: int) -> None:
    steps = step_by_step(lengths, slots)
    found = stretches(lengths, slots)
    active = [one.active for one in found for _ in range(one.steps)]
    assert active == [n for n, _ in steps]
    assert sum(active) == sum(length - 1 for length in lengths)
    attended = sum(one.steps * one.active * one.grown for one in found)
    assert attended == pytest.approx(sum(n * grown for n, grown in steps))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4000), min_size=1, max_size=600), st.integers(1, 600))
def test_merged_stretches_have_as_many_steps(lengths: list[int], slots: int) -> None:
    found = stretches(lengths, slots)
    few = merged(found)
    assert sum(one.steps for one in few) == sum(one.steps for one in found)
    assert len(few) <= max(2 * 256, 1)
    whole = sum(one.steps * one.active for one in found)
    assert sum(one.steps * one.active for one in few) == pytest.approx(whole, rel=0.3, abs=400)


def test_distributions() -> None:
    found = Lengths.exponential(100, 10_000)
    assert found.mean == pytest.approx(100, rel=0.02)
    assert found.values[len(found.values) // 2] == pytest.approx(100 * math.log(2), abs=2)
    cut = Lengths.exponential(100, 100)
    assert max(cut.values) == 100
    assert cut.mean == pytest.approx(100 * (1 - math.exp(-1)), rel=0.02)
    seen = Lengths.observed([5, 1, 300], 64)
    assert seen.values == (1, 5, 64)
    assert sorted(seen.drawn(6)) == [1, 1, 5, 5, 64, 64]
    assert found.drawn(7) == found.drawn(7)
    for bad in ((), (0, 1), (2, 1)):
        with pytest.raises(ValueError, match="ascending"):
            Lengths(bad)
    with pytest.raises(UserError, match="at least one of them"):
        Lengths.observed([], 3)


def test_equal_lengths_are_a_fixed_length() -> None:
    work = workload(2, 4, graphs=True)
    same = replace(work, lengths=Lengths((work.response,)))
    assert predict(same, RATES) == predict(work, RATES)


def test_early_stop_saves_what_is_not_decoded() -> None:
    work = workload(2, 1, graphs=True, decode=None)
    short = replace(work, lengths=Lengths.exponential(20, work.response))
    late = replace(short, early_stop=False)
    assert generation_seconds(late, RATES) == generation_seconds(work, RATES)
    early = generation_seconds(short, RATES)
    # Not shorter than the steps of one sequence of the longest, not longer than all at full length.
    alone = decode_stages(work.actor.spec, work.generation, 1, work.prompt, RATES, True).step(1)
    assert short.lengths is not None
    longest = max(short.lengths.drawn(work.sequences)) - 1
    assert alone * longest < early < generation_seconds(work, RATES)
    quick = replace(RATES, layer_host=1e-6, pass_host=1e-6, train_host=1e-6)
    assert predict(short, quick).training < predict(work, quick).training
    assert predict(short, RATES).training <= predict(work, RATES).training, (
        "where hosts issue, as many passes"
    )
    # A queue of half the slots decodes for longer, at no more sequences at a time.
    assert early < generation_seconds(replace(short, slots=32), RATES)


def test_what_bounds_a_stage_is_what_changes_it() -> None:
    work = workload(2, 4, graphs=True)
    said = bounds(work, replace(RATES, layer_host=1e-6))
    assert said["switch"] == "nothing is moved"
    assert said["training"].startswith("devices compute, ")
    slow = replace(RATES, layer_host=1.0)
    assert bounds(work, slow)["training"].startswith("hosts issue, ")
    assert bounds(replace(work, graphs=False), slow)["generation"].startswith("hosts issue decode passes")
    assert bounds(replace(work, decode=64), RATES)["generation"].startswith("a micro-batch goes round")
    many = replace(work, decode=4, graphs=True)
    assert bounds(many, RATES)["generation"].startswith("devices run decode passes")
    # (P - 1) of M + P - 1 passes are idle in a pipeline of equal stages.
    even = replace(RATES, train_host=1e-9, message=1e15, products=1e12, step_bytes=1e-9, bus=1e15)
    idle = float(
        bounds(workload(1, 4, prompt=64, response=64), even)["training"].split(", ")[1].split("%")[0]
    )
    assert idle == pytest.approx(100 * 3 / (16 + 3), abs=2)


def test_memory_that_both_stages_want_is_taken_anew() -> None:
    rank = RankMemory(0, {"weights": 10}, {"training": {"activations": 50}, "generation": {"kv cache": 30}})
    work, slow = workload(), replace(RATES, fixed=Fixed(map_s_per_byte=1e-2))
    assert remapped(work, [rank], 90) == work
    again = remapped(work, [rank], 89)
    assert again.remapped == 50
    before, after = predict(work, slow), predict(again, slow)
    assert after.generation - before.generation == pytest.approx(0.5)
    assert after.training - before.training == pytest.approx(0.5)
    assert after.inference == before.inference


def test_a_cache_that_is_kept_is_mapped_and_recorded_for_once() -> None:
    cache = Cache(pages=2, page_bytes=15, rows=1, columns=1, kept=True)
    stages = {"training": {"kv cache": 30}, "generation": {"kv cache": 30}}
    rank = RankMemory(0, {"weights": 10}, stages, cache=cache)
    rates = replace(RATES, fixed=Fixed(map_s_per_byte=1e-9, capture_s_per_bucket=0.3))
    work = workload(graphs=True)
    kept = remapped(work, [rank, rank], 1)
    assert kept == replace(work, kept=True)
    assert remapped(work, [rank, replace(rank, cache=replace(cache, kept=False))], 100) == work
    before, after = predict(work, rates), predict(kept, rates)
    rows = -(-work.sequences // work.generation.dp)
    mapped = kv_bytes(work.actor.spec, work.generation, 0, rows * (work.prompt + work.response), 2) * 1e-9
    recorded = 0.3 * decode_cut(work)[1]
    assert before.generation - after.generation == pytest.approx(mapped + recorded)
    assert after.training == before.training
