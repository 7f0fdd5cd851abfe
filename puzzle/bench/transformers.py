"""`puzzle bench transformers`: generation of a model folder beside transformers' own, on the same prompts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from puzzle.bench import device
from puzzle.bench.train import DTYPES
from puzzle.cli import Parser
from puzzle.engine.generate import Request, generate
from puzzle.engine.passes import StagePasses
from puzzle.engine.sampling import SamplingParams
from puzzle.engine.world import World
from puzzle.model import hf
from puzzle.model.decoder import Decoder
from puzzle.model.parallel import TensorGroup
from puzzle.plan.layout import Coord, Layout


def run(arguments: Sequence[str]) -> int:
    """Time both, run by run in turn; greedy, a fixed number of new tokens."""
    parser = Parser("puzzle bench transformers", description=__doc__)
    parser.add_argument("model", type=Path, help="Hugging Face model folder")
    parser.add_argument("--batch", type=int, default=8, help="prompts")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the longest prompt")
    parser.add_argument("--ragged", action="store_true", help="prompts of half to all of these tokens")
    parser.add_argument("--new", type=int, default=64, help="new tokens of every sequence")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each")
    parser.add_argument("--dtype", default="fp32", choices=sorted(DTYPES))
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--out", type=Path, metavar="FILE", help="add the result to FILE, one line of JSON")
    given = parser.parse_args(arguments)
    world = World.start(given.device)
    spec = hf.read_spec(given.model, "lm")
    prompts = _prompts(given.batch, given.prompt, given.ragged, spec.vocab_size)
    runs = {
        "puzzle": _ours(given.model, prompts, given.new, DTYPES[given.dtype], world),
        "transformers": _theirs(given.model, prompts, given.new, DTYPES[given.dtype], world),
    }
    answers = {name: answer() for name, answer in runs.items()}  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(given.repeats):
        for name, answer in runs.items():
            world.synchronize()
            start = time.perf_counter()
            answer()
            world.synchronize()
            seconds[name].append(time.perf_counter() - start)
    _report(given, seconds, answers, device.facts(world) | {"threads": torch.get_num_threads()})
    return 0


def _prompts(count: int, longest: int, ragged: bool, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    shortest = max(1, longest // 2) if ragged else longest
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]


Answer = Callable[[], list[list[int]]]


def _ours(folder: Path, prompts: list[list[int]], new: int, dtype: torch.dtype, world: World) -> Answer:
    spec = hf.read_spec(folder, "lm")
    layout = Layout.even(1, 1, 1, spec.num_layers)
    decoder = Decoder(spec, layout, Coord(0, 0, 0), TensorGroup(), dtype, world.device)
    hf.load(decoder, folder)
    decoder.requires_grad_(False)
    passes = StagePasses(decoder)
    requests = [Request(prompt, row) for row, prompt in enumerate(prompts)]
    params = SamplingParams(greedy=True, min_new_tokens=new, max_new_tokens=new)
    return lambda: [answer.tokens for answer in generate(decoder, requests, params, passes=passes)]


def _theirs(folder: Path, prompts: list[list[int]], new: int, dtype: torch.dtype, world: World) -> Answer:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(world.device).eval()
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=world.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=world.device)
    options = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
    # Its own generation settings stop at end-of-text tokens: with min_new_tokens it masks them, we have none.
    options["eos_token_id"] = None

    @torch.no_grad()
    def answer() -> list[list[int]]:
        return model.generate(ids, attention_mask=mask, **options)[:, longest:].tolist()

    return answer


def _report(
    given: Any, seconds: dict[str, list[float]], answers: dict[str, list[list[int]]], where: dict[str, Any]
) -> None:
    tokens = given.batch * given.new
    rates = {name: tokens / median(times) for name, times in seconds.items()}
    faster = rates["puzzle"] / rates["transformers"]
    same = sum(a == b for a, b in zip(answers["puzzle"], answers["transformers"], strict=True))
    lengths = f"{given.prompt}{' ragged' if given.ragged else ''}+{given.new}"
    print(
        f"{given.model.name}  batch {given.batch}  {lengths}  {given.dtype}"
        f"  puzzle {rates['puzzle']:.1f} tokens/s  transformers {rates['transformers']:.1f}"
        f"  {faster:.2f} x  equal responses {same} of {given.batch}",
        flush=True,
    )
    if given.out is not None:
        settings = {name: getattr(given, name) for name in ("batch", "prompt", "ragged", "new", "dtype")}
        row = {"bench": "transformers", "model": given.model.name, **settings, "seconds": seconds}
        row |= {"tokens_per_s": rates, "faster": faster, "equal_responses": same, "where": where}
        with given.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
