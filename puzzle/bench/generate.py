"""`puzzle bench generate`: prefill and decoding of random prompts, beside the least time memory allows.

With responses of exponential lengths, decoding with early stop beside decoding to the end.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from puzzle.bench import device
from puzzle.bench.arguments import LayoutBench, parser
from puzzle.cli import whole
from puzzle.engine.generate.decode_ring import Request, StopRule, Tally, generate
from puzzle.engine.generate.model_runner import ModelRunner, cache_bytes, fitting_rows
from puzzle.engine.generate.sampling import SamplingParams
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.files.limits import MOST_SEQUENCES, MOST_TOKENS
from puzzle.launch import local

ARMS = {"early stop": True, "to the end": False}


@dataclass(frozen=True, kw_only=True)
class GenerateBench(LayoutBench):
    """What is measured."""

    batches: Sequence[int]
    prompt: int
    ragged: bool
    new: int
    greedy: bool
    modes: Sequence[str]
    lengths: Sequence[str]
    repeats: int

    def prompts(self, batch: int) -> list[int]:
        """Tokens of each prompt."""
        generator = torch.Generator().manual_seed(batch)
        least = max(1, self.prompt // 8) if self.ragged else self.prompt
        return torch.randint(least, self.prompt + 1, (batch,), generator=generator).tolist()

    def responses(self, batch: int) -> list[int]:
        """Tokens of each response: exponential with a mean of a quarter of `new`, cut at `new`."""
        drawn = torch.empty(batch).exponential_(4 / self.new, generator=torch.Generator().manual_seed(batch))
        return drawn.ceil().clamp(1, self.new).int().tolist()


def run(arguments: Sequence[str]) -> int:
    """Parse the command line and start the processes of the layout."""
    made = parser("generate", "Time prefill and decoding of random prompts.", "model layers layout repeats")
    made.add_argument(
        "--batches",
        nargs="+",
        type=whole(1, MOST_SEQUENCES),
        default=[32, 64, 128, 256],
        help="of all replicas",
    )
    made.add_argument("--prompt", type=whole(1, MOST_TOKENS), default=256, help="tokens of a prompt")
    made.add_argument("--ragged", action="store_true", help="prompts of an eighth of that to all of it")
    made.add_argument("--new", type=whole(1, MOST_TOKENS), default=256, help="most new tokens of a sequence")
    made.add_argument("--greedy", action="store_true", help="argmax instead of drawing at temperature 1")
    modes, lengths = ("eager", "graphs"), ("fixed", "exponential")
    made.add_argument("--modes", nargs="+", choices=modes, default=modes, help="graphs: of decode passes")
    made.add_argument(
        "--lengths", nargs="+", choices=lengths, default=lengths[:1], help="of responses; fixed: timed once"
    )
    bench = GenerateBench(**vars(made.parse_args(arguments)))
    local.run("puzzle.bench.generate:work", (bench,), math.prod(bench.layout))
    return 0


def work(bench: GenerateBench) -> None:
    """What every process does; rank 0 reports."""
    with World.start(bench.device) as world:
        subject = Subject(bench, world)
        for batch, mode, lengths in itertools.product(bench.batches, bench.modes, bench.lengths):
            row = subject.fixed(mode, batch) if lengths == "fixed" else subject.exponential(mode, batch)
            if world.rank == 0:
                print(f"generate {bench.title}  {mode:<6}  {_line(bench, row)}", flush=True)
                row |= {"mode": mode, "lengths": lengths}
                bench.leave("generate", row | {"where": device.facts(world)})


class Subject:
    """The model that answers."""

    def __init__(self, bench: GenerateBench, world: World) -> None:
        self.bench, self.world = bench, world
        self.runtime = bench.runtime(world)
        self.runtime.freeze()
        self.bandwidth = device.copy_bandwidth(world)
        with ModelRunner(self.runtime.decoder) as warm:
            self._seconds(warm, min(bench.batches), 2)

    def fixed(self, mode: str, batch: int) -> dict[str, Any]:
        """Responses of one length."""
        new, sizes = self.bench.new, self._waves(batch)
        device.reset_peak(self.world.device)
        captured: dict[str, Any] = {}
        with ModelRunner(self.runtime.decoder, graphs=mode == "graphs") as passes:
            if passes.graphs:
                first = self._seconds(passes, sizes[0], new)
                captured = {"captures": passes.captures, "capture_s": passes.capture_seconds}
                captured["first_wave_s"] = first
            prefill = sum(self._seconds(passes, size, 1) for size in sizes)
            total = sum(self._seconds(passes, size, new) for size in sizes)
        return captured | {
            "batch": batch,
            "waves": len(sizes),
            "total_s": total,
            "prefill_s": prefill,
            "decode_s": total - prefill,
            "decode_floor_s": sum(self._floor(size) for size in sizes),
            "tokens_per_s": batch * new / total,
            "copy_bytes_per_s": self.bandwidth,
            "peak_bytes": device.peak_bytes(self.world),
        }

    def exponential(self, mode: str, batch: int) -> dict[str, Any]:
        """Responses of exponential lengths, both ways in alternation.

        As in PPO, every run makes its cache and records its graphs; `capture_s` is the seconds of the latter.
        A first run of each warms up.
        """
        waves = [(size, self.bench.responses(size)) for size in self._waves(batch)]
        tokens = sum(sum(lengths) for _, lengths in waves)
        arms: dict[str, dict[str, Any]] = {name: {"seconds": [], "capture_s": []} for name in ARMS}
        for _ in range(1 + self.bench.repeats):
            for name, arm in arms.items():
                tally = Tally()
                with ModelRunner(self.runtime.decoder, graphs=mode == "graphs") as passes:
                    seconds = [
                        self._seconds(passes, size, self.bench.new, lengths, ARMS[name], tally)
                        for size, lengths in waves
                    ]
                    arm["seconds"].append(sum(seconds))
                    arm["capture_s"].append(passes.capture_seconds)
                    arm["captures"] = passes.captures
                arm["useful_share"] = self._share(tally)
        for arm in arms.values():
            del arm["seconds"][0], arm["capture_s"][0]
            arm["median_s"] = median(arm["seconds"])
            arm["tokens_per_s"] = tokens / arm["median_s"]
        early, late = (arm["median_s"] for arm in arms.values())
        return {
            "batch": batch,
            "waves": len(waves),
            "tokens": tokens,
            "arms": arms,
            "saved_s": late - early,
            "ratio": late / early,
        }

    def _seconds(
        self,
        passes: ModelRunner,
        batch: int,
        new: int,
        lengths: Sequence[int] | None = None,
        early_stop: bool = True,
        tally: Tally | None = None,
    ) -> float:
        """Seconds to answer `batch` prompts with `new` tokens each, or with `lengths`, at most `new`."""
        bench, runtime = self.bench, self.runtime
        generator = torch.Generator().manual_seed(batch)
        shape = (batch, bench.prompt)
        prompts = torch.randint(0, bench.spec.vocab_size, shape, generator=generator).tolist()
        sizes, rows = bench.prompts(batch), runtime.rows(batch)
        requests = [Request(prompts[row][: sizes[row]], row) for row in rows]
        wanted = [new if lengths is None else lengths[row] for row in rows]
        params = SamplingParams(greedy=bench.greedy, max_new_tokens=new)
        device.meet(self.world)
        start = time.perf_counter()
        answers = generate(
            runtime.decoder,
            requests,
            params,
            runtime.executor,
            passes=passes,
            stop=None if lengths is None else _ends(wanted),
            tally=tally,
            early_stop=early_stop,
        )
        self.world.synchronize()
        seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=self.world.device)
        if [len(answer.tokens) for answer in answers] != wanted:
            raise RuntimeError("responses do not have the lengths that they were given")
        return float(self.world.max(seconds))

    def _share(self, tally: Tally) -> float:
        """Drawn tokens that responses keep, as a share of those drawn by all replicas."""
        own = torch.tensor([tally.tokens, tally.rows], device=self.world.device)
        kept, drawn = self.world.sum(own * self.runtime.owns_results).tolist()
        return kept / drawn

    def _waves(self, batch: int) -> list[int]:
        """How many prompts run at once, one after the other: as many as every rank's cache has room for."""
        fits = fitting_rows(self.runtime.decoder, self.bench.prompt + self.bench.new)
        if fits is None:
            return [batch]
        replicas = self.bench.layout[2]
        largest = -int(self.world.max(torch.tensor(-fits * replicas, device=self.world.device)))
        if largest < replicas:
            raise UserError(
                f"no sequence of {self.bench.prompt + self.bench.new} tokens fits beside the weights"
            )
        waves = -(-batch // largest)
        return [batch // waves + (i < batch % waves) for i in range(waves)]

    def _floor(self, batch: int) -> float:
        """Seconds to read the weights and the live keys and values once in every decode step.

        Stages work one after the other, so their times add up; a stage's slowest rank counts. Embeddings are
        not read whole.
        """
        runtime, new = self.runtime, self.bench.new
        weights = sum(p.nbytes for p in runtime.decoder.parameters())
        if runtime.decoder.first and not (runtime.spec.tied and runtime.decoder.last):
            weights -= runtime.decoder.embed.nbytes
        lengths = self.bench.prompts(batch)
        places = sum(lengths[row] + step for row in runtime.rows(batch) for step in range(1, new))
        read = (new - 1) * weights + places * cache_bytes(runtime.decoder)
        seconds = self.world.gather((runtime.coord.p, read / self.bandwidth))
        stages = {p: max(s for q, s in seconds if q == p) for p, _ in seconds}
        return sum(stages.values())


def _ends(lengths: Iterable[int]) -> StopRule:
    """Ends every response, in their order, after that many tokens."""
    left = iter(lengths)

    def rule(_: Sequence[int]) -> Any:
        length, heard = next(left), itertools.count(1)
        return lambda token: next(heard) >= length

    return rule


def _line(bench: GenerateBench, row: dict[str, Any]) -> str:
    what = f"batch {row['batch']:>4} in {row['waves']}  {'ragged ' * bench.ragged}{bench.prompt}+"
    if "arms" in row:
        arms = "  ".join(
            f"{name} {arm['median_s']:.3f} s {arm['tokens_per_s']:.0f} tokens/s (useful"
            f" {arm['useful_share']:.2f}, {arm['captures']} graphs in {median(arm['capture_s']):.3f} s)"
            for name, arm in row["arms"].items()
        )
        return f"{what}exponential, at most {bench.new}  {arms}  {row['ratio']:.2f} x"
    memory = "" if row["peak_bytes"] is None else f"  peak {row['peak_bytes'] / 2**30:.1f} GiB"
    share = row["decode_floor_s"] / row["decode_s"] if row["decode_s"] > 0 else math.nan
    return (
        f"{what}{bench.new}  {row['tokens_per_s']:8.0f} tokens/s  prefill {row['prefill_s']:.3f} s"
        f"  decode {row['decode_s']:.3f} s  floor {row['decode_floor_s']:.3f} s ({share:.0%}){memory}"
    )
