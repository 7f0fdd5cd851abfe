"""`puzzle bench sums`: sums over tensor ranks out of peers' memory beside collectives, bits and seconds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Annotated, TypeVar

import torch
from torch import Tensor

from puzzle.bench import device, harness
from puzzle.bench.harness import Row, option
from puzzle.cli import whole
from puzzle.engine.generate.peers import peer_sums
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.reshard.transports import Unreachable
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.files.limits import MOST_PROCESSES
from puzzle.model.peer_sums import PeerSums
from puzzle.model.pointwise import kernels
from puzzle.plan.layout import Layout, Placement

T = TypeVar("T")
EPS = 1e-5
IN_A_GRAPH = 7
"""Calls of the graph that is compared, an odd number: its replays begin with either buffer by turns."""
REPLAYS = 5
LATE = 2_000_000
"""Cycles that a rank comes late."""
TIMED = 64
"""Calls of a graph that is timed."""


@dataclass(frozen=True, kw_only=True)
class SumsBench(harness.ModelBench):
    """Compare and time sums over tensor ranks in decode passes, with residual and norm."""

    world: Annotated[int, option(type=whole(2, MOST_PROCESSES), help="tensor ranks, one per device")] = 2
    share_device: Annotated[bool, option(help=harness.SHARED + "; nothing is timed")] = False
    rows: Annotated[Sequence[int], harness.count(nargs="+", help="of a pass")] = (1, 8, 32, 64, 128, 256)
    calls: Annotated[int, option(type=whole(1), metavar="N", help="one behind another, compared")] = 24
    repeats: harness.Repeats = 9

    def layouts(self) -> Sequence[harness.Sizes]:
        return ((self.world, 1, 1),)

    def join(self) -> World:
        return World.start(self.device, timeout=self.timeout, share_device=self.share_device)

    def measure(self, world: World) -> Iterator[Row | str]:
        """UserError where there are no such sums, and in the end if a comparison failed."""
        layout = Layout.even(self.world, 1, 1, 1)
        spec, dtype = replace(self.spec, num_layers=1), harness.DTYPES[self.dtype]
        runtime = ModelRuntime("model", spec, Placement.default(layout), world, dtype, allocate=False)
        try:
            subject = Subject(runtime, peer_sums(runtime))
        except Unreachable as error:
            raise UserError(f"bench sums: {error}") from None
        fitting = [rows for rows in self.rows if rows <= subject.sums.rows]
        yield f"{self.world} ranks, {spec.hidden_size} wide, {self.dtype}: up to {subject.sums.rows} rows"
        failed = 0
        for row in itertools.chain(subject.in_turn(fitting, self.calls), subject.recorded(fitting)):
            failed += not row["ok"]
            yield row
        if failed:
            raise UserError(f"bench sums: {failed} comparisons failed")
        for rows in () if self.share_device else fitting:
            yield subject.timed(rows, self.repeats)

    def line(self, row: Row) -> str:
        if "ok" in row:
            bound = "added in another order" if row["limit"] is None else f"at most {row['limit']}"
            kept = f"{row['value']:.0f} of {row['of']} elements differ ({bound})"
            return f"{'ok  ' if row['ok'] else 'FAIL'} {row['what']:<62}{kept}"
        least, ways = min(row["seconds"].values()), row["seconds"].items()
        told = "  ".join(f"{way} {1e6 * seconds:7.2f} us ({seconds / least:.2f} x)" for way, seconds in ways)
        return f"{row['rows']:>4} rows, a sum with residual and norm:  {told}"


class Subject:
    """Tensor ranks that sum. What each has is drawn by (call, rank): all know what all must find."""

    def __init__(self, runtime: ModelRuntime, sums: PeerSums) -> None:
        self.world, self.group, self.sums = runtime.world, runtime.tensor, sums
        self.device, self.dtype, self.width = runtime.world.device, runtime.stage.dtype, sums.width
        self.weight = self._drawn(0, -1, 1)[0]

    def _drawn(self, call: int, rank: int, rows: int) -> Tensor:
        """(rows, D); a CPU draws the same for all ranks."""
        generator = torch.Generator().manual_seed(1000 * call + rank + 1)
        return torch.randn((rows, self.width), generator=generator).to(self.device, self.dtype)

    def _given(self, call: int, rows: int) -> tuple[Tensor, Tensor]:
        """The residual stream, which all ranks have, and the own part."""
        return self._drawn(call, self.group.size, rows), self._drawn(call, self.group.rank, rows)

    def in_turn(self, sizes: Sequence[int], calls: int) -> Iterator[Row]:
        """Calls of all sizes, one behind another without a word to the host; some ranks come late."""
        asked = [sizes[call % len(sizes)] for call in range(calls)]
        given = [self._given(call, rows) for call, rows in enumerate(asked)]
        device.meet(self.world)
        found = []
        for call, (x, part) in enumerate(given):
            if (call + self.group.rank) % 4 == 0:
                torch.cuda._sleep(LATE)
            found.append(self.sums.add_norm(x, part, self.weight, EPS))
        sums = [self.sums.add(x, part) for x, part in given]
        device.meet(self.world)
        yield from self._compared(f"{calls} calls", given, found)
        alone = sum(int((total != whole).sum()) for (total, _), whole in zip(found, sums, strict=True))
        yield self._row("the same calls without a norm", alone, given, 0)

    def recorded(self, sizes: Sequence[int]) -> Iterator[Row]:
        """The same in a CUDA graph, whose inputs change between its replays."""
        asked = [sizes[call % len(sizes)] for call in range(IN_A_GRAPH)]
        inputs = [self._given(0, rows) for rows in asked]
        graph, outputs = self._graph(lambda: [self.sums.add_norm(*one, self.weight, EPS) for one in inputs])
        given, found = [], []
        for replay in range(REPLAYS):
            fresh = [self._given(100 * (1 + replay) + call, rows) for call, rows in enumerate(asked)]
            for old, new in zip(inputs, fresh, strict=True):
                for to, x in zip(old, new, strict=True):
                    to.copy_(x)
            if replay % self.group.size == self.group.rank:
                torch.cuda._sleep(LATE)
            graph.replay()
            given += fresh
            found += [(total.clone(), normed.clone()) for total, normed in outputs]
        device.meet(self.world)
        yield from self._compared(f"{REPLAYS} replays of a graph of {len(asked)} calls", given, found)

    def _compared(
        self, what: str, given: Sequence[tuple[Tensor, Tensor]], found: Sequence[tuple[Tensor, Tensor]]
    ) -> Iterator[Row]:
        """Elements that differ from a plain sum in the order of ranks, and from a collective's."""
        names = ("sum in the order of ranks", "its norm", "collective's sum", "its norm")
        differ = [0] * len(names)
        for (x, part), (total, normed) in zip(given, found, strict=True):
            parts = self.group.all_gather(part).view(self.group.size, *part.shape).float()
            plain = parts[0]
            for one in parts[1:]:
                plain = plain + one
            plain = kernels().add_norm(x, plain.to(self.dtype), self.weight, EPS)
            other = kernels().add_norm(x, self.group.all_reduce(part.clone()), self.weight, EPS)
            for place, expected in enumerate((*plain, *other)):
                differ[place] += int(((total, normed)[place % 2] != expected).sum())
        # Two are added in one way alone.
        limits = (0, 0, *((0, 0) if self.group.size == 2 else (None, None)))
        for name, count, limit in zip(names, differ, limits, strict=True):
            yield self._row(f"{what}: {name}", count, given, limit)

    def _row(self, what: str, count: int, given: Sequence[tuple[Tensor, Tensor]], limit: int | None) -> Row:
        value, of = device.most(self.world, count), sum(x.numel() for x, _ in given)
        return {"what": what, "value": value, "of": of, "limit": limit, "ok": limit is None or value <= limit}

    def _graph(self, work: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """A recording, and what its replays leave."""
        work()
        self.world.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            found = work()
        return graph, found

    def timed(self, rows: int, repeats: int) -> Row:
        """Median seconds of a sum with all that belongs to it, of graphs of both ways in turns."""
        x, part = self._given(0, rows)
        plain = kernels().add_norm

        def collective() -> None:
            for _ in range(TIMED):
                plain(x, self.group.all_reduce(part), self.weight, EPS)

        def peer() -> None:
            for _ in range(TIMED):
                self.sums.add_norm(x, part, self.weight, EPS)

        part.zero_()  # a collective leaves the sum in its place, again and again
        graphs = {"collective": self._graph(collective)[0], "peer": self._graph(peer)[0]}
        runs = {
            way: lambda graph=graph: device.measure(self.world, graph.replay, 1)[0]
            for way, graph in graphs.items()
        }
        found = device.alternated(runs, 1 + repeats)
        return {"rows": rows, "seconds": {way: median(every[1:]) / TIMED for way, every in found.items()}}
