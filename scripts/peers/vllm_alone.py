#!/usr/bin/env python
"""Time vLLM's generation alone, beside `puzzle bench generate`: 7B, 256 + 256 tokens, no early stop.

    python scripts/peers/vllm_alone.py OUT.jsonl [--tp 1] [--batches 16,32,64,128,256] [--repeats 3]

Needs vllm (0.26.0 was measured) and a GPU. Weights are vLLM's bf16 dummies; sampling is at temperature 1. A
line of OUT is a batch without (null) or with (0) log-probs: seconds of the fastest repeat, tokens per second.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # no environment of a peer has this project

from puzzle.cli import Parser, new_file, whole  # noqa: E402
from puzzle.errors import exit_code  # noqa: E402

LENGTH, VOCABULARY = 256, 32000
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY,
    "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "hidden_act": "silu", "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
Generate = Callable[[Sequence[Sequence[int]], int | None], int]
"""From the prompts' tokens and how many log-probs are wanted to how many tokens came."""


def rows(generate: Generate, tp: int, batches: Sequence[int], repeats: int) -> Iterator[dict[str, Any]]:
    """The fastest of `repeats` calls per batch, without and with log-probs."""
    draw = random.Random(0)
    for batch in batches:
        prompts = [[draw.randrange(3, VOCABULARY) for _ in range(LENGTH)] for _ in range(batch)]
        for wanted in (None, 0):
            best, tokens = float("inf"), 0
            for _ in range(repeats):
                began = time.perf_counter()
                tokens = generate(prompts, wanted)
                best = min(best, time.perf_counter() - began)
            if tokens != batch * LENGTH:
                raise RuntimeError(f"batch {batch}: {tokens} tokens came instead of {batch * LENGTH}")
            measured = {"gen_s": round(best, 3), "tok_s": round(tokens / best)}
            yield {"peer": "vllm", "tp": tp, "batch": batch, "logprobs": wanted, **measured}


def engine(folder: Path, tp: int, sequences: int) -> Generate:
    """vLLM with its CUDA graphs, without what would spare it work here (a cache of prefixes)."""
    for name in ("NCCL_NVLS_ENABLE", "VLLM_ALLREDUCE_USE_SYMM_MEM", "VLLM_USE_NCCL_SYMM_MEM"):
        os.environ.setdefault(name, "0")
    for name in ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS", "TORCH_SYMM_MEM_DISABLE_MULTICAST"):
        os.environ.setdefault(name, "1")
    from vllm import LLM, SamplingParams  # ty: ignore[import-not-found]

    (folder / "config.json").write_text(json.dumps(SHAPE))
    model = LLM(
        str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", tensor_parallel_size=tp,
        max_model_len=4 * LENGTH, max_num_seqs=sequences, max_num_batched_tokens=64 * LENGTH,
        enable_prefix_caching=False, gpu_memory_utilization=0.9,
    )  # fmt: skip

    def generate(prompts: Sequence[Sequence[int]], wanted: int | None) -> int:
        how = SamplingParams(max_tokens=LENGTH, ignore_eos=True, detokenize=False, logprobs=wanted)
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return sum(len(one.outputs[0].token_ids) for one in model.generate(asked, how, use_tqdm=False))

    return generate


def wholes(text: str) -> list[int]:
    """The type of an option that is whole numbers between commas."""
    return [whole(1)(word) for word in text.split(",")]


def command(arguments: Sequence[str]) -> None:
    """Measure, and write what was measured; the file appears when the engine stands."""
    assert __doc__ is not None
    parser = Parser(prog=Path(__file__).name, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("out", type=new_file)
    parser.add_argument("--tp", type=whole(1), default=1)
    parser.add_argument("--batches", type=wholes, default="16,32,64,128,256")
    parser.add_argument("--repeats", type=whole(1), default=3)
    given = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        generate = engine(Path(folder), given.tp, max(given.batches))
        with given.out.open("w") as out:
            for row in rows(generate, given.tp, given.batches, given.repeats):
                print(json.dumps(row))
                print(json.dumps(row), file=out, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 after a mistake, which gets one line."""
    return exit_code(lambda: command(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
