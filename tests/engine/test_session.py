"""The ring as sessions run it, with toy passes: any stages, batch, micro-batches, lengths and ends.

Stages are threads; a transfer ends when both sides have begun it, and both must mean tensors of one size. A
toy stage remembers the tokens of every cache row: what the last stage draws depends on all of them.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.engine.generate.decode_ring import DecodeRingStage, ring_of
from puzzle.engine.generate.requests import Request, RequestStates, Response
from puzzle.engine.generate.sampling import Sampled, SamplingParams
from puzzle.engine.generate.scheduler import Changes, Scheduler
from puzzle.plan.pages import PREFILL_TOKENS, whole_pages
from puzzle.plan.pipeline.actions import Action, Op
from tests.engine.accounting import audit

WIDE = 3
PATIENCE = 20.0


def following(tokens: list[int]) -> int:
    return sum((place + 3) * (token + 1) for place, token in enumerate(tokens)) % 97


def logprob(token: int) -> float:
    return -token / 8


class ToyPasses:
    """What `ModelRunner` does, in lists. Hidden states are (row, last token, tokens before it)."""

    def __init__(self, stage: int, stages: int) -> None:
        first, last = stage == 0, stage == stages - 1
        self.decoder = SimpleNamespace(
            first=first,
            last=last,
            spec=SimpleNamespace(hidden_size=WIDE),
            layout=SimpleNamespace(tp=1),
            numerics=SimpleNamespace(multiple=1),
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        self.prefilled = 0
        self.next: dict[int, int | None] = {}
        self.position: dict[int, int] = {}

    def start(
        self, groups: list[int], pages: int, page: int, columns: int, params: SamplingParams, sharing: bool
    ) -> None:
        self.shares, self.families = sharing, [list[tuple[int, list[int]]]() for _ in groups]
        self.groups, self.recorded, self.page = groups, None, page
        self.starts = [sum(groups[:j]) for j in range(len(groups))]
        self.memory: list[list[int | None]] = [[None] * self.page for _ in range(pages + 1)]
        self.table = [[0] * columns for _ in range(sum(groups))]

    def record(self, leaving: bool) -> None:
        assert not self.prefilled
        self.recorded = leaving

    def prefill(self, prefills: list[Any], x: Any) -> torch.Tensor:
        told = [
            [n, token, place] for n, p in enumerate(prefills) for place, token in enumerate(p.tokens, p.past)
        ]
        assert not any(part.past for part in prefills[1:])
        if x is not None:
            assert x.tolist() == told
        for part in prefills:
            assert len(part.pages) >= -(-(part.past + len(part.tokens)) // self.page)
            assert None not in [t for page in part.pages for t in self.memory[page]][: part.past]
            for place, token in enumerate(part.tokens, part.past):
                self.memory[part.pages[place // self.page]][place % self.page] = token
        self.prefilled += sum(len(part.tokens) for part in prefills)
        return torch.tensor(told, dtype=torch.float32)

    def copy(self, pages: list[tuple[int, int]]) -> None:
        for source, target in pages:
            self.memory[target] = list(self.memory[source])

    def extend(self, pages: list[tuple[int, int, int]]) -> None:
        for row, column, page in pages:
            self.table[row][column] = page

    def join(self, joins: list[Any], row_seeds: list[int]) -> None:
        assert len(joins) == len(row_seeds)
        for join in joins:
            assert join.row not in self.position
            self.next[join.row], self.position[join.row] = join.token, join.position
            self.table[join.row][: len(join.pages)] = join.pages

    def relate(self, group: int, families: list[tuple[int, list[int]]]) -> None:
        assert self.shares
        self.families[group] = families

    def audit(self, group: int, rows: list[int]) -> None:
        """Families are the rows that have their first page in common, and have all positions in common that
        they are said to."""
        by_page: defaultdict[int, list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            by_page[self.table[row][0]].append(number)
        related = [sorted(numbers) for _, numbers in self.families[group]]
        assert sorted(related) == sorted(numbers for numbers in by_page.values() if len(numbers) > 1)
        for positions, numbers in self.families[group]:
            pages, rest = divmod(positions, self.page)
            assert pages
            assert not rest
            assert len({tuple(self.table[rows[number]][:pages]) for number in numbers}) == 1
            assert all(self.position[rows[number]] >= positions for number in numbers)
            further = [tuple(self.table[rows[number]][: pages + 1]) for number in numbers]
            if all(self.position[rows[number]] // self.page >= pages for number in numbers):
                assert len(set(further)) == len(further), "they share more"

    def decode(self, group: int, active: int, x: Any) -> Any:
        rows = [self.starts[group] + i for i in range(active)]
        self.audit(group, rows)
        # Several stages have recorded what they need before the ring began; a single one has not.
        assert (self.recorded is None) == (self.decoder.first and self.decoder.last)
        assert self.recorded is not False or active == self.groups[group]
        assert {row for row in self.position if row >= self.starts[group]} >= set(rows)
        if x is not None:
            for row, told in zip(rows, x.tolist(), strict=True):
                assert told[0] == row
                assert told[2] == self.position[row]
                self.next[row] = int(told[1])
        told, drawn = [[row, self.next[row], self.position[row]] for row in rows], []
        for row in rows:
            place = self.position[row]
            self.memory[self.table[row][place // self.page]][place % self.page] = self.next[row]
            read = [token for page in self.table[row] for token in self.memory[page]][: place + 1]
            drawn.append(following(cast(list[int], read)) if self.decoder.last else 0)
            self.next[row], self.position[row] = drawn[-1] if self.decoder.last else None, place + 1
        if not self.decoder.last:
            return torch.tensor(told, dtype=torch.float32)
        bits = torch.tensor([logprob(token) for token in drawn]).view(torch.int32)
        return Sampled(torch.stack((torch.tensor(drawn, dtype=torch.int32), bits)))

    def put(self, tokens: torch.Tensor, rows: list[int]) -> None:
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row >= 0:
                assert self.next[row] is None
                self.next[row] = token

    def move(self, moves: list[tuple[int, int]], parked: list[int]) -> None:
        was = [(self.next[source], self.position[source], list(self.table[source])) for source, _ in moves]
        for (_, target), held in zip(moves, was, strict=True):
            self.next[target], self.position[target], self.table[target] = held
        for row in parked:
            del self.next[row], self.position[row]


class Wires:
    """Channels between threads."""

    def __init__(self) -> None:
        self.moved = threading.Condition()
        self.ends: defaultdict[Any, tuple[list, list]] = defaultdict(lambda: ([], []))

    def begin(self, channel: Any, side: int, item: Any) -> int:
        with self.moved:
            self.ends[channel][side].append(item)
            self.moved.notify_all()
            return len(self.ends[channel][side]) - 1

    def end(self, channel: Any, side: int, number: int) -> Any:
        """What the other side began with."""
        other = self.ends[channel][1 - side]
        with self.moved:
            assert self.moved.wait_for(lambda: len(other) > number, PATIENCE), "deadlock"
        return other[number]


class ToyExecution:
    def __init__(self, stage: int, wires: Wires) -> None:
        self.stage, self.wires = stage, wires
        self.under_way: dict[Any, int] = {}
        self.done: list[Action] = []

    def run(self, part: Any, models: Any) -> None:
        (model,) = models.values()
        arrived, leaving = None, []
        for action in part.actions[self.stage]:
            self.done.append(action)
            if action.op in (Op.PREFILL, Op.DECODE):
                leaving += model.compute(action, arrived)
                arrived = None
                continue
            message = action.message(self.stage)
            side = int(action.op in (Op.RECV, Op.WAIT_RECV))
            if action.op is Op.SEND:
                self.under_way[message] = self.wires.begin(message.channel, 0, (message, leaving.pop(0)))
            elif action.op is Op.RECV:
                self.under_way[message] = self.wires.begin(
                    message.channel, 1, (message, model.buffer(action))
                )
            else:
                name, other = self.wires.end(message.channel, side, self.under_way.pop(message))
                assert name == message
                if side:
                    arrived = other
        assert not leaving


def lengths_agree(wires: Wires) -> None:
    for sent, received in wires.ends.values():
        assert len(sent) == len(received)
        for (name, tensor), (other, room) in zip(sent, received, strict=True):
            assert name == other
            assert (tensor.numel(), tensor.dtype) == (room.numel(), room.dtype)


class Played(NamedTuple):
    responses: list[Response]
    rows: int
    put_back: int
    prefilled: int
    rounds: int


def play(
    stages: int,
    requests: list[Request],
    params: SamplingParams,
    sizes: Any = (None, None, PREFILL_TOKENS),
    late: int = 0,
    most: int | None = None,
    memory: tuple[int, int | None] = (4, None),
) -> list[Played]:
    """`sizes` of prefill and decode micro-batches, and tokens of the former; `memory` the positions of a page
    and how many more pages there are than the longest sequence needs (None: enough for all)."""
    wires, found, decisions = Wires(), [None] * stages, [[] for _ in range(stages)]
    page, more = memory
    whole = max(whole_pages(len(request.prompt), params.max_new_tokens, page) for request in requests)
    rows = min(most or len(requests), len(requests))
    pages = rows * whole if more is None else min(rows * whole, whole + more)
    ring = ring_of(stages, min(rows, pages), sizes[1])

    def stage(number: int) -> None:
        states, passes = RequestStates(requests, params), ToyPasses(number, stages)
        limits = (sizes[0], sizes[2])
        session = DecodeRingStage(cast(Any, passes), ring, states, (pages, page), late, prefill=limits)
        between = session.scheduler.between

        def audited(early: bool) -> Changes:
            changes = between(early)
            audit(session.scheduler)
            decisions[number].append(changes)
            return changes

        session.scheduler.between = audited
        execution = ToyExecution(number, wires)
        session.run(cast(Any, execution))
        assert tuple(execution.done) == ring.unrolled(tuple(session.prefills)).actions[number]
        assert not execution.under_way
        assert session.scheduler.pool.free == pages
        found[number] = Played(
            states.responses(),
            session.rows,
            session.scheduler.put_back,
            passes.prefilled,
            len(session.prefills),
        )

    threads = [threading.Thread(target=stage, args=(s,), daemon=True) for s in range(stages)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    assert None not in found, "a stage did not end well"
    assert all(told == decisions[0] for told in decisions)
    lengths_agree(wires)
    return cast(Any, found)


sizes = st.none() | st.integers(1, 7)


def truth_of(texts: list[list[int]], new: int, stops: Any) -> list[list[int]]:
    found = []
    for text in texts:
        tokens = list(text)
        while len(tokens) - len(text) < new:
            tokens.append(following(tokens))
            if tokens[-1] in stops:
                break
        found.append(tokens[len(text) :])
    return found


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.lists(st.integers(0, 96), min_size=1, max_size=9), st.integers(1, 4)), min_size=1)
    .map(lambda groups: [text for text, samples in groups for _ in range(samples)])
    .filter(lambda texts: len(texts) < 20),
    st.tuples(sizes, sizes, st.just(PREFILL_TOKENS) | st.integers(1, 9)),
    st.integers(1, 9),
    st.sets(st.integers(0, 96), max_size=40),
    st.integers(0, 1),
    st.none() | st.integers(1, 9),
    st.tuples(st.integers(1, 5), st.none() | st.integers(0, 9)),
)
@settings(max_examples=150, deadline=None)
def test_every_token_once_whoever_waits_or_ends_when(
    stages, texts, sizes, new, stops, late, most, memory
) -> None:
    """Samples of common prompts, few rows, few pages: the tokens of a plain loop, in every case."""
    params = SamplingParams(max_new_tokens=new, stop_ids=tuple(sorted(stops)))
    requests = [Request(text, i) for i, text in enumerate(texts)]
    truth = truth_of(texts, new, stops)
    kept = sum(map(len, truth))
    for played in play(stages, requests, params, sizes, late, most, memory):
        assert [response.tokens for response in played.responses] == truth
        told = [[logprob(token) for token in r.tokens] for r in played.responses]
        assert [r.logprobs for r in played.responses] == told
        assert [r.finished for r in played.responses] == [part[-1] in stops for part in truth]
        # Without lookahead no row is decoded for nothing; with it, once at most.
        assert kept <= played.rows <= kept + late * len(texts)


@pytest.mark.parametrize("stages", [1, 3])
def test_samples_of_a_prompt_are_prefilled_once_and_share_its_pages(stages: int) -> None:
    """Nine groups of eight, prompts of 33 tokens: 32 are cached in eight whole pages for all samples."""
    texts = [[n, *range(32)] for n in range(9)]
    requests = [Request(text, n, sample) for n, text in enumerate(texts) for sample in range(8)]
    params = SamplingParams(max_new_tokens=5)
    for most, more in ((None, None), (16, None), (5, None), (16, 30)):
        for played in play(stages, requests, params, most=most, memory=(4, more)):
            assert not played.put_back
            assert played.prefilled == 9 * 32
    # One page more, its tail, for each of 16 rows; 10 pages would be a row's without sharing.
    for played in play(stages, requests, params, most=16, memory=(4, 32)):
        assert played.rounds <= 5 * 5 + 8
    alone = [Request([*text, 5], n) for n, text in enumerate(texts)]
    for played in play(stages, alone, params, most=3):
        assert played.prefilled == 9 * 33


def test_sequences_are_put_back_where_pages_run_short_and_cached_again() -> None:
    """Two of forty tokens in eleven pages of four: both begin, the younger one waits for the older's end."""
    requests = [Request([n], n) for n in range(2)]
    (played,) = play(1, requests, SamplingParams(max_new_tokens=40), memory=(4, 1))
    assert played.put_back == 1
    assert played.prefilled == 20
    assert [len(r.tokens) for r in played.responses] == [40, 40]
    (roomy,) = play(1, requests, SamplingParams(max_new_tokens=40), memory=(4, 10))
    assert (roomy.put_back, roomy.prefilled, roomy.rounds) == (0, 0, 40)


