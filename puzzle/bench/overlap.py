"""`puzzle bench overlap`: what filling generation from ZeRO shards, and beside the first prefill, saves."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch

from puzzle.bench import device
from puzzle.bench.arguments import DTYPES, ModelBench, cut, parser
from puzzle.bench.switch import SECONDS, Pair, one_size, pair_of, tidy
from puzzle.engine.generate.decode_ring import Request, generate
from puzzle.engine.generate.sampling import SamplingParams
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.reshard.resharder import Resharder
from puzzle.engine.runtime.world import World
from puzzle.engine.train.zero_adamw import AdamWSettings, ZeroAdamW
from puzzle.errors import UserError
from puzzle.launch import local
from puzzle.model.weights import initialise
from puzzle.plan.cluster import GB, Cluster
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.reshard.plan import Transport, plan_switch


@dataclass(frozen=True, kw_only=True)
class OverlapBench(ModelBench):
    """What is measured; `pairs` are (tp, pp, dp) of training and of generation; a prefill pass has `rows`
    prompts of `length` tokens."""

    pairs: Sequence[Pair]
    rows: int
    length: int
    repeats: int


def run(arguments: Sequence[str]) -> int:
    """Parse the command line and start as many processes as the layouts have."""
    options, sizes = "model layers rows length repeats", {"rows": 32, "length": 256}
    made = parser("overlap", "Time the way to generation, in turn and beside.", options, **sizes)
    made.add_argument("--pairs", nargs="+", type=pair_of, required=True, metavar="TP,PP,DP:TP,PP,DP")
    bench = OverlapBench(**vars(made.parse_args(arguments)))
    cut(bench.model, bench.layers, [layout for pair in bench.pairs for layout in pair])
    local.run("puzzle.bench.overlap:work", (bench,), one_size(bench.pairs))
    return 0


def work(bench: OverlapBench) -> None:
    """What every process does; rank 0 prints a line per way as soon as it is measured."""
    with World.start(bench.device, timeout=SECONDS) as world:
        if world.rank == 0:
            print(f"{bench.model} {bench.dtype}, {world.size} ranks on {device.facts(world)['device']}; ms")
            print(
                f"{'switch':>15} {'filled from':>11} {'by':>8}     GB   gather     fill     pass"
                "  in turn   beside  saved by fill  saved beside"
            )
        for pair in bench.pairs:
            subject = _Subject(bench, pair, world)
            for transport in get_args(Transport):
                subject.rows(transport)
            del subject
            tidy(world)


class _Subject:
    """A model under the first layout of a pair, after an optimizer step, that generates under the second."""

    def __init__(self, bench: OverlapBench, pair: Pair, world: World) -> None:
        self.bench, self.pair, self.world, self.spec = bench, pair, world, bench.spec
        self.sides = [Placement.default(Layout.even(*side, self.spec.num_layers)) for side in pair]
        self.runtime = ModelRuntime("source", self.spec, self.sides[0], world, DTYPES[bench.dtype])
        initialise(self.runtime.decoder, 0)
        self.runtime.attach_optimizer(AdamWSettings(lambda _: 0.0))
        tokens = torch.arange(bench.rows * bench.length).remainder(self.spec.vocab_size)
        prompts = tokens.view(bench.rows, bench.length).tolist()
        self.requests = [Request(prompt, number) for number, prompt in enumerate(prompts)]

    @property
    def optimizer(self) -> ZeroAdamW:
        """The source's."""
        assert self.runtime.optimizer is not None
        return self.runtime.optimizer

    def rows(self, transport: Transport) -> None:
        """Measure, print and keep one row per way to fill; what gathered weights take is compared with."""
        before: dict[str, Any] = {}
        for zero in (False, True) if self.sides[0].layout.dp > 1 else (False,):
            row: dict[str, Any] = {"from": self.pair[0], "to": self.pair[1], "transport": transport}
            row["filled_from"] = "shards" if zero else "gathered"
            try:
                row |= self._measured(transport, zero)
                before = before or row
                way = [sum(r[f"{part}_seconds"] for part in ("gather", "in_turn")) for r in (before, row)]
                row["saved_by_fill_seconds"] = way[0] - way[1]
                row["saved_beside_seconds"] = row["in_turn_seconds"] - row["beside_seconds"]
            except UserError as error:
                row["error"] = str(error)
            tidy(self.world)
            if self.world.rank == 0:
                self._report(row)

    def _measured(self, transport: Transport, zero: bool) -> dict[str, Any]:
        """Seconds until generation's weights are there, of a prefill pass, of both in turn and beside."""
        gathers = self.optimizer.group is not None and not zero
        row: dict[str, Any] = {"gather_seconds": self._median(self.gather) if gathers else 0.0}
        for beside in (False, True):
            plan = plan_switch(
                self.spec,
                *self.sides,
                Cluster(self.world.per_node),
                itemsize=DTYPES[self.bench.dtype].itemsize,
                zero=zero,
            )
            made = ModelRuntime(
                "made", self.spec, plan.destination, self.world, DTYPES[self.bench.dtype], allocate=False
            )
            switcher = Resharder(
                plan, self.world, self.runtime.decoder, made.decoder, transport=transport, beside=beside
            )
            if zero:
                self.forget()
            self._turn(switcher, made, zero)
            switcher.verify()
            if not beside:
                row["bytes"] = plan.bytes_received
                row["pass_seconds"] = self._median(lambda made=made: self.prefill(made))
                switcher.drop()
                row["fill_seconds"] = self._median(switcher.fill, switcher.drop)
            else:
                switcher.drop()
            name = "beside_seconds" if beside else "in_turn_seconds"
            row[name] = self._median(
                lambda switcher=switcher, made=made: self._turn(switcher, made, zero), switcher.drop
            )
            if beside and switcher.side is not None:
                fills, waits = switcher.take_times()
                row |= {"beside_fill_seconds": fills, "beside_awaited_seconds": waits / self._turns}
        return row

    def _turn(self, switcher: Resharder, made: ModelRuntime, zero: bool) -> None:
        """From the end of training to that of a prefill pass; out of shards, the gather goes on beside it,
        and what it brought is put in place behind it."""
        switcher.fill()
        self.optimizer.gather_pending = zero
        self.optimizer.start_gather()
        self.prefill(made)
        self.optimizer.wait_gather()

    @property
    def _turns(self) -> int:
        return self.bench.repeats + 2

    def _median(self, work: Callable[[], object], after: Callable[[], object] = lambda: None) -> float:
        """Of all repeats but the first; `after` each comes what is not timed."""
        found = []
        for _ in range(self.bench.repeats + 1):
            found += device.measure(self.world, work, 1)
            after()
        return statistics.median(found[1:])

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

    def _report(self, row: dict[str, Any]) -> None:
        layouts = "->".join(",".join(map(str, row[side])) for side in ("from", "to"))
        line = f"{layouts:>15} {row['filled_from']:>11} {row['transport']:>8}"
        if "error" in row:
            print(f"{line} {row['error']}", flush=True)
        else:
            names = ("gather", "fill", "pass", "in_turn", "beside")
            times = " ".join(f"{1e3 * row[f'{name}_seconds']:8.2f}" for name in names)
            saved = [1e3 * row[f"saved_{what}_seconds"] for what in ("by_fill", "beside")]
            print(f"{line} {row['bytes'] / GB:6.2f} {times} {saved[0]:14.2f} {saved[1]:13.2f}", flush=True)
        self.bench.leave("overlap", row | {"where": device.facts(self.world)})
