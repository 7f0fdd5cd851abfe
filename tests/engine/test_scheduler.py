"""Decisions of the scheduler that tokens do not show: who waits for what, and in which order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.engine.generate.scheduler import Changes, Scheduler
from tests.engine.accounting import audit, families


class Driven:
    """A scheduler over pages of four positions whose tokens are read when the test says so."""

    def __init__(self, prompts: list[list[int]], new: int, rows: tuple[int, ...], pages: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.ended = [False] * len(prompts)
        self.scheduler = Scheduler(prompts, new, rows, pages, 4, self.tokens, self.ended)

    def round(self) -> list[int]:
        """Who joined before it."""
        changes = self.scheduler.between(True)
        audit(self.scheduler)
        for group in range(len(self.scheduler.sizes)):
            self.scheduler.drew(group)
        return [join.request for join in changes.joins]

    def read(self) -> None:
        for i, drawn in enumerate(self.scheduler.drawn):
            self.tokens[i] += [9] * (drawn - len(self.tokens[i]))


def short_of_pages() -> Driven:
    """Two of three requests have decoded eight tokens each: four pages are theirs, of five that there are."""
    driven = Driven([[n] * 4 for n in range(3)], 12, (2,), 5)
    assert driven.round() == [0, 1]
    for _ in range(4):
        driven.round()
    assert not driven.scheduler.put_back
    return driven


def test_who_is_put_back_is_first_in_the_queue() -> None:
    driven = short_of_pages()
    for _ in range(4):
        driven.round()
    assert driven.scheduler.put_back == 1
    assert list(driven.scheduler.running) == [0]
    assert list(driven.scheduler.waiting) == [1, 2]


def test_who_is_put_back_joins_when_its_tokens_were_read() -> None:
    """As on CUDA, or behind the last of several stages, where they are still under way."""
    driven = short_of_pages()
    for _ in range(4):
        driven.round()
    driven.ended[0] = True
    assert driven.round() == []
    assert not driven.scheduler.running
    assert driven.scheduler.busy
    driven.read()
    changes = driven.scheduler.between(True)
    (join,), (prefill,) = changes.joins, changes.prefills
    kept = driven.scheduler.drawn[1]
    assert (join.request, join.token, join.position, join.drawn) == (1, 9, 4 + kept - 1, kept)
    assert prefill.tokens == [*[1] * 4, *[9] * (kept - 1)]
    audit(driven.scheduler)


def test_who_has_ended_meanwhile_waits_no_more() -> None:
    driven = short_of_pages()
    for _ in range(4):
        driven.round()
    driven.read()
    driven.ended[0] = driven.ended[1] = True
    assert driven.round() == [2]
    assert not driven.scheduler.waiting


def test_few_rows_that_are_free_wait_for_more() -> None:
    """Of 64 rows two are a thirty-second."""
    driven = Driven([[n] for n in range(70)], 50, (32, 32), 64 * 13)
    assert len(driven.round()) == 64
    driven.ended[5] = True
    assert driven.round() == []
    driven.ended[40] = True
    assert driven.round() == [64, 65]
    assert sorted(map(len, driven.scheduler.groups)) == [32, 32]


@pytest.mark.parametrize("pages", [13, 14, 20])
def test_a_page_is_left_for_everybody_who_is_decoded(pages: int) -> None:
    """Rows that begin with one page each, and go on to thirteen."""
    driven = Driven([[n] for n in range(20)], 50, (20,), pages)
    joined = len(driven.round())
    assert driven.scheduler.pool.free >= joined > 1
    assert joined == pages // 2


def touched(scheduler: Scheduler, changes: Changes) -> set[int]:
    """Groups of which a row changed."""
    rows = {row for move in changes.moves for row in move} | {*changes.parked}
    rows |= {join.row for join in changes.joins}
    ends = [start + size for start, size in zip(scheduler.starts, scheduler.sizes, strict=True)]
    return {next(group for group, end in enumerate(ends) if row < end) for row in rows}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 14), st.integers(1, 5)), min_size=1, max_size=6),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(0, 8),
    st.lists(st.tuples(st.sampled_from(["round", "leave", "read"]), st.integers(0, 29)), max_size=40),
)
def test_families_are_found_anew_only_where_rows_change(
    texts: list[tuple[int, int]], sizes: list[int], more: int, events: list[tuple[str, int]]
) -> None:
    """Whoever joins, ends, is put back or grows, they are those of the block tables."""
    prompts = [[n] * length for n, (length, samples) in enumerate(texts) for _ in range(samples)]
    driven = Driven(prompts, 12, tuple(sizes), 7 + more)
    scheduler, groups = driven.scheduler, range(len(sizes))
    for event, number in events:
        before = [scheduler.families(group) for group in groups]
        changes = Changes()
        if event == "round":
            driven.ended[number % len(prompts)] |= number % 3 == 0
            changes = scheduler.between(True)
            audit(scheduler)
            for group in groups:
                scheduler.drew(group)
        elif event == "leave":
            changes = scheduler.leave(number % len(sizes), True)
        else:
            driven.read()
        for group in groups:
            assert scheduler.families(group) == families(scheduler, group)
            if group not in touched(scheduler, changes):
                assert scheduler.families(group) is before[group]
