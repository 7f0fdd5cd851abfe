"""`puzzle bench generate`: prefill and decoding of random prompts.

Beside the least time that memory allows; with responses of various lengths, early stop beside decoding to
the end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Annotated, Any, ClassVar

import torch

from puzzle.bench import device, harness
from puzzle.bench.harness import Row, option
from puzzle.bench.requests import Given, Requests, span
from puzzle.engine.generate.decode_ring import Tally, generate
from puzzle.engine.generate.memory import cache_bytes
from puzzle.engine.generate.model_runner import ModelRunner
from puzzle.engine.generate.peers import peer_sums
from puzzle.engine.generate.requests import Request, StopRule
from puzzle.engine.generate.sampling import SamplingParams
from puzzle.engine.reshard.transports import Unreachable
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.model.peer_sums import PeerSums
from puzzle.plan.memory import RankMemory, Switched, Use, Work, generation_passes, rank_memory
from puzzle.plan.pages import PREFILL_TOKENS

ARMS = {"early stop": True, "to the end": False}


@dataclass(frozen=True, kw_only=True)
class GenerateBench(harness.LayoutBench):
    """Time prefill and decoding of random prompts, drawn at temperature 1."""

    sequences: Annotated[Sequence[int], harness.count(nargs="+", help="of all replicas")] = (32, 64, 128, 256)
    at_a_time: Annotated[int | None, harness.count(help="of a replica; default: as many as fit")] = None
    samples: Annotated[int, harness.count(help="sequences of each prompt")] = 1
    prompt: Annotated[tuple[int, int], option(type=span, metavar="N or N-M", help="tokens of a prompt")] = (
        256,
        256,
    )
    prefill_tokens: Annotated[int, harness.tokens(help="most tokens of a prefill pass")] = PREFILL_TOKENS
    new: Annotated[int, harness.tokens(help="most new tokens of a sequence")] = 256
    mean: Annotated[int | None, harness.tokens(help="of exponential lengths; default: a quarter of new")] = (
        None
    )
    modes: Annotated[
        Sequence[str],
        harness.several("eager", "graphs", "kept", text="kept: runs go on with the graphs of the first"),
    ] = ("eager", "graphs")
    lengths: Annotated[
        Sequence[str], option(nargs="+", help="fixed, exponential or FILE: a number of new tokens in a line")
    ] = ("fixed",)
    arms: Annotated[Sequence[str], harness.several("early", "late", text="not of fixed lengths")] = (
        "early",
        "late",
    )
    tp_sums: Annotated[
        Sequence[str],
        harness.several(
            "collective", "peer", text="of decode passes over tensor ranks; of fixed lengths in turns"
        ),
    ] = ("collective",)
    repeats: harness.Repeats = 5
    smaller: ClassVar[Mapping[str, str]] = {
        "cache": "lower --sequences, --at-a-time or --new",
        "layer": "lower --prefill-tokens",
        "copied bytes": "copies of 1 GiB tell the device's bandwidth; free some of its memory",
        **harness.Bench.smaller,
    }

    def memory(self, world: World) -> RankMemory:
        """Only a GPU puts up with fewer pages than all sequences need."""
        one, count = self.use("model", self.layout, world), max(self.sequences)
        work = Work(
            count,
            count,
            self.prompt[1],
            self.new,
            samples=self.samples,
            most=self.at_a_time,
            prefill_tokens=self.prefill_tokens,
        )
        pages = 0 if one.fused else None
        found = rank_memory(world.rank, [one], one, work, Switched(), False, pages)
        stages = {"bandwidth": {"copied bytes": 2 * device.COPIED}, "generation": found.stages["generation"]}
        return RankMemory(world.rank, found.resident, stages)

    def check(self) -> None:
        super().check()
        if "peer" in self.tp_sums and self.layout[0] == 1:
            raise UserError("--tp-sums peer: one tensor rank has nothing to sum; give a --layout of more")
        for lengths in self.lengths:
            self.requests.given(1, lengths)

    def measure(self, world: World) -> Iterator[Row]:
        subject = Subject(self, world)
        for count, mode, lengths in itertools.product(self.sequences, self.modes, self.lengths):
            measured = subject.fixed if lengths == "fixed" else subject.varied
            for found in measured(mode, self.requests.given(count, lengths)):
                yield found | {"sequences": count, "mode": mode, "lengths": lengths}

    @property
    def requests(self) -> Requests:
        """What is drawn."""
        return Requests(prompt=self.prompt, samples=self.samples, new=self.new, mean=self.mean)

    def line(self, row: Row) -> str:
        least, most = self.prompt
        asked = f"{row['sequences']:>4} sequences" + f" ({self.samples} of a prompt)" * (self.samples > 1)
        read = f"{least}-{most}" if least < most else str(most)
        sums = f"  {row['tp_sums']:<10} sums" if len(self.tp_sums) > 1 else ""
        what = f"generate {self.title}  {row['mode']:<6}{sums}  {asked}  {read}+"
        floor = row["decode_floor_s"]
        if row["lengths"] != "fixed":
            arms = "  ".join(
                f"{name} {arm['median_s']:.3f} s {arm['tokens_per_s']:.0f} tokens/s (useful"
                f" {arm['useful_share']:.2f}, prefilled {arm['prefilled_tokens']}, put back"
                f" {arm['put_back']}, {arm['captures']} graphs in {median(arm['capture_s']):.3f} s,"
                f" {arm['first_capture_s']:.3f} s in the first run)"
                for name, arm in row["arms"].items()
            )
            ratio = f"  {row['ratio']:.2f} x" if "ratio" in row else ""
            ends = f"{row['lengths']}, {row['tokens']} tokens, at most {self.new}"
            return f"{what}{ends}  {arms}  floor {floor:.3f} s{ratio}{_peak(row)}"
        share = floor / row["decode_s"] if row["decode_s"] > 0 else math.nan
        return (
            f"{what}{self.new}  {row['tokens_per_s']:8.0f} tokens/s  prefill {row['prefill_s']:.3f} s"
            f"  ({row['prefilled_tokens']} tokens)  decode {row['decode_s']:.3f} s  floor {floor:.3f} s"
            f" ({share:.0%}){_peak(row)}"
        )


class Subject:
    """The model that answers."""

    def __init__(self, bench: GenerateBench, world: World) -> None:
        self.bench, self.world = bench, world
        # Published shapes have few positions; weights do not depend on how many.
        positions = max(bench.spec.max_positions, bench.prompt[1] + bench.new)
        spec = replace(bench.spec, max_positions=positions)
        self.runtime = harness.random_model("model", spec, bench.layout, world, bench.dtype)
        self.runtime.freeze()
        # What decode passes of the model sum by, by its name.
        self.sums: dict[str, PeerSums | None] = dict.fromkeys(bench.tp_sums)
        if "peer" in self.sums:
            try:
                self.sums["peer"] = peer_sums(self.runtime)
            except Unreachable as error:
                raise UserError(f"--tp-sums peer: {error}; leave it out") from None
        self.runtime.tensor.sums = self.sums[bench.tp_sums[0]]
        self.bandwidth = device.copy_bandwidth(world)
        with ModelRunner(self.runtime.decoder) as warm:
            count = min(256, *bench.sequences)
            self.seconds(warm, ([bench.prompt[0]] * count, [2] * count), 2)

    def fixed(self, mode: str, given: Given) -> Iterator[Row]:
        """Responses of one length, after a first run that records graphs; ways to sum take turns."""
        bench, (read, _), tally = self.bench, given, Tally()
        device.reset_peak(self.world.device)
        captured: dict[str, Row] = {way: {} for way in self.sums}

        def answered(way: str) -> float:
            self.runtime.tensor.sums = self.sums[way]
            return self.seconds(passes, given, bench.new)

        with ModelRunner(self.runtime.decoder, graphs=mode != "eager") as passes:
            for way in self.sums if passes.graphs else ():
                before = passes.captures, passes.capture_seconds
                first = answered(way)
                captured[way] = {"captures": passes.captures - before[0], "first_run_s": first}
                captured[way]["capture_s"] = passes.capture_seconds - before[1]
            prefills = [
                self.seconds(passes, (read, [1] * len(read)), 1, tally=tally) for _ in range(bench.repeats)
            ]
            totals = device.alternated({way: partial(answered, way) for way in self.sums}, bench.repeats)
            predicted = self._predicted(passes, given)
        prefill = median(prefills)
        of_all: Row = {
            "predicted_bytes": predicted,
            "prefill_s": prefill,
            "prefilled_tokens": tally.prefilled // bench.repeats,
            "decode_floor_s": self._floor(given, -1),
            "copy_bytes_per_s": self.bandwidth,
            "peak_bytes": device.peak_bytes(self.world),
        }
        for way, seconds in totals.items():
            total = median(seconds)
            found: Row = {"tp_sums": way, "seconds": seconds, "total_s": total, "decode_s": total - prefill}
            yield of_all | captured[way] | found | {"tokens_per_s": sum(given[1]) / total}

    def varied(self, mode: str, given: Given) -> Iterator[Row]:
        """Responses of various lengths, by one way to sum after another."""
        for way, sums in self.sums.items():
            self.runtime.tensor.sums = sums
            yield {"tp_sums": way, **self._varied(mode, given)}

    def _varied(self, mode: str, given: Given) -> Row:
        """Responses of various lengths, with early stop and without in alternation.

        As in PPO where training needs the memory, every run makes its cache and records its graphs, unless
        the mode is `kept`; `capture_s` is the seconds of the latter, `first_capture_s` those of the
        first run. A first run of each arm warms up, unless there is to be one only.
        """
        bench, tokens = self.bench, sum(given[1])
        passes = ModelRunner(self.runtime.decoder, graphs=mode != "eager")

        def once(early_stop: bool) -> Row:
            tally, before = Tally(), (passes.captures, passes.capture_seconds)
            seconds = self.seconds(passes, given, bench.new, tally=tally, early_stop=early_stop)
            found = {"seconds": seconds, "captures": passes.captures - before[0]}
            found |= {"capture_s": passes.capture_seconds - before[1]}
            found["predicted_bytes"] = self._predicted(passes, given)
            if mode != "kept":
                passes.release()
            found |= {"prefilled_tokens": tally.prefilled, "put_back": tally.put_back}
            return found | {"useful_share": self._share(tally)}

        device.reset_peak(self.world.device)
        asked = {name: early for name, early in ARMS.items() if ("early" if early else "late") in bench.arms}
        warm = int(bench.repeats > 1)
        with passes:
            runs = device.alternated(
                {n: partial(once, early) for n, early in asked.items()}, warm + bench.repeats
            )
        arms: dict[str, Row] = {}
        for name, every in runs.items():
            timed = every[warm:]
            arms[name] = timed[-1] | {key: [run[key] for run in timed] for key in ("seconds", "capture_s")}
            arms[name]["first_capture_s"] = every[0]["capture_s"]
            arms[name]["median_s"] = median(arms[name]["seconds"])
            arms[name]["tokens_per_s"] = tokens / arms[name]["median_s"]
        found: Row = {"tokens": tokens, "arms": arms, "decode_floor_s": self._floor(given)}
        found |= {"copy_bytes_per_s": self.bandwidth, "peak_bytes": device.peak_bytes(self.world)}
        if len(arms) == len(ARMS):
            early, late = (arm["median_s"] for arm in arms.values())
            found |= {"saved_s": late - early, "ratio": late / early}
        return found

    def seconds(self, passes: ModelRunner, given: Given, new: int, **how: Any) -> float:
        """Seconds to answer prompts of the lengths given with responses of those given, at most `new`."""
        bench, runtime, (read, wanted) = self.bench, self.runtime, given
        prompts = bench.requests.tokens(read, bench.spec.vocab_size)
        rows = runtime.rows(len(read))
        requests = [Request(prompts[row], *divmod(row, bench.samples)) for row in rows]
        params = SamplingParams(max_new_tokens=new)
        stop = None if min(wanted) == new else _ends([wanted[row] for row in rows])
        found: list[int] = []

        def answer() -> None:
            made = generate(
                runtime.decoder,
                requests,
                params,
                runtime.executor,
                passes=passes,
                most=bench.at_a_time,
                prefill_tokens=bench.prefill_tokens,
                stop=stop,
                **how,
            )
            found.extend(len(response.tokens) for response in made)

        (seconds,) = device.measure(self.world, answer, 1)
        if found != [wanted[row] for row in rows]:
            raise RuntimeError("responses do not have the lengths that they were given")
        return seconds

    def _predicted(self, passes: ModelRunner, given: Given) -> int:
        """Bytes of the weights, the cache and the largest pass, as `plan.memory` counts them, of the rank
        that needs most."""
        decoder, cache = self.runtime.decoder, passes.cache
        fused = decoder.device.type == "cuda"
        use = Use("model", decoder.spec, self.runtime.placement, decoder.dtype.itemsize, fused=fused)
        tokens, longest = min(sum(given[0]), self.bench.prefill_tokens), max(given[0])
        cached = longest if longest > tokens else 0
        beside = generation_passes(use, self.runtime.coord.p, tokens, max(passes.groups), cached)
        weights = sum(p.nbytes for p in decoder.parameters())
        held = 0 if cache is None else cache.k.nbytes + cache.v.nbytes
        return int(device.most(self.world, weights + held + sum(beside.values())))

    def _share(self, tally: Tally) -> float:
        """Drawn tokens that responses keep, as a share of those drawn by all replicas."""
        own = torch.tensor([tally.tokens, tally.rows], device=self.world.device)
        kept, drawn = self.world.sum(own * self.runtime.owns_results).tolist()
        return kept / drawn

    def _floor(self, given: Given, more: int = 0) -> float:
        """Seconds to read the weights in every decode step, and in it the keys and values of every sequence.

        There are as many steps as the longest response has tokens (and `more`), or as tokens for each of the
        sequences at a time. Stages work one after the other, so their times add up; a stage's slowest rank
        counts. Embeddings are not read whole.
        """
        runtime, (read, wanted) = self.runtime, given
        weights = sum(p.nbytes for p in runtime.decoder.parameters())
        if runtime.decoder.first and not (runtime.spec.tied and runtime.decoder.last):
            weights -= runtime.decoder.embed.nbytes
        rows = runtime.rows(len(read))
        at_a_time = min(len(rows), self.bench.at_a_time or len(rows)) or 1
        steps = max((wanted[row] for row in rows), default=0) + more
        steps = max(steps, sum(wanted[row] + more for row in rows) / at_a_time)
        places = sum(sum(range(read[row] - more, read[row] + wanted[row])) for row in rows)
        seconds = self.world.gather(
            (runtime.coord.p, (steps * weights + places * cache_bytes(runtime.decoder)) / self.bandwidth)
        )
        stages = {p: max(s for q, s in seconds if q == p) for p, _ in seconds}
        return sum(stages.values())


def _peak(row: Row) -> str:
    """The measured peak, where there is one, and the predicted one."""
    arms = row["arms"].values() if "arms" in row else [row]
    predicted = max(arm["predicted_bytes"] for arm in arms)
    return f"{device.gib(row['peak_bytes'])} (predicted {predicted / 2**30:.1f})" if row["peak_bytes"] else ""


def _ends(lengths: Iterable[int]) -> StopRule:
    """Ends every response, in their order, after that many tokens."""
    left = iter(lengths)

    def rule(_: Sequence[int]) -> Any:
        length, heard = next(left), itertools.count(1)
        return lambda token: next(heard) >= length

    return rule
