"""Decode passes by rows and cached tokens: a layer, what comes once a pass, and the host's part.

Models are as deep as they are, if memory allows: a layer is what they take more than half of them, and a pass
of all layers is what was timed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import replace
from statistics import median

import torch

from puzzle.bench import device, harness
from puzzle.bench.harness import Row
from puzzle.bench.pieces import LEAST, SHALLOW, STEPS, Found, PiecesBench, as_row
from puzzle.engine.generate.decode_ring import Request, generate
from puzzle.engine.generate.model_runner import ModelRunner, Room
from puzzle.engine.generate.sampling import Fetched, Sampled, SamplingParams
from puzzle.engine.generate.scheduler import Join
from puzzle.engine.runtime.world import World
from puzzle.plan.pages import whole_pages
from puzzle.plan.predict.tables import DecodeRow, Shape
from puzzle.spec.model import ModelSpec

SLOW = 6
"""Layers at most on a CPU, whose passes take long."""
SHARE = 0.75
"""Of the free memory that weights and cache may take."""
MANY = 32
"""Rows of a decode pass up to which launching may take longest."""
REPEATS = 3
"""Of a number of passes."""
LATER = 128
"""Tokens by which responses differ whose times are compared."""


def decodes(bench: PiecesBench, world: World, found: Found, spec: ModelSpec, tp: int) -> Iterator[Row]:
    """Rows of the table of decode passes, and what recording one takes.

    Only passes of few rows wait for the host to launch them: what others take launched follows.
    """
    deep = _depth(bench, world, spec, tp)
    shallow = deep // 2
    cuda = world.device.type == "cuda"
    sizes = [(p, r) for p in sorted(bench.prompts) for r in sorted(bench.rows)]
    whole, captures = _passes(bench, world, replace(spec, num_layers=deep), tp)
    half, _ = _passes(bench, world, replace(spec, num_layers=shallow), tp)
    hosts = _hosts(bench, world, spec, tp) if cuda else dict.fromkeys(bench.rows, LEAST)

    def split(size: tuple[int, int], graphs: bool) -> tuple[float, float]:
        layer = max(LEAST, (whole[(*size, graphs)] - half[(*size, graphs)]) / (deep - shallow))
        return layer, max(LEAST, whole[(*size, graphs)] - deep * layer)

    launched = (LEAST, LEAST)
    for prompt, rows in sizes:
        passes = split((prompt, rows), cuda)
        if cuda and (prompt, rows, False) in whole:
            layer, rest = split((prompt, rows), False)
            launched = (layer, rest + hosts[rows])
        eager = [max(pair) for pair in zip(launched, passes, strict=True)] if cuda else passes
        cached = prompt + 1 + STEPS / 2
        row = DecodeRow(Shape.of(spec), spec.vocab_size, tp, rows, cached, *passes, *eager, hosts[rows])
        found.decodes.append(row)
        yield as_row("decode", row)
    if captures:
        found.capture = max(found.capture, median(captures) * spec.num_layers / deep)


def _depth(bench: PiecesBench, world: World, spec: ModelSpec, tp: int) -> int:
    """Layers of the deeper model: all of them, or as many as memory holds."""
    count = max(SHALLOW, spec.num_layers)
    if world.device.type != "cuda":
        return min(count, SLOW)
    free = world.free_memory()
    while free is not None and count > SHALLOW and sum(bench.decoding(spec, tp, count)) > SHARE * free.bytes:
        count -= 1
    return int(-device.most(world, -count))


Seconds = dict[tuple[int, int, bool], float]
"""Of a decode pass, by cached tokens, rows, and whether it is replayed."""


def _passes(bench: PiecesBench, world: World, spec: ModelSpec, tp: int) -> tuple[Seconds, list[float]]:
    """Of all sizes; and seconds of recordings whose kernels are there."""
    model = Answers(bench, world, spec, tp)
    found: Seconds = {}
    captures: list[float] = []
    if world.device.type != "cuda":
        for prompt in bench.prompts:
            found |= {(prompt, rows, False): model.step(rows, prompt, STEPS) for rows in bench.rows}
        return found, captures
    for prompt in bench.prompts:
        for graphs in (True, False):
            few = [rows for rows in bench.rows if rows <= MANY and prompt == min(bench.prompts)]
            with model.runner(prompt, graphs) as runner:
                for rows in bench.rows if graphs else few:
                    found[(prompt, rows, graphs)] = model.passes(runner, rows, prompt)
                if graphs:
                    captures += [model.recording(runner, rows, prompt) for rows in bench.rows[:REPEATS]]
    del model
    gc.collect()
    device.reset_peak(world.device)
    return found, captures


def _hosts(bench: PiecesBench, world: World, spec: ModelSpec, tp: int) -> dict[int, float]:
    """By rows, what the host takes for a replayed pass: of one layer, which takes the device no longer."""
    model, prompt = Answers(bench, world, replace(spec, num_layers=1), tp), min(bench.prompts)
    return {rows: model.step(rows, prompt, LATER) for rows in bench.rows}


class Answers:
    """A model that answers random prompts, or only draws tokens behind a cache as it happens to be."""

    def __init__(self, bench: PiecesBench, world: World, spec: ModelSpec, tp: int) -> None:
        self.world, self.most = world, max(bench.rows)
        longest = max(bench.prompts) + max(STEPS, LATER) + 2
        self.spec = replace(spec, max_positions=max(spec.max_positions, longest))
        sizes = (tp, 1, world.size // tp)
        self.runtime = harness.random_model("model", self.spec, sizes, world, bench.dtype)
        self.runtime.freeze()

    def runner(self, prompt: int, graphs: bool) -> ModelRunner:
        """With a cache for the most rows."""
        runner = ModelRunner(self.runtime.decoder, graphs)
        columns = whole_pages(prompt, STEPS + 2, runner.page_for(prompt + STEPS + 2))
        runner.room = Room(self.most, columns, self.most * columns)
        return runner

    def passes(self, runner: ModelRunner, rows: int, prompt: int) -> float:
        """Median seconds of one of `STEPS` passes of which none is read before the last has been issued."""
        found = []
        for _ in range(1 + REPEATS):
            self._begin(runner, rows, prompt)
            device.meet(self.world)
            start = time.perf_counter()
            unread = [self._draw(runner, rows) for _ in range(STEPS)]
            self.world.synchronize()
            found.append(device.most(self.world, time.perf_counter() - start))
            unread[-1].lists()
        return max(LEAST, median(found[1:]) / STEPS)

    def recording(self, runner: ModelRunner, rows: int, prompt: int) -> float:
        """Seconds of recording a pass anew, as where the cache was not kept."""
        runner.release()
        self._begin(runner, rows, prompt)
        before = runner.capture_seconds
        self._draw(runner, rows)
        return runner.capture_seconds - before

    def _begin(self, runner: ModelRunner, rows: int, prompt: int) -> None:
        """Let `rows` rows go on behind as many tokens."""
        page, columns, pages = runner.page_for(prompt + STEPS + 2), runner.room.columns, runner.room.pages
        runner.start((rows,), pages, page, columns, SamplingParams())
        joins = [
            Join(row, row, 1, prompt, 0, range(1 + row * columns, 1 + (row + 1) * columns))
            for row in range(rows)
        ]
        runner.join(joins, range(rows))

    def _draw(self, runner: ModelRunner, rows: int) -> Fetched:
        drawn = runner.decode(0, rows)
        assert isinstance(drawn, Sampled)
        return drawn.fetch()

    def step(self, rows: int, prompt: int, later: int) -> float:
        """Seconds of a token of all responses, as generation makes them: those of `later` tokens more."""
        generator = torch.Generator().manual_seed(rows)
        prompts = torch.randint(0, self.spec.vocab_size, (rows, prompt), generator=generator).tolist()
        requests = [Request(one, row) for row, one in enumerate(prompts)]
        decoder, executor = self.runtime.decoder, self.runtime.executor
        found: dict[int, list[float]] = {2: [], 2 + later: []}
        with ModelRunner(decoder) as passes:
            for new in (2 + later, *list(found) * REPEATS):  # the first makes the cache, records, warms up
                device.meet(self.world)
                start = time.perf_counter()
                params = SamplingParams(max_new_tokens=new)
                generate(decoder, requests, params, executor, passes=passes)
                self.world.synchronize()
                found[new].append(device.most(self.world, time.perf_counter() - start))
        few, many = found.values()
        return max(LEAST, (median(many[1:]) - median(few)) / later)
