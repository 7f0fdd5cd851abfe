"""`puzzle bench calibrate`: the tables that `puzzle plan` predicts from, measured on this host."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from puzzle import __version__
from puzzle.bench import beside, decoding, device, harness, pieces
from puzzle.bench.harness import Row
from puzzle.engine.reshard.resharder import lends_pages
from puzzle.engine.runtime.world import World
from puzzle.files import durable
from puzzle.plan.predict.calibration import Calibration
from puzzle.plan.predict.tables import Tables
from puzzle.rlhf.provenance import git_commit


@dataclass(frozen=True, kw_only=True)
class CalibrateBench(pieces.PiecesBench):
    """Measure the tables that `puzzle plan predict` and `search` read, in three minutes at most."""

    def check(self) -> None:
        for name in self.models:
            harness.cut(name, 0)

    def layouts(self) -> Sequence[harness.Sizes]:
        return ((1, 1, self.world),)

    def measure(self, world: World) -> Iterator[Row | str]:
        """Every table in turn, the dearest to do without first."""
        yield f"calibrating {device.facts(world)['device']}, {world.size} devices, {self.dtype}"
        began, found = time.perf_counter(), pieces.Found()
        specs = list(dict.fromkeys(harness.cut(name, 0) for name in self.models))
        tps = [tp for tp in (1, 2, 4, 8) if world.size % tp == 0]
        pairs = [(spec, tp) for spec in specs for tp in tps if pieces.fits(spec, tp)]
        late = False
        parts: list[tuple[str, Callable[[], Iterator[Row]]]] = []
        if world.size > 1:
            parts.append(("links", lambda: beside.links(self, world, found)))
        for spec, tp in pairs:
            parts.append(("layers", lambda s=spec, t=tp: pieces.layers(self, world, found, s, t)))
            parts.append(("decode", lambda s=spec, t=tp: decoding.decodes(self, world, found, s, t)))
        parts.append(("the rest", lambda: beside.beside(self, world, found, specs)))
        for number, (name, part) in enumerate(parts):
            late = bool(world.share(time.perf_counter() - began > self.seconds))
            if late and number < len(parts) - 1 and found.layers and found.decodes:
                yield f"left out, {self.seconds:g} s are over: {name}"
                continue
            yield from part()
            gc.collect()
            device.reset_peak(world.device)
        yield f"took {time.perf_counter() - began:.0f} s"
        if world.rank == 0:
            durable.write_text(self.out, self._calibration(world, found).text())
            yield f"written: {self.out}"

    def _calibration(self, world: World, found: pieces.Found) -> Calibration:
        facts = device.facts(world)
        tables = Tables(
            item=harness.DTYPES[self.dtype].itemsize,
            layers=tuple(found.layers),
            heads=tuple(found.heads),
            decodes=tuple(found.decodes),
            collectives=tuple(found.collectives),
            messages=tuple(found.messages),
            steps=tuple(found.steps),
            step_s_per_parameter=found.step,
            pass_host=found.pass_host,
            fixed=replace(found.fixed, capture_s_per_bucket=found.capture),
        )
        versions = {key: str(facts[key]) for key in ("torch", "cuda", "nccl") if key in facts}
        return Calibration(
            str(facts["device"]),
            int(facts.get("memory_bytes", _host_memory())),
            self.engine or git_commit() or __version__,
            f"one host, {world.size} devices, {self.dtype}{', compiled' * self.compile}{_segments(world)}",
            datetime.now(UTC).date().isoformat(),
            (),
            tables.tensor_parallel,
            tables,
            versions,
        )

    def report(self, found: Row | str, where: Row) -> None:
        print(found if isinstance(found, str) else self.line(found), flush=True)

    def line(self, row: Row) -> str:
        words = []
        for name, value in row.items():
            seconds = (isinstance(value, float) and name.endswith("_s")) or name == "s"
            words.append(f"{name} {value * 1e6:.1f} us" if seconds else f"{name} {value}")
        return "  ".join(words)


def _segments(world: World) -> str:
    """How torch maps memory of devices, on which `map_s_per_byte` depends, and little else."""
    return f", {'expandable' if lends_pages() else 'fixed'} segments" if world.device.type == "cuda" else ""


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
