"""Which sequences are decoded, in which rows, with which pages: a replica's continuous batch.

Requests wait in a queue. Between two rounds of the ring rows come free, sequences that need a page get one,
and waiting ones join the rows in use. All of it follows from the requests and from the tokens that were read,
so all ranks of a replica come to the same decisions, and nobody has to be told.

A sequence holds a page for every `page` of its cached positions. The samples of one prompt share the pages
that the prompt fills; of the last, partly filled one all but the first have a copy. Where pages run short,
first the prompts are let go that are kept for samples still waiting, then the sequence that joined last is
put back: its tokens stay, and they and its prompt are cached again when it joins anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from puzzle.engine.generate.pages import PagePool
from puzzle.plan.pages import whole_pages

REFILL_SHARE = 32
"""Waiting sequences join once this part of the rows is free (or all that wait fit, or nobody is decoded): a
prefill pass of a few tokens takes as long as reading all weights."""


@dataclass(frozen=True)
class Prefill:
    """Tokens to be cached, one at least, behind the first `past` of their sequence, and the pages of all."""

    tokens: Sequence[int]
    pages: Sequence[int]
    past: int = 0


@dataclass(frozen=True)
class Join:
    """A row from now on decodes `request`: `token`, at `position`, is what it reads next, after `drawn`
    tokens of its own; `pages` hold all positions up to there."""

    row: int
    request: int
    token: int
    position: int
    drawn: int
    pages: Sequence[int]


@dataclass
class Changes:
    """What to do with rows and pages, in this order: `moves` (source row, target row) of sequences, all
    at once, `parked` rows have none any more, `pages` (row, column, page) enter the block table, `prefills`
    run, `copies` (source, target) of pages, `joins`."""

    moves: list[tuple[int, int]] = field(default_factory=list)
    parked: list[int] = field(default_factory=list)
    pages: list[tuple[int, int, int]] = field(default_factory=list)
    prefills: list[Prefill] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    joins: list[Join] = field(default_factory=list)


class Scheduler:
    """The continuous batch of a replica.

    `groups[j]` are the requests in the rows of decode micro-batch j, which begin at `starts[j]`; rows in use
    come first. `drawn[i]` counts the passes that drew a token for request i, read or not; the caller keeps
    `tokens[i]`, those that were read, and `ended[i]`.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        groups: Sequence[int],
        pages: int,
        page: int,
        tokens: Sequence[Sequence[int]],
        ended: Sequence[bool],
    ) -> None:
        """`groups` are the rows of each decode micro-batch. ValueError where a sequence has no room alone."""
        self.prompts, self.new_tokens, self.page = prompts, new_tokens, page
        self.tokens, self.ended = tokens, ended
        self.sizes = tuple(groups)
        self.starts = [sum(groups[:j]) for j in range(len(groups))]
        self.groups: list[list[int]] = [[] for _ in groups]
        self.pool = PagePool(pages)
        self.waiting = deque(range(len(prompts)))
        self.running: dict[int, int] = {}  # request to group, in the order in which they joined
        self.tables: dict[int, list[int]] = {}
        self.drawn = [0] * len(prompts)
        self.put_back = 0
        self._thinned: set[int] = set()
        self._done: list[int] = []
        # Of groups whose rows are as they were: a sequence in a row keeps its first page.
        self._families: dict[int, list[tuple[int, list[int]]]] = {}
        numbers: dict[tuple[int, ...], int] = {}
        self._prompt = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts]
        self._fresh = [0] * len(numbers)  # waiting samples of a prompt that have drawn nothing
        for number in self._prompt:
            self._fresh[number] += 1
        self._sharing = any(
            self._fresh[number] > 1 and len(prompt) > page
            for number, prompt in zip(self._prompt, prompts, strict=True)
        )
        self.held: dict[int, list[int]] = {}  # pages of prompts, for samples that wait
        if any(self._whole(i) > pages for i in range(len(prompts))):
            raise ValueError(f"{pages} pages of {page} tokens hold no whole sequence")

    def _whole(self, i: int) -> int:
        """Pages of a request at its full length: its last token is never cached."""
        return whole_pages(len(self.prompts[i]), self.new_tokens, self.page)

    def _position(self, i: int) -> int:
        """Where what the request reads next goes."""
        return len(self.prompts[i]) + self.drawn[i] - 1

    @property
    def busy(self) -> bool:
        """Whether anybody is decoded or waits."""
        return bool(self.running or self.waiting)

    @property
    def sharing(self) -> bool:
        """Whether samples of a prompt may share pages that it fills."""
        return self._sharing

    def families(self, group: int) -> list[tuple[int, list[int]]]:
        """The rows of a group, counted from its first, that share whole pages of a prompt, two at least, and
        how many positions these have."""
        if group not in self._families:
            found: dict[int, tuple[int, list[int]]] = {}
            for row, i in enumerate(self.groups[group]):
                if whole := (len(self.prompts[i]) - 1) // self.page * self.page:
                    found.setdefault(self.tables[i][0], (whole, []))[1].append(row)
            self._families[group] = [family for family in found.values() if len(family[1]) > 1]
        return self._families[group]

    def drew(self, group: int) -> None:
        """A pass drew a token for every row in use of a group."""
        for i in self.groups[group]:
            self.drawn[i] += 1

    def leave(self, group: int, early: bool) -> Changes:
        """Take out of a group who has all its tokens and, if `early`, who has ended."""
        changes = Changes()
        for i in [i for i in self.groups[group] if self._over(i, early)]:
            self._release(i)
        self._close_ranks(changes)
        return changes

    def _over(self, i: int, early: bool) -> bool:
        return self.drawn[i] >= self.new_tokens or (early and self.ended[i])

    def between(self, early: bool) -> Changes:
        """What happens between two rounds: who is over leaves, who goes on has room for one more position,
        and who waits joins."""
        changes = Changes()
        for i in [i for i in self.running if self._over(i, early)]:
            self._release(i)
        grown = self._grow()
        self._close_ranks(changes)
        if grown:
            rows = {i: self.starts[j] + r for j, order in enumerate(self.groups) for r, i in enumerate(order)}
            changes.pages += [(rows[i], column, page) for i, column, page in grown]
        self._admit(changes)
        return changes

    def _release(self, i: int) -> None:
        """The request is decoded no more; its row is taken away by `_close_ranks`."""
        self._thinned.add(self.running.pop(i))
        self.pool.drop(self.tables.pop(i))

    def _close_ranks(self, changes: Changes) -> None:
        """Rows of released requests: the last row in use moves into each, and those behind are parked."""
        for group in sorted(self._thinned):
            order, start = self.groups[group], self.starts[group]
            self._families.pop(group, None)
            before = tuple(order)
            for row in reversed(range(len(before))):
                if order[row] not in self.running:
                    moved = order.pop()
                    if row < len(order):
                        order[row] = moved
            was = {i: row for row, i in enumerate(before)}
            changes.moves += [(start + was[i], start + row) for row, i in enumerate(order) if was[i] != row]
            changes.parked += range(start + len(order), start + len(before))
        self._thinned.clear()

    def _grow(self) -> list[tuple[int, int, int]]:
        """A page for everybody whose next position needs one, the oldest first: (request, column, page)."""
        grown = []
        for i in list(self.running):
            if i not in self.running or self._position(i) // self.page < len(self.tables[i]):
                continue
            while not self.pool.free and i in self.running:
                self._make_room()
            if i in self.running:
                (page,) = self.pool.take(1)
                grown.append((i, len(self.tables[i]), page))
                self.tables[i].append(page)
        return grown

    def _make_room(self) -> None:
        """Let go of what is kept for samples that wait, else put back who joined last."""
        if self.held:
            self.pool.drop(self.held.popitem()[1])
            return
        last = next(reversed(self.running))
        self._release(last)
        self.waiting.appendleft(last)
        self.put_back += 1

    def _admit(self, changes: Changes) -> None:
        if self.put_back:
            self.waiting = deque(i for i in self.waiting if not self.ended[i])
        free = sum(self.sizes) - len(self.running)
        # Everybody in use may soon need a further page.
        reserve = sum(len(self.tables[i]) < self._whole(i) for i in self.running)
        few = min(max(1, sum(self.sizes) // REFILL_SHARE), len(self.waiting))
        if self.running and free < few:
            return
        joined = 0
        while self.waiting and joined < free:
            i = self.waiting[0]
            if len(self.tokens[i]) < self.drawn[i]:
                break  # put back; its last tokens are still on their way to the host
            while not self.running and self._need(i) > self.pool.free:
                self._make_room()
            grows = self._position(i) // self.page + 1 < self._whole(i)
            together = 1 if joined else few
            if self.running and (self._need(i) + grows) * together + reserve > self.pool.free:
                break
            self.waiting.popleft()
            self._join(i, changes)
            reserve += grows
            joined += 1
        # Not before: what is copied from them must not be taken and filled meanwhile.
        for number in self._done:
            self.pool.drop(self.held.pop(number))
        self._done.clear()

    def _shares(self, i: int) -> bool:
        """Whether a request that joins now uses, or makes, pages for the samples of its prompt."""
        number = self._prompt[i]
        if self.drawn[i] or len(self.prompts[i]) < 2:
            return False
        if number in self.held:
            return True
        return self._fresh[number] > 1

    def _need(self, i: int) -> int:
        """Free pages that a request takes when it joins."""
        held = self._shares(i) and self._prompt[i] in self.held
        return 1 if held else self._position(i) // self.page + 1

    def _join(self, i: int, changes: Changes) -> None:
        read = [*self.prompts[i], *self.tokens[i]]
        cached = len(read) - 1
        if self._shares(i):
            pages = self._shared_pages(i, changes)
        else:
            pages = self.pool.take(-(-cached // self.page))
            if cached:
                changes.prefills.append(Prefill(read[:-1], tuple(pages)))
        if len(pages) <= cached // self.page:
            pages = [*pages, *self.pool.take(1)]
        if not self.drawn[i]:
            self._fresh[self._prompt[i]] -= 1
        group = min(
            (j for j, size in enumerate(self.sizes) if len(self.groups[j]) < size),
            key=lambda j: len(self.groups[j]),
        )
        row = self.starts[group] + len(self.groups[group])
        self.groups[group].append(i)
        self._families.pop(group, None)
        self.running[i], self.tables[i] = group, pages
        changes.joins.append(Join(row, i, read[-1], cached, self.drawn[i], tuple(pages)))

    def _shared_pages(self, i: int, changes: Changes) -> list[int]:
        """Pages of the prompt without its last token, kept while samples wait.

        The first sample writes behind the prompt, in its last page: what others copy of it stays.
        """
        number, cached = self._prompt[i], len(self.prompts[i]) - 1
        if number not in self.held:
            held = self.held[number] = self.pool.take(-(-cached // self.page))
            changes.prefills.append(Prefill(self.prompts[i][:-1], tuple(held)))
            self.pool.share(held)
            return list(held)
        whole, rest = divmod(cached, self.page)
        held = self.held[number]
        self.pool.share(held[:whole])
        own = self.pool.take(int(rest > 0))
        changes.copies += [(held[whole], page) for page in own]
        if self._fresh[number] == 1:
            self._done.append(number)
        return [*held[:whole], *own]
