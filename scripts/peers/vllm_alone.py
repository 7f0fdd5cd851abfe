#!/usr/bin/env python
"""Time vLLM's generation alone, beside `puzzle bench generate`: 7B, the same prompts and lengths.

    python scripts/peers/vllm_alone.py OUT.jsonl [--workloads fixed:3 varied:1 groups:2] [--logprobs with]
    python scripts/peers/vllm_alone.py --ours       the commands that time the same work by this project

Needs vllm (0.26.0 was measured), torch and a GPU. Weights are vLLM's bf16 dummies; sampling is at temperature
1, prefixes are cached as is vLLM's default, and forgotten before each run. No stop token ends a response. A
line of OUT is a workload without (null) or with (0) log-probs: seconds of every run, and of the fastest with
its tokens per second.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # no environment of a peer has this project

from puzzle.bench.requests import Requests  # noqa: E402
from puzzle.cli import Parser, new_file, real, whole  # noqa: E402
from puzzle.errors import UserError, exit_code  # noqa: E402

VOCABULARY = 32000
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY,
    "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
LOGPROBS = {"without": (None,), "with": (0,), "both": (0, None)}


@dataclass(frozen=True)
class Workload:
    """What `puzzle bench generate` runs for each number of `sequences`, with the options of `arguments`."""

    requests: Requests
    sequences: Sequence[int]
    lengths: str = "fixed"

    def arguments(self) -> list[str]:
        """Of `puzzle bench generate`."""
        asked, (least, most) = self.requests, self.requests.prompt
        words = ["--sequences", *map(str, self.sequences), "--modes", "graphs", "--lengths", self.lengths]
        words += ["--prompt", f"{least}-{most}" if least < most else str(most), "--new", str(asked.new)]
        words += ["--samples", str(asked.samples)] * (asked.samples > 1)
        words += ["--mean", str(asked.mean)] * (asked.mean is not None)
        return words + ["--arms", "early"] * (self.lengths != "fixed")

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its response, at most."""
        return self.requests.prompt[1] + self.requests.new


WORKLOADS = {
    "fixed": Workload(Requests(), (16, 32, 64, 128, 256)),
    "varied": Workload(Requests(prompt=(64, 1024), new=2048, mean=512), (1024,), "exponential"),
    "groups": Workload(Requests(prompt=(1024, 1024), samples=8), (512,)),
    "long": Workload(Requests(prompt=(256, 1024), new=7168, mean=512), (2048,), "exponential"),
}


@dataclass(frozen=True)
class Asked:
    """Prompts, for `samples` responses each, and how many tokens each response has: those of the first
    prompt, then of the second."""

    prompts: Sequence[Sequence[int]]
    samples: int
    lengths: Sequence[int]


Generate = Callable[[Asked, int | None], tuple[float, list[int]]]
"""From what is asked and how many log-probs are wanted to seconds, and tokens of each response that came."""


def asked(work: Workload, count: int) -> Asked:
    """What our bench draws for `count` sequences. vLLM gives all samples of a prompt one length; where theirs
    differ, each is asked for by itself."""
    read, wanted = work.requests.given(count, work.lengths)
    samples = work.requests.samples if work.lengths == "fixed" else 1
    return Asked(work.requests.tokens(read, VOCABULARY)[::samples], samples, wanted)


def rows(
    generate: Generate, works: Sequence[tuple[str, Workload, int]], logprobs: Sequence[int | None]
) -> Iterator[dict[str, Any]]:
    """A row per kind of log-probs, workload (its name, itself, how often it runs) and number of sequences."""
    for wanted, (name, work, repeats) in itertools.product(logprobs, works):
        for count in work.sequences:
            given = asked(work, count)
            tokens, seconds = sum(given.lengths), []
            for _ in range(repeats):
                took, made = generate(given, wanted)
                if made != list(given.lengths):
                    raise RuntimeError(
                        f"{name}, {count} sequences: {sum(made)} tokens came instead of {tokens}"
                    )
                seconds.append(took)
            best = min(seconds)
            what = {"workload": name, "batch": count, "lengths": work.lengths, **asdict(work.requests)}
            measured = {"seconds": seconds, "gen_s": round(best, 3), "tok_s": round(tokens / best)}
            yield what | {"logprobs": wanted, "tokens": tokens} | measured


