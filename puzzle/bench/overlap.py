"""`puzzle bench overlap`: what filling generation from ZeRO shards, and beside the first prefill, saves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import ClassVar, get_args

import torch

from puzzle.bench import device, harness
from puzzle.bench.harness import Row
from puzzle.bench.switch import LayoutChange, Pair, PairsBench, ends_of, tidy
from puzzle.engine.generate.decode_ring import generate
from puzzle.engine.generate.requests import Request
from puzzle.engine.generate.sampling import SamplingParams
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.reshard.resharder import Resharder
from puzzle.engine.runtime.world import World
from puzzle.engine.train.zero_adamw import AdamWSettings
from puzzle.plan.cluster import GB
from puzzle.plan.memory import RankMemory, Switched, Work, rank_memory
from puzzle.plan.reshard.plan import Transport


@dataclass(frozen=True, kw_only=True)
class OverlapBench(PairsBench):
    """Time the way to generation, in turn and beside."""

    rows: harness.Rows = 32
    length: harness.Length = 256
    smaller: ClassVar[Mapping[str, str]] = {
        "cache": "lower --rows or --length",
        "layer": "lower --rows or --length",
        **harness.Bench.smaller,
    }

    def memory(self, world: World) -> RankMemory:
        return max((self._of(pair, world) for pair in self.pairs), key=lambda found: found.peak)

    def _of(self, pair: Pair, world: World) -> RankMemory:
        part = self.plan(pair, world).for_rank(world.rank)
        source, made = self.use("source", pair[0], world), self.use("made", pair[1], world)
        weights = made.itemsize * sum(param.size for param in part.allocate)
        work = Work(self.rows * pair[1][2], self.rows, self.length, 1)
        switched = Switched(weights, part.peak_extra)
        found = rank_memory(world.rank, [replace(source, trained=True)], made, work, switched, False)
        return RankMemory(world.rank, found.resident, {s: found.stages[s] for s in ("switch", "generation")})

    def measure(self, world: World) -> Iterator[Row | str]:
        yield (
            f"{self.model} {self.dtype}, {world.size} ranks on {device.facts(world)['device']}; ms\n"
            f"{'switch':>15} {'filled from':>11} {'by':>8}     GB   gather     fill     pass"
            "  in turn   beside  saved by fill  saved beside"
        )
        for pair in self.pairs:
            yield from _Overlapped(self, pair, world).ways()
            tidy(world)

    def line(self, row: Row) -> str:
        line = f"{ends_of(row)} {row['filled_from']:>11} {row['transport']:>8}"
        if "error" in row:
            return f"{line} {row['error']}"
        names = ("gather", "fill", "pass", "in_turn", "beside")
        times = " ".join(f"{1e3 * row[f'{name}_seconds']:8.2f}" for name in names)
        saved = [1e3 * row[f"saved_{what}_seconds"] for what in ("by_fill", "beside")]
        return f"{line} {row['bytes'] / GB:6.2f} {times} {saved[0]:14.2f} {saved[1]:13.2f}"


class _Overlapped(LayoutChange):
    """Weights after an optimizer step, and generation's first pass with them."""

    bench: OverlapBench

    def ways(self) -> Iterator[Row]:
        """One row per way to fill; what gathered weights take is compared with."""
        self.source.attach_optimizer(AdamWSettings(lambda _: 0.0))
        assert self.source.optimizer is not None
        self.optimizer = self.source.optimizer
        shape = (self.bench.rows, self.bench.length)
        tokens = torch.arange(math.prod(shape)).remainder(self.spec.vocab_size).view(shape)
        self.requests = [Request(prompt, number) for number, prompt in enumerate(tokens.tolist())]
        for transport in get_args(Transport):
            before: Row = {}
            for zero in (False, True) if self.pair[0][2] > 1 else (False,):
                row = {"transport": transport, "filled_from": "shards" if zero else "gathered"}
                row = self.tried(row, partial(self._measured, transport, zero))
                if "error" not in row:
                    before = before or row
                    way = [r["gather_seconds"] + r["in_turn_seconds"] for r in (before, row)]
                    row["saved_by_fill_seconds"] = way[0] - way[1]
                    row["saved_beside_seconds"] = row["in_turn_seconds"] - row["beside_seconds"]
                yield row

    def _measured(self, transport: Transport, zero: bool) -> Row:
        """Seconds until generation's weights are there, of a prefill pass, of both in turn and beside."""
        gathers = self.optimizer.group is not None and not zero
        row: Row = {"gather_seconds": self._median(self.gather) if gathers else 0.0}
        for beside in (False, True):
            plan = self.plan(zero=zero)
            switcher, made = self.made(plan, transport=transport, beside=beside)
            if zero:
                self.forget()
            turn = partial(self._turn, switcher, made, zero)
            turn()
            switcher.verify()
            if not beside:
                row |= {
                    "bytes": plan.bytes_received,
                    "pass_seconds": self._median(partial(self.prefill, made)),
                }
            switcher.drop()
            if not beside:
                row["fill_seconds"] = self._median(switcher.fill, switcher.drop)
            row["beside_seconds" if beside else "in_turn_seconds"] = self._median(turn, switcher.drop)
            if beside and switcher.side is not None:
                fills, waits = switcher.take_times()
                row["beside_fill_seconds"] = fills
                row["beside_awaited_seconds"] = waits / (self.bench.repeats + 2)
        return row

    def _turn(self, switcher: Resharder, made: ModelRuntime, zero: bool) -> None:
        """From the end of training to that of a prefill pass; out of shards, the gather goes on beside it,
        and what it brought is put in place behind it."""
        switcher.fill()
        self.optimizer.gather_pending = zero
        self.optimizer.start_gather()
        self.prefill(made)
        self.optimizer.wait_gather()

    def _median(self, work: Callable[[], object], after: Callable[[], object] = lambda: None) -> float:
        """Of all repeats but the first; `after` each comes what is not timed."""
        found = []
        for _ in range(self.bench.repeats + 1):
            found += device.measure(self.world, work, 1)
            after()
        return median(found[1:])

    def gather(self) -> None:
        """The all-gather after an optimizer step."""
        self.optimizer.gather_pending = True
        self.optimizer.wait_gather()

    @torch.no_grad()
    def forget(self) -> None:
        """Spoil the rows that other replicas step."""
        for slot in self.optimizer.slots:
            slot.param[: slot.low] = 0
            slot.param[slot.high :] = 0

    def prefill(self, made: ModelRuntime) -> None:
        """A pass over the prompts, and a token of each."""
        once = SamplingParams(max_new_tokens=1)
        generate(made.decoder, self.requests, once, made.executor, graphs=False)
