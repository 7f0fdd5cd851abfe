"""`puzzle bench transformers`: generation from a model folder beside transformers' own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from puzzle.bench import device, harness
from puzzle.bench.harness import Row, option
from puzzle.cli import named
from puzzle.engine.generate.decode_ring import generate
from puzzle.engine.generate.model_runner import ModelRunner
from puzzle.engine.generate.requests import Request
from puzzle.engine.generate.sampling import SamplingParams
from puzzle.engine.runtime.world import World
from puzzle.model import hf
from puzzle.model.decoder import Decoder
from puzzle.model.parallel import TensorGroup
from puzzle.plan.layout import Coord, Layout
from puzzle.plan.memory import RankMemory, weight_bytes
from puzzle.plan.pages import kv_bytes

Answer = Callable[[], list[list[int]]]


@dataclass(frozen=True, kw_only=True)
class TransformersBench(harness.Bench):
    """Time generation beside transformers' own: greedy, a fixed number of new tokens."""

    model: Annotated[Path, option(positional=True, type=named, help="Hugging Face model folder")]
    batch: Annotated[int, harness.count(help="prompts")] = 8
    prompt: Annotated[int, harness.tokens(help="tokens of a prompt")] = 32
    new: Annotated[int, harness.tokens(help="new tokens of every sequence")] = 64
    dtype: harness.Dtype = "fp32"
    repeats: harness.Repeats = 5
    smaller: ClassVar[Mapping[str, str]] = {
        "cache": "lower --batch or --new",
        "": "give a smaller model, or --dtype bf16",
    }

    def memory(self, world: World) -> RankMemory:
        """Both hold the model and a cache."""
        spec, itemsize = hf.read_spec(self.model, "lm"), harness.DTYPES[self.dtype].itemsize
        layout = Layout.even(1, 1, 1, spec.num_layers)
        tokens = self.batch * (self.prompt + self.new)
        resident = {"two models": 2 * weight_bytes(spec, layout, Coord(0, 0, 0), itemsize)}
        caches = {"two kv cache": 2 * kv_bytes(spec, layout, 0, tokens, itemsize)}
        return RankMemory(world.rank, resident, {"generation": caches})

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
