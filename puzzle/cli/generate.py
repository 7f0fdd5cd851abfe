"""`puzzle generate`: responses of a model folder to prompts from a file or from standard input."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from puzzle.cli import Parser
from puzzle.config import DataConfig
from puzzle.data.prompts import Prompt, PromptSet, Row, load_prompts, tokenise
from puzzle.data.tokenizers import Tokenizer, load_tokenizer, stop_ids
from puzzle.errors import UserError


def parser() -> Parser:
    """The command's arguments."""
    made = Parser(prog="puzzle generate", description="Answer prompts with a model folder.")
    made.add_argument("model", type=Path, help="Hugging Face model folder")
    made.add_argument(
        "--prompts", type=Path, help=".jsonl, .parquet, .txt or dataset folder; else stdin lines"
    )
    made.add_argument("--field", default="prompt", help="name of the prompt's field")
    made.add_argument("--plain", action="store_true", help="no chat template, even if there is one")
    made.add_argument("--jsonl", type=Path, metavar="FILE", help="a line per prompt, in order")
    made.add_argument("--greedy", action="store_true")
    made.add_argument("--temperature", type=float, default=1.0)
    made.add_argument("--top-k", type=int, default=0, help="0: no limit")
    made.add_argument("--top-p", type=float, default=1.0)
    made.add_argument("--min-new-tokens", type=int, default=0)
    made.add_argument("--max-new-tokens", type=int, default=128)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--batch", type=int, default=32, help="prompts at a time")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on cuda")
    return made


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    given = parser().parse_args(arguments)
    if given.batch < 1:
        raise UserError(f"--batch is {given.batch}; it must be at least 1")
    if given.jsonl is not None and not given.jsonl.parent.is_dir():
        raise UserError(f"--jsonl {given.jsonl}: no folder {given.jsonl.parent}")
    tokenizer = load_tokenizer(str(given.model))
    data = DataConfig(
        field=given.field,
        chat_template=bool(tokenizer.chat_template) and not given.plain,
        max_prompt_tokens=1 << 30,  # the model's positions are the limit
    )
    prompts = _prompts(given.prompts, data, tokenizer)
    lines = []
    for prompt, answer in _answers(given, tokenizer, prompts.prompts):
        text = str(tokenizer.decode(answer["response_ids"], skip_special_tokens=True))
        lines.append(json.dumps({"prompt": prompt.text, "response": text, **answer}, ensure_ascii=False))
        print(f"{prompt.text}\n> {text}\n", flush=True)
    if given.jsonl is not None:
        partial = given.jsonl.with_name(f".{given.jsonl.name}.partial")
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(partial, given.jsonl)
    return 0


def _prompts(path: Path | None, data: DataConfig, tokenizer: Tokenizer) -> PromptSet:
    if path is not None:
        return load_prompts(path, data, tokenizer)
    lines = [line.rstrip("\r\n") for line in sys.stdin]
    rows = [Row(f"standard input, line {i}", None, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError("no prompts on standard input; give lines, or --prompts FILE")
    return tokenise(rows, "standard input", data, tokenizer)


def _answers(
    given: argparse.Namespace, tokenizer: Tokenizer, prompts: Sequence[Prompt]
) -> Iterator[tuple[Prompt, dict[str, list]]]:
    """Every prompt with `response_ids` and `logprobs`, batch by batch."""
    import torch

    from puzzle.engine.generate import Request, generate
    from puzzle.engine.sampling import SamplingParams
    from puzzle.engine.world import World
    from puzzle.model import hf
    from puzzle.model.decoder import Decoder
    from puzzle.model.parallel import TensorGroup
    from puzzle.plan.layout import Coord, Layout

    params = SamplingParams(
        greedy=given.greedy,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        min_new_tokens=given.min_new_tokens,
        max_new_tokens=given.max_new_tokens,
        stop_ids=stop_ids(tokenizer, given.model),
        seed=given.seed,
    )
    device = World.start(given.device).device
    half = given.dtype == "bf16" or (given.dtype == "auto" and device.type == "cuda")
    spec = hf.read_spec(given.model, "lm")
    layout = Layout.even(1, 1, 1, spec.num_layers)
    dtype = torch.bfloat16 if half else torch.float32
    decoder = Decoder(spec, layout, Coord(0, 0, 0), TensorGroup(), dtype, device)
    hf.load(decoder, given.model)
    for start in range(0, len(prompts), given.batch):
        part = prompts[start : start + given.batch]
        requests = [Request(prompt.tokens, prompt.index) for prompt in part]
        for prompt, answer in zip(part, generate(decoder, requests, params), strict=True):
            yield prompt, {"response_ids": answer.tokens, "logprobs": answer.logprobs}
