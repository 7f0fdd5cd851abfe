"""The ring as sessions run it, with toy passes: any stages, batch, micro-batches, lengths and ends.

Stages are threads; a transfer ends when both sides have begun it, and both must mean tensors of one size. A
toy stage remembers the tokens of every cache row: what the last stage draws depends on all of them.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, cast

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.engine.generate.decode_ring import DecodeRingStage, Request, RequestStates, ring_of
from puzzle.engine.generate.model_runner import Sampled
from puzzle.engine.generate.sampling import SamplingParams
from puzzle.plan.pipeline.actions import Action, Op

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
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        self.cached: dict[int, list[int]] = {}
        self.next: dict[int, int] = {}

    def start(self, groups: list[int], capacity: int, params: SamplingParams) -> None:
        self.groups, self.recorded = groups, None
        self.starts = [sum(groups[:j]) for j in range(len(groups))]
        self.capacity = capacity

    def record(self, leaving: bool) -> None:
        assert not self.cached
        self.recorded = leaving

    def _drawn(self, rows: list[int]) -> Sampled:
        tokens = [following(self.cached[row]) for row in rows]
        self.next.update(zip(rows, tokens, strict=True))
        bits = torch.tensor([logprob(token) for token in tokens]).view(torch.int32)
        return Sampled(torch.stack((torch.tensor(tokens, dtype=torch.int32), bits)))

    def prefill(self, rows: range, prompts: list[list[int]], row_seeds: list[int], x: Any) -> Any:
        told = [
            [row, token, place] for row, p in zip(rows, prompts, strict=True) for place, token in enumerate(p)
        ]
        if x is not None:
            assert x.tolist() == told
        for row, prompt in zip(rows, prompts, strict=True):
            assert row not in self.cached
            self.cached[row] = list(prompt)
        return self._drawn(list(rows)) if self.decoder.last else torch.tensor(told, dtype=torch.float32)

    def decode(self, group: int, active: int, x: Any) -> Any:
        rows = [self.starts[group] + i for i in range(active)]
        # Several stages have recorded what they need before the ring began; a single one has not.
        assert (self.recorded is None) == (self.decoder.first and self.decoder.last)
        assert self.recorded is not False or active == self.groups[group]
        if x is not None:
            for row, told in zip(rows, x.tolist(), strict=True):
                assert told[0] == row
                assert told[2] == len(self.cached[row])
                self.next[row] = int(told[1])
        told = [[row, self.next[row], len(self.cached[row])] for row in rows]
        for row in rows:
            self.cached[row].append(self.next.pop(row))
            assert len(self.cached[row]) <= self.capacity
        return self._drawn(rows) if self.decoder.last else torch.tensor(told, dtype=torch.float32)

    def put(self, tokens: torch.Tensor, rows: range) -> None:
        self.next.update(zip(rows, tokens.tolist(), strict=True))

    def move(self, source: int, target: int, length: int) -> None:
        assert len(self.cached[source]) == length
        self.cached[target] = self.cached.pop(source)
        if source in self.next:
            self.next[target] = self.next.pop(source)

    def park(self, rows: range) -> None:
        for row in rows:
            self.cached.pop(row, None)
            self.next.pop(row, None)


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


def play(stages: int, requests: list[Request], params: SamplingParams, sizes: Any, late: int) -> list[Any]:
    wires, found = Wires(), [None] * stages
    ring = ring_of(stages, [len(request.prompt) for request in requests], *sizes)

    def stage(number: int) -> None:
        states = RequestStates(requests, params)
        session = DecodeRingStage(cast(Any, ToyPasses(number, stages)), ring, states, late)
        execution = ToyExecution(number, wires)
        rounds = session.run(cast(Any, execution))
        assert tuple(execution.done) == ring.unrolled(rounds).actions[number]
        assert not execution.under_way
        found[number] = (states.responses(), session.rows)

    threads = [threading.Thread(target=stage, args=(s,), daemon=True) for s in range(stages)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    assert None not in found, "a stage did not end well"
    lengths_agree(wires)
    return found


sizes = st.none() | st.integers(1, 7)
prompts = st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=4), min_size=1, max_size=11)


@given(
    st.integers(1, 5),
    prompts,
    st.tuples(sizes, sizes),
    st.integers(1, 9),
    st.sets(st.integers(0, 96), max_size=60),
    st.integers(0, 1),
)
@settings(max_examples=150, deadline=None)
def test_every_token_once_whoever_ends_when(stages, texts, sizes, new, stops, late) -> None:
    params = SamplingParams(max_new_tokens=new, stop_ids=tuple(sorted(stops)))
    requests = [Request(text, i) for i, text in enumerate(texts)]
    truth = []
    for text in texts:
        tokens = list(text)
        while len(tokens) - len(text) < new:
            tokens.append(following(tokens))
            if tokens[-1] in stops:
                break
        truth.append(tokens[len(text) :])
    kept = sum(map(len, truth))
    for responses, rows in play(stages, requests, params, sizes, late):
        assert [response.tokens for response in responses] == truth
        assert [r.logprobs for r in responses] == [[logprob(token) for token in r.tokens] for r in responses]
        assert [response.finished for response in responses] == [part[-1] in stops for part in truth]
        # Without lookahead no row is decoded for nothing; with it, once at most.
        assert kept <= rows <= kept + late * len(texts)


def test_most_drawn_tokens_are_kept_under_exponential_lengths() -> None:
    """Ends as a memoryless stop gives them: each token stops with probability 1/32."""
    generator = torch.Generator().manual_seed(0)
    requests = [Request(torch.randint(0, 97, (6,), generator=generator).tolist(), i) for i in range(48)]
    params = SamplingParams(max_new_tokens=128, stop_ids=(11, 50, 80))
    (responses, rows), *_ = play(4, requests, params, (None, None), 1)
    lengths = [len(response.tokens) for response in responses]
    assert min(lengths) < 8
    assert max(lengths) > 64
    assert sum(lengths) / rows >= 0.9
    padded = len(lengths) * max(lengths)
    assert sum(lengths) / padded < 0.5
