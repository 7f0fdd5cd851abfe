"""`puzzle bench generate` and `transformers`: prefill and decoding of random prompts.

Beside the least time that memory allows; with responses of exponential lengths, early stop beside decoding
to the end; and a model folder beside transformers' own generation.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
from torch import Tensor

from puzzle.bench import device, harness
from puzzle.bench.harness import Row, option
from puzzle.cli import named
from puzzle.engine.generate.decode_ring import Request, StopRule, Tally, generate
from puzzle.engine.generate.model_runner import ModelRunner, cache_bytes, fitting_rows
from puzzle.engine.generate.sampling import SamplingParams
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.model import hf
from puzzle.model.decoder import Decoder
from puzzle.model.parallel import TensorGroup
from puzzle.plan.layout import Coord, Layout

ARMS = {"early stop": True, "to the end": False}
Answer = Callable[[], list[list[int]]]


@dataclass(frozen=True, kw_only=True)
class GenerateBench(harness.LayoutBench):
    """Time prefill and decoding of random prompts, drawn at temperature 1."""

    batches: Annotated[Sequence[int], harness.count(nargs="+", help="of all replicas")] = (32, 64, 128, 256)
    prompt: Annotated[int, harness.tokens(help="tokens of a prompt")] = 256
    ragged: Annotated[bool, option(help="prompts of an eighth of that to all of it")] = False
    new: Annotated[int, harness.tokens(help="most new tokens of a sequence")] = 256
    modes: Annotated[Sequence[str], harness.several("eager", "graphs")] = ("eager", "graphs")
    lengths: Annotated[Sequence[str], harness.several("fixed", "exponential")] = ("fixed",)
    repeats: harness.Repeats = 5

    def measure(self, world: World) -> Iterator[Row]:
        subject = Subject(self, world)
        for batch, mode, lengths in itertools.product(self.batches, self.modes, self.lengths):
            found = subject.fixed(mode, batch) if lengths == "fixed" else subject.exponential(mode, batch)
            yield found | {"mode": mode, "lengths": lengths}

    def prompts(self, batch: int) -> list[int]:
        """Tokens of each prompt."""
        generator = torch.Generator().manual_seed(batch)
        least = max(1, self.prompt // 8) if self.ragged else self.prompt
        return torch.randint(least, self.prompt + 1, (batch,), generator=generator).tolist()

    def responses(self, batch: int) -> list[int]:
        """Tokens of each response: exponential with a mean of a quarter of `new`, cut at `new`."""
        drawn = torch.empty(batch).exponential_(4 / self.new, generator=torch.Generator().manual_seed(batch))
        return drawn.ceil().clamp(1, self.new).int().tolist()

    def line(self, row: Row) -> str:
        batch = f"batch {row['batch']:>4} in {row['waves']}  {'ragged ' * self.ragged}{self.prompt}+"
        what = f"generate {self.title}  {row['mode']:<6}  {batch}"
        if row["lengths"] == "exponential":
            arms = "  ".join(
                f"{name} {arm['median_s']:.3f} s {arm['tokens_per_s']:.0f} tokens/s (useful"
                f" {arm['useful_share']:.2f}, {arm['captures']} graphs in {median(arm['capture_s']):.3f} s)"
                for name, arm in row["arms"].items()
            )
            return f"{what}exponential, at most {self.new}  {arms}  {row['ratio']:.2f} x"
        share = row["decode_floor_s"] / row["decode_s"] if row["decode_s"] > 0 else math.nan
        return (
            f"{what}{self.new}  {row['tokens_per_s']:8.0f} tokens/s  prefill {row['prefill_s']:.3f} s"
            f"  decode {row['decode_s']:.3f} s  floor {row['decode_floor_s']:.3f} s ({share:.0%})"
            f"{device.gib(row['peak_bytes'])}"
        )


class Subject:
    """The model that answers."""

    def __init__(self, bench: GenerateBench, world: World) -> None:
        self.bench, self.world = bench, world
        self.runtime = harness.random_model("model", bench.spec, bench.layout, world, bench.dtype)
        self.runtime.freeze()
        self.bandwidth = device.copy_bandwidth(world)
        with ModelRunner(self.runtime.decoder) as warm:
            self._seconds(warm, min(bench.batches), 2)

    def fixed(self, mode: str, batch: int) -> Row:
        """Responses of one length."""
        new, sizes = self.bench.new, self._waves(batch)
        device.reset_peak(self.world.device)
        captured: Row = {}
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

    def exponential(self, mode: str, batch: int) -> Row:
        """Responses of exponential lengths, both ways in alternation.

        As in PPO, every run makes its cache and records its graphs; `capture_s` is the seconds of the latter.
        A first run of each warms up.
        """
        waves = [self.bench.responses(size) for size in self._waves(batch)]

        def once(early_stop: bool) -> Row:
            tally = Tally()
            with ModelRunner(self.runtime.decoder, graphs=mode == "graphs") as passes:
                how = {"early_stop": early_stop, "tally": tally}
                seconds = sum(self._seconds(passes, len(w), self.bench.new, w, **how) for w in waves)
                found = {"seconds": seconds, "capture_s": passes.capture_seconds, "captures": passes.captures}
            return found | {"useful_share": self._share(tally)}

        arms: dict[str, Row] = {}
        runs = device.alternated(
            {n: partial(once, early) for n, early in ARMS.items()}, 1 + self.bench.repeats
        )
        for name, (_, *timed) in runs.items():
            arms[name] = timed[-1] | {key: [run[key] for run in timed] for key in ("seconds", "capture_s")}
            arms[name]["median_s"] = median(arms[name]["seconds"])
            arms[name]["tokens_per_s"] = sum(map(sum, waves)) / arms[name]["median_s"]
        early, late = (arm["median_s"] for arm in arms.values())
        found = {"batch": batch, "waves": len(waves), "tokens": sum(map(sum, waves)), "arms": arms}
        return found | {"saved_s": late - early, "ratio": late / early}

    def _seconds(
        self, passes: ModelRunner, batch: int, new: int, lengths: Sequence[int] | None = None, **how: Any
    ) -> float:
        """Seconds to answer `batch` prompts with `new` tokens each, or with `lengths`, at most `new`."""
        bench, runtime = self.bench, self.runtime
        generator = torch.Generator().manual_seed(batch)
        shape = (batch, bench.prompt)
        prompts = torch.randint(0, bench.spec.vocab_size, shape, generator=generator).tolist()
        sizes, rows = bench.prompts(batch), runtime.rows(batch)
        requests = [Request(prompts[row][: sizes[row]], row) for row in rows]
        wanted = [new if lengths is None else lengths[row] for row in rows]
        params = SamplingParams(max_new_tokens=new)
        stop = None if lengths is None else _ends(wanted)
        found: list[int] = []

        def answer() -> None:
            made = generate(
                runtime.decoder, requests, params, runtime.executor, passes=passes, stop=stop, **how
            )
            found.extend(len(response.tokens) for response in made)

        (seconds,) = device.measure(self.world, answer, 1)
        if found != wanted:
            raise RuntimeError("responses do not have the lengths that they were given")
        return seconds

    def _share(self, tally: Tally) -> float:
        """Drawn tokens that responses keep, as a share of those drawn by all replicas."""
        own = torch.tensor([tally.tokens, tally.rows], device=self.world.device)
        kept, drawn = self.world.sum(own * self.runtime.owns_results).tolist()
        return kept / drawn

    def _waves(self, batch: int) -> list[int]:
        """How many prompts run at once, one after the other: as many as every rank's cache has room for."""
        tokens, replicas = self.bench.prompt + self.bench.new, self.bench.layout[2]
        fits = fitting_rows(self.runtime.decoder, tokens)
        if fits is None:
            return [batch]
        largest = -int(device.most(self.world, -fits * replicas))
        if largest < replicas:
            raise UserError(f"no sequence of {tokens} tokens fits beside the weights")
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