def engine(folder: Path, longest: int, settings: dict[str, Any]) -> Generate:
    """vLLM with its CUDA graphs for sequences of up to `longest` tokens."""
    for name in ("NCCL_NVLS_ENABLE", "VLLM_ALLREDUCE_USE_SYMM_MEM", "VLLM_USE_NCCL_SYMM_MEM"):
        os.environ.setdefault(name, "0")
    for name in ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS", "TORCH_SYMM_MEM_DISABLE_MULTICAST"):
        os.environ.setdefault(name, "1")
    from vllm import LLM, SamplingParams  # ty: ignore[import-not-found]

    shape = SHAPE | {"max_position_embeddings": longest}
    (folder / "config.json").write_text(json.dumps(shape))
    model = LLM(
        str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=longest,
        **settings,
    )  # fmt: skip

    def forget() -> None:
        for _ in range(50):  # blocks of the run before may still be on their way back
            if model.reset_prefix_cache():
                return
            time.sleep(0.1)
        raise RuntimeError("vLLM did not forget the prefixes of the run before")

    def generate(asked: Asked, wanted: int | None) -> tuple[float, list[int]]:
        params = [
            SamplingParams(
                n=asked.samples, max_tokens=length, ignore_eos=True, detokenize=False, logprobs=wanted
            )
            for length in asked.lengths[:: asked.samples]
        ]
        prompts = [{"prompt_token_ids": list(prompt)} for prompt in asked.prompts]
        forget()
        began = time.perf_counter()
        made = model.generate(prompts, params, use_tqdm=False)
        took = time.perf_counter() - began
        return took, [len(one.token_ids) for answer in made for one in answer.outputs]

    return generate


def workload(text: str) -> tuple[str, Workload, int | None]:
    """The type of an option NAME or NAME:REPEATS."""
    name, _, repeats = text.partition(":")
    if name not in WORKLOADS:
        raise argparse.ArgumentTypeError(f"{text!r}: there are {', '.join(WORKLOADS)}; NAME or NAME:REPEATS")
    return name, WORKLOADS[name], whole(1)(repeats) if repeats else None


def wholes(text: str) -> list[int]:
    """The type of an option that is whole numbers between commas."""
    return [whole(1)(word) for word in text.split(",")]


def parser() -> Parser:
    """Its options."""
    assert __doc__ is not None
    found = Parser(prog=Path(__file__).name, description=__doc__.splitlines()[0], allow_abbrev=False)
    found.add_argument("out", type=new_file, nargs="?", help="the rows, a JSON a line")
    found.add_argument("--ours", action="store_true", help="print our commands for the workloads, no more")
    names = ", ".join(WORKLOADS)
    found.add_argument(
        "--workloads",
        type=workload,
        nargs="+",
        metavar="NAME[:REPEATS]",
        default=[workload("fixed")],
        help=names,
    )
    found.add_argument("--repeats", type=whole(1), default=3, help="of workloads without their own number")
    found.add_argument("--batches", type=wholes, metavar="N,N,...", help="numbers of sequences instead")
    found.add_argument("--logprobs", choices=LOGPROBS, default="both")
    found.add_argument("--tp", type=whole(1), default=1)
    found.add_argument("--at-a-time", type=whole(1), help="max_num_seqs; default: all, at most vLLM's 1024")
    found.add_argument("--memory", type=real(0.0, 1.0), default=0.92, help="gpu_memory_utilization")
    return found


def command(arguments: Sequence[str]) -> None:
    """Measure, and write what was measured; the file appears when the engine stands."""
    given = parser().parse_args(arguments)
    works = []
    for name, work, repeats in given.workloads:
        work = replace(work, sequences=given.batches or work.sequences)
        if any(count % work.requests.samples for count in work.sequences):
            raise UserError(f"--batches: {name} has {work.requests.samples} samples of each prompt")
        works.append((name, work, repeats or given.repeats))
    if given.ours:
        for _, work, repeats in works:
            print("puzzle bench generate", *work.arguments(), "--repeats", repeats)
        return
    if given.out is None:
        raise UserError("no file for the rows: give OUT.jsonl, or --ours")
    most = max(count for _, work, _ in works for count in work.sequences)
    settings = {
        "tensor_parallel_size": given.tp, "gpu_memory_utilization": given.memory,
        "max_num_seqs": given.at_a_time or min(most, 1024), "max_num_batched_tokens": 16384,
    }  # fmt: skip
    with TemporaryDirectory() as folder:
        generate = engine(Path(folder), max(work.longest for _, work, _ in works), settings)
        with given.out.open("w") as out:
            for row in rows(generate, works, LOGPROBS[given.logprobs]):
                line = json.dumps({"peer": "vllm", "tp": given.tp, **row, "settings": settings})
                print(line, flush=True)
                print(line, file=out, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 after a mistake, which gets one line."""
    return exit_code(lambda: command(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
