"""How many pages a batch wants: counted one by one; and what a device holds of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle.cli import main
from puzzle.config import memory_report as footprint
from puzzle.config.load import load_config
from puzzle.config.resolve import RunPlan, resolve
from puzzle.errors import UserError
from puzzle.plan.pages import KEPT_FREE, PAGE, Cache, wanted_pages, whole_pages

groups = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 5)), min_size=1, max_size=6)


@given(groups, st.integers(1, 20), st.integers(1, 9))
def test_pages_are_those_that_positions_touch(prompts: list[tuple[int, int]], new: int, page: int) -> None:
    """A page of a prompt is one for all samples if none of them writes to it."""
    touched = set()
    for number, (length, samples) in enumerate(prompts):
        for sample in range(samples):
            for position in range(length + new - 1):
                place = position // page
                shared = (place + 1) * page <= length - 1
                touched.add((number, None if shared else sample, place))
    count = sum(samples for _, samples in prompts)
    assert wanted_pages(prompts, new, page, count) == len(touched)
    longest = max(whole_pages(length, new, page) for length, _ in prompts)
    for rows in range(1, count):
        assert wanted_pages(prompts, new, page, rows) == min(len(touched), rows * longest)


def plan_of(*options: str) -> RunPlan:
    model = ["--actor.init.preset", "7b", "--reward.init.preset", "350m", "--dtype", "bf16"]
    sizes = ["--data.random_tokens", "512", "--generation.max_new_tokens", "513", "--batch", "2048"]
    few = ["--algorithm.microbatch_tokens", "16384", "--layout.tp", "8", "--recompute", "true"]
    return resolve(load_config(None, [*model, *sizes, *few, "--device", "cuda", *options]))


def generating(plan: RunPlan, limit: int | None = None) -> tuple[Cache, int]:
    """The cache of the first rank, and what it needs in all while it generates."""
    rank = footprint.estimate(plan, True, limit)[0]
    assert rank.cache is not None
    return rank.cache, rank.total("generation")


LIMIT = 80 * 10**9


def test_a_device_holds_what_is_left_beside_the_weights() -> None:
    """2048 sequences of 1024 cached positions, eight pages each; what a device lacks, it does without."""
    whole, needed = generating(plan_of())
    assert (whole.pages, whole.rows, whole.columns, whole.together) == (2048 * 8 + 1, 2048, 8, 2048)
    assert needed > LIMIT
    cache, held = generating(plan_of(), LIMIT)
    assert held <= (1 - KEPT_FREE) * LIMIT < held + cache.page_bytes
    assert 1 < cache.together < 2048
    assert cache.together == (cache.pages - 1) // 8
    # 32 layers, 32 / 8 heads of 128, keys and values of two bytes, 128 positions.
    assert cache.page_bytes == 32 * 4 * 128 * 2 * 2 * PAGE
    plenty = generating(plan_of("--generation.keep_graphs", "false"), 100 * LIMIT)
    assert plenty == (whole, needed)


def test_what_graphs_read_is_kept_where_it_fits_beside_training() -> None:
    """In all stages the whole cache, switched weights and what graphs compute in; a tenth of the device is
    left. Where it does not fit, training has the memory."""
    switched = ["--batch", "16", "--algorithm.minibatch", "16", "--generation.layout.tp", "4"]
    switched += ["--generation.layout.dp", "2"]
    plan = plan_of(*switched)
    without = footprint.estimate(plan_of(*switched, "--generation.keep_graphs", "false"), True, LIMIT)[0]
    peak = footprint.estimate(plan_of(*switched, "--generation.keep_graphs", "true"), True)[0].peak
    kept = footprint.estimate(plan, True, int(peak / 0.9) + 1)[0]
    assert footprint.estimate(plan, True, int(peak / 0.9) - 1)[0] == without
    assert footprint.estimate(plan, True)[0] == without
    assert kept.cache is not None
    assert without.cache is not None
    assert (kept.cache.kept, without.cache.kept) == (True, False)
    assert kept.cache == replace(without.cache, kept=True)
    cache = kept.cache.pages * kept.cache.page_bytes
    weights = without.stages["generation"]["generation weights"]
    assert weights > 0
    more = {stage: kept.total(stage) - without.total(stage) for stage in kept.stages}
    graphs = more["generation"]
    assert 8 * 32000 // 4 * 4 <= graphs < 1 << 20  # logits of 8 rows in fp32; a layer of 8 tokens has as much
    assert more == {
        "switch": cache + graphs,
        "generation": graphs,
        "inference": cache + graphs + weights,
        "training": cache + graphs + weights,
    }
    assert "kept beside training" in footprint.table([kept])
    assert "kept beside training" not in footprint.table([without])
    eager = plan_of(*switched, "--generation.graphs", "false")
    assert footprint.estimate(eager, True, 100 * LIMIT)[0] == without
    prefilled = [*switched, "--switch.overlap", "prefill"]
    assert footprint.estimate(plan_of(*prefilled), True, 100 * LIMIT)[0].cache == without.cache
    with pytest.raises(UserError, match="keep_graphs: a graph cannot await"):
        plan_of(*prefilled, "--generation.keep_graphs", "true")


def test_few_sequences_at_a_time_and_samples_of_a_prompt_want_fewer() -> None:
    few, _ = generating(plan_of("--generation.max_sequences", "16"))
    assert (few.pages, few.rows) == (16 * 8 + 1, 16)
    # 256 prompts of 8 samples: the three pages that 511 tokens fill are one for all.
    shared, _ = generating(plan_of("--batch", "256", "--generation.samples", "8"))
    assert shared.pages == 256 * (3 + 8 * 5) + 1
    # 32 sequences in each of three replicas: 10 or 11 prompts of three samples, 12 where a share cuts two.
    plan = plan_of("--batch", "32", "--generation.samples", "3", "--layout.tp", "1", "--layout.dp", "3")
    assert generating(plan)[0].pages == 12 * 3 + 32 * 5 + 1


def test_the_least_cache_is_that_of_the_longest_sequence() -> None:
    cache, needed = generating(plan_of(), 10**9)
    assert (cache.pages, cache.together) == (9, 1)
    assert needed > 10**9
    with pytest.raises(UserError, match=r"needs .* its device has 0\.9"):
        footprint.require(footprint.estimate(plan_of(), True, 10**9), 10**9)


def test_a_dry_run_tells_how_many_run_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(
        "actor: {init: {preset: 7b}}\nreward: {init: {preset: 350m}}\nlayout: {tp: 8}\nbatch: 2048\n"
        "dtype: bf16\nrecompute: true\ndevice: cuda\ndata: {random_tokens: 512}\n"
        "generation: {max_new_tokens: 513}\nalgorithm: {microbatch_tokens: 16384}\n"
    )
    start = ["train", "--config", str(tmp_path / "run.yaml"), "--dry-run"]
    assert main(start) == 0
    assert "generation: up to 2048 sequences of a replica at a time in 16385 pages" in capsys.readouterr().out
    assert main([*start, "--device-memory", "80GB"]) == 0
    cache, _ = generating(plan_of(), LIMIT)
    said = capsys.readouterr().out
    assert f"in {cache.pages} pages" in said
    assert f"{cache.together} of them at full length" in said


def test_sequences_at_full_length_are_no_more_than_rows() -> None:
    cache = Cache(pages=101, page_bytes=1, rows=7, columns=10)
    assert cache.together == 7
    assert replace(cache, rows=70).together == 10
    assert replace(cache, pages=3).together == 1
