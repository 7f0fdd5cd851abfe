"""Decisions of the scheduler that tokens do not show: who waits for what, and in which order."""

from __future__ import annotations

import pytest

from puzzle.engine.generate.scheduler import Scheduler
from tests.engine.accounting import audit


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
