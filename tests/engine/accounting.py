"""An accountant of pages: counts anew, from block tables alone, who holds what."""

from __future__ import annotations

from collections import Counter
from itertools import takewhile

from puzzle.engine.generate.scheduler import Scheduler


def audit(scheduler: Scheduler) -> None:
    """Between two rounds: no page is lost, held twice, or shared by sequences that differ in it."""
    pool, size, prompts = scheduler.pool, scheduler.page, scheduler.prompts
    held = Counter(page for table in scheduler.tables.values() for page in table)
    for table in scheduler.tables.values():
        assert len(set(table)) == len(table), "a page twice in one sequence"
    held.update(page for pages in scheduler.held.values() for page in pages)
    assert pool.holders == [held[page] for page in range(pool.pages + 1)], "holders are miscounted"
    assert not pool.holders[0], "somebody holds what is nobody's"
    free = sorted(pool._free)
    assert free == [page for page in range(1, pool.pages + 1) if not held[page]], "a page leaked"
    for i, table in scheduler.tables.items():
        position = len(prompts[i]) + scheduler.drawn[i] - 1
        assert len(table) == position // size + 1, "not a page for each position up to the next"
        for column, page in enumerate(table):
            others = [j for j, other in scheduler.tables.items() if j != i and page in other]
            for j in others:
                assert scheduler.tables[j][column] == page, "one page at two places"
                end = (column + 1) * size
                assert prompts[i][:end] == prompts[j][:end], "sequences share what differs"
                assert end < min(len(prompts[i]), len(prompts[j])), "a shared page is written to"
    for group in range(len(scheduler.groups)):
        assert scheduler.families(group) == families(scheduler, group), "rows share other pages than is said"
    rows = [i for group in scheduler.groups for i in group]
    assert sorted(rows) == sorted(scheduler.running) == sorted(scheduler.tables)
    assert all(len(g) <= size for g, size in zip(scheduler.groups, scheduler.sizes, strict=True))
    assert not set(rows) & set(scheduler.waiting)
    assert len(set(scheduler.waiting)) == len(scheduler.waiting)


def families(scheduler: Scheduler, group: int) -> list[tuple[int, list[int]]]:
    """What `Scheduler.families` should say: rows whose tables begin alike, and for how many positions."""
    tables = [scheduler.tables[i] for i in scheduler.groups[group]]
    found = []
    for first in dict.fromkeys(table[0] for table in tables):
        rows = [row for row, table in enumerate(tables) if table[0] == first]
        alike = takewhile(
            lambda column: len(set(column)) == 1, zip(*map(tables.__getitem__, rows), strict=False)
        )
        if len(rows) > 1:
            found.append((scheduler.page * len(list(alike)), rows))
    return found