def test_few_rows_at_a_time_and_full_ones_are_refilled_at_once() -> None:
    """A single stage reads at once: no round passes without all rows in use."""
    requests = [Request([n], n) for n in range(12)]
    (played,) = play(1, requests, SamplingParams(max_new_tokens=7), most=3)
    assert played.rounds == 7 * 4
    several = play(2, requests, SamplingParams(max_new_tokens=7), most=4)
    assert {p.rounds for p in several} == {7 * 3 + 1}  # the last one is of nobody


def test_a_cache_too_small_for_one_is_refused() -> None:
    with pytest.raises(ValueError, match="2 pages of 4 tokens hold no whole sequence"):
        Scheduler([[1] * 5], 5, (1,), 2, 4, [[]], [False])
    assert Scheduler([[1] * 5], 4, (1,), 2, 4, [[]], [False]).busy


def test_most_drawn_tokens_are_kept_under_exponential_lengths() -> None:
    """Ends as a memoryless stop gives them: each token stops with probability 1/32."""
    generator = torch.Generator().manual_seed(0)
    requests = [Request(torch.randint(0, 97, (6,), generator=generator).tolist(), i) for i in range(48)]
    params = SamplingParams(max_new_tokens=128, stop_ids=(11, 50, 80))
    for most in (None, 12):
        played, *_ = play(4, requests, params, late=1, most=most)
        lengths = [len(response.tokens) for response in played.responses]
        assert min(lengths) < 8
        assert max(lengths) > 64
        assert sum(lengths) / played.rows >= 0.9
        padded = len(lengths) * max(lengths)
        assert sum(lengths) / padded < 0.5
