"""`puzzle bench transformers`: generation of a model folder beside transformers' own, on the same prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from puzzle.bench import device
from puzzle.bench.arguments import DTYPES, Bench, parser
from puzzle.cli import named, whole
from puzzle.engine.generate.decode_ring import Request, generate
from puzzle.engine.generate.model_runner import ModelRunner
from puzzle.engine.generate.sampling import SamplingParams
from puzzle.engine.runtime.world import World
from puzzle.files.limits import MOST_SEQUENCES, MOST_TOKENS
from puzzle.model import hf
from puzzle.model.decoder import Decoder
from puzzle.model.parallel import TensorGroup
from puzzle.plan.layout import Coord, Layout


@dataclass(frozen=True, kw_only=True)
class TransformersBench(Bench):
    """What is measured."""

    model: Path
    batch: int
    prompt: int
    ragged: bool
    new: int
    repeats: int


def run(arguments: Sequence[str]) -> int:
    """Time both, run by run in turn; greedy, a fixed number of new tokens."""
    made = parser("transformers", "Time generation beside transformers' own.", "repeats", dtype="fp32")
    made.add_argument("model", type=named, help="Hugging Face model folder")
    made.add_argument("--batch", type=whole(1, MOST_SEQUENCES), default=8, help="prompts")
    made.add_argument("--prompt", type=whole(1, MOST_TOKENS), default=32, help="tokens of the longest prompt")
    made.add_argument("--ragged", action="store_true", help="prompts of half to all of these tokens")
    made.add_argument("--new", type=whole(1, MOST_TOKENS), default=64, help="new tokens of every sequence")
    bench = TransformersBench(**vars(made.parse_args(arguments)))
    world = World.start(bench.device)
    spec = hf.read_spec(bench.model, "lm")
    prompts = _prompts(bench.batch, bench.prompt, bench.ragged, spec.vocab_size)
    runs = {
        "puzzle": _ours(bench, prompts, world),
        "transformers": _theirs(bench, prompts, world),
    }
    answers = {name: answer() for name, answer in runs.items()}  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(bench.repeats):
        for name, answer in runs.items():
            used = time.process_time()
            seconds[name] += device.measure(world, answer, 1)
            cpu[name].append(time.process_time() - used)
    row = _row(bench, seconds, cpu, answers)
    _report(bench, row)
    bench.leave("transformers", row | {"where": device.facts(world) | {"threads": torch.get_num_threads()}})
    return 0


def _prompts(count: int, longest: int, ragged: bool, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    shortest = max(1, longest // 2) if ragged else longest
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]


Answer = Callable[[], list[list[int]]]


def _ours(bench: TransformersBench, prompts: list[list[int]], world: World) -> Answer:
    spec = hf.read_spec(bench.model, "lm")
    layout = Layout.even(1, 1, 1, spec.num_layers)
    decoder = Decoder(spec, layout, Coord(0, 0, 0), TensorGroup(), DTYPES[bench.dtype], world.device)
    hf.load(decoder, bench.model)
    decoder.requires_grad_(False)
    passes = ModelRunner(decoder)
    requests = [Request(prompt, row) for row, prompt in enumerate(prompts)]
    params = SamplingParams(greedy=True, min_new_tokens=bench.new, max_new_tokens=bench.new)
    return lambda: [answer.tokens for answer in generate(decoder, requests, params, passes=passes)]


def _theirs(bench: TransformersBench, prompts: list[list[int]], world: World) -> Answer:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(bench.model, dtype=DTYPES[bench.dtype])
    model = model.to(world.device).eval()
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=world.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=world.device)
    options = {
        "do_sample": False,
        "min_new_tokens": bench.new,
        "max_new_tokens": bench.new,
        "pad_token_id": 0,
    }
    # Its own generation settings stop at end-of-text tokens: with min_new_tokens it masks them, we have none.
    options["eos_token_id"] = None

    @torch.no_grad()
    def answer() -> list[list[int]]:
        return model.generate(ids, attention_mask=mask, **options)[:, longest:].tolist()

    return answer


def _row(
    bench: TransformersBench,
    seconds: dict[str, list[float]],
    cpu: dict[str, list[float]],
    answers: dict[str, list[list[int]]],
) -> dict[str, Any]:
    tokens = bench.batch * bench.new
    rates = {name: tokens / median(times) for name, times in seconds.items()}
    same = sum(a == b for a, b in zip(answers["puzzle"], answers["transformers"], strict=True))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "tokens_per_s": rates,
        "faster": rates["puzzle"] / rates["transformers"],
        "cpu_ratio": median(cpu["transformers"]) / median(cpu["puzzle"]),
        "equal_responses": same,
    }


def _report(bench: TransformersBench, row: dict[str, Any]) -> None:
    lengths = f"{bench.prompt}{' ragged' if bench.ragged else ''}+{bench.new}"
    arms = "  ".join(
        f"{name} {rate:.1f} tokens/s ({median(row['seconds'][name]):.2f} s, CPU"
        f" {median(row['cpu_seconds'][name]):.2f} s)"
        for name, rate in row["tokens_per_s"].items()
    )
    print(
        f"{bench.model.name}  batch {bench.batch}  {lengths}  {bench.dtype}  {arms}  {row['faster']:.2f} x"
        f" (CPU {row['cpu_ratio']:.2f} x)  equal responses {row['equal_responses']} of {bench.batch}",
        flush=True,
    )