@dataclass(frozen=True, kw_only=True)
class TransformersBench(harness.Bench):
    """Time generation beside transformers' own: greedy, a fixed number of new tokens."""

    model: Annotated[Path, option(positional=True, type=named, help="Hugging Face model folder")]
    batch: Annotated[int, harness.count(help="prompts")] = 8
    prompt: Annotated[int, harness.tokens(help="tokens of a prompt")] = 32
    new: Annotated[int, harness.tokens(help="new tokens of every sequence")] = 64
    dtype: harness.Dtype = "fp32"
    repeats: harness.Repeats = 5

    def measure(self, world: World) -> Iterator[Row]:
        spec = hf.read_spec(self.model, "lm")
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(0, spec.vocab_size, (self.batch, self.prompt), generator=generator)
        arms = {"puzzle": self._ours(prompts, world), "transformers": self._theirs(prompts, world)}
        first = {name: answer() for name, answer in arms.items()}  # warm-up

        def timed(answer: Answer) -> tuple[float, float]:
            used = time.process_time()
            (seconds,) = device.measure(world, answer, 1)
            return seconds, time.process_time() - used

        found = device.alternated({n: partial(timed, answer) for n, answer in arms.items()}, self.repeats)
        seconds = {name: [wall for wall, _ in times] for name, times in found.items()}
        cpu = {name: [used for _, used in times] for name, times in found.items()}
        rates = {name: self.batch * self.new / median(times) for name, times in seconds.items()}
        yield {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "tokens_per_s": rates,
            "faster": rates["puzzle"] / rates["transformers"],
            "cpu_ratio": median(cpu["transformers"]) / median(cpu["puzzle"]),
            "equal_responses": sum(a == b for a, b in zip(*first.values(), strict=True)),
        }

    def _ours(self, prompts: Tensor, world: World) -> Answer:
        spec = hf.read_spec(self.model, "lm")
        layout = Layout.even(1, 1, 1, spec.num_layers)
        dtype, alone = harness.DTYPES[self.dtype], (Coord(0, 0, 0), TensorGroup())
        decoder = Decoder(spec, layout, *alone, dtype, world.device)
        hf.load(decoder, self.model)
        decoder.requires_grad_(False)
        passes = ModelRunner(decoder)
        requests = [Request(prompt, row) for row, prompt in enumerate(prompts.tolist())]
        params = SamplingParams(greedy=True, min_new_tokens=self.new, max_new_tokens=self.new)
        return lambda: [answer.tokens for answer in generate(decoder, requests, params, passes=passes)]

    def _theirs(self, prompts: Tensor, world: World) -> Answer:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=harness.DTYPES[self.dtype])
        model, ids = model.to(world.device).eval(), prompts.to(world.device)
        lengths = {"min_new_tokens": self.new, "max_new_tokens": self.new}
        # Its own settings stop at end-of-text tokens: with min_new_tokens it masks them, we have none.
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, **lengths}

        @torch.no_grad()
        def answer() -> list[list[int]]:
            made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            return made[:, self.prompt :].tolist()

        return answer

    def line(self, row: Row) -> str:
        arms = "  ".join(
            f"{name} {rate:.1f} tokens/s ({median(row['seconds'][name]):.2f} s, CPU"
            f" {median(row['cpu_seconds'][name]):.2f} s)"
            for name, rate in row["tokens_per_s"].items()
        )
        return (
            f"{self.model.name}  batch {self.batch}  {self.prompt}+{self.new}  {self.dtype}  {arms}"
            f"  {row['faster']:.2f} x (CPU {row['cpu_ratio']:.2f} x)"
            f"  equal responses {row['equal_responses']} of {self.batch}"
        )
