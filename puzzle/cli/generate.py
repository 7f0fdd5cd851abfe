"""`puzzle generate`: responses of a model folder to prompts from a file or from standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puzzle.cli import Parser, filled, named, new_file, real, whole
from puzzle.config.sections import DataConfig
from puzzle.config.sources import folder_spec
from puzzle.data import hub
from puzzle.data.endings import endings
from puzzle.data.prompts import Prompt, PromptRow, PromptSet, load_prompts, tokenise
from puzzle.data.records import decoded, lines
from puzzle.data.tokenizers import TextStream, Tokenizer, load_tokenizer, response_text
from puzzle.errors import UserError
from puzzle.files import durable
from puzzle.files.limits import LARGEST, MOST_PROCESSES, MOST_SEED, MOST_SEQUENCES, MOST_TOKENS
from puzzle.launch import local
from puzzle.plan.layout import Layout, Placement

if TYPE_CHECKING:
    from puzzle.engine.generate.requests import Response
    from puzzle.engine.pipeline.model import ModelRuntime

Answers = list[tuple[int, "list[Response]"]]
"""Where a replica's share of the prompts begins, and its responses."""


@dataclass(frozen=True)
class GenerateJob:
    """What every process is given."""

    model: Path
    prompts: tuple[Prompt, ...]
    jsonl: Path | None
    stop: tuple[str, ...]
    sampling: dict[str, Any]
    layout: tuple[int, int, int]
    batch: int
    device: str
    dtype: str


def parser() -> Parser:
    """The command's arguments."""
    made = Parser(prog="puzzle generate", description="Answer prompts with a model folder.")
    made.add_argument("model", type=named, help="Hugging Face model folder, or ORG/NAME on the Hub")
    made.add_argument(
        "--prompts", type=named, help=".jsonl, .json, .parquet, .txt or dataset folder; else stdin lines"
    )
    made.add_argument("--field", type=filled, default="prompt", help="name of the prompt's field")
    made.add_argument("--plain", action="store_true", help="no chat template, even if there is one")
    made.add_argument("--jsonl", type=new_file, metavar="FILE", help="a line per prompt, in order")
    made.add_argument("--greedy", action="store_true")
    made.add_argument("--temperature", type=real(0, LARGEST), default=1.0)
    made.add_argument("--top-k", type=whole(0), default=0, help="0: no limit")
    made.add_argument("--top-p", type=real(0, 1), default=1.0)
    made.add_argument("--min-new-tokens", type=whole(0, MOST_TOKENS), default=0)
    made.add_argument("--max-new-tokens", type=whole(1, MOST_TOKENS), default=128)
    made.add_argument(
        "--stop", action="append", type=filled, default=[], metavar="TEXT", help="ends a response; repeatable"
    )
    made.add_argument("--seed", type=whole(0, MOST_SEED), default=0)
    made.add_argument(
        "--batch", type=whole(1, MOST_SEQUENCES), default=32, help="prompts at a time, of all replicas"
    )
    for name, meaning in (("tp", "tensor-parallel ranks"), ("pp", "pipeline stages"), ("dp", "replicas")):
        made.add_argument(
            f"--layout.{name}", type=whole(1, MOST_PROCESSES), default=1, dest=name, metavar="N", help=meaning
        )
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on cuda")
    return made


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    given = parser().parse_args(arguments)
    given.model = _local("model", given.model, "model")
    if given.prompts is not None:
        given.prompts = _local("--prompts", given.prompts, "dataset")
    # Before the tokenizer: transformers reads config.json too, and says less of what is wrong with it.
    spec = folder_spec("model", given.model, "lm")
    layout = Layout.even(given.tp, given.pp, given.dp, spec.num_layers)
    layout.check(spec)  # before any process starts
    tokenizer = load_tokenizer(str(given.model))
    data = DataConfig(
        field=given.field,
        chat_template=bool(tokenizer.chat_template) and not given.plain,
        max_prompt_tokens=MOST_TOKENS,  # the model's positions are the limit
    )
    names = ("greedy", "temperature", "top_k", "top_p", "min_new_tokens", "max_new_tokens", "seed")
    sampling = {name: getattr(given, name) for name in names}
    job = GenerateJob(
        given.model,
        _prompts(given.prompts, data, tokenizer).prompts,
        given.jsonl,
        tuple(given.stop),
        sampling | {"stop_ids": endings(tokenizer, given.model, given.stop).stop_ids},
        (given.tp, given.pp, given.dp),
        given.batch,
        given.device,
        given.dtype,
    )
    local.run("puzzle.cli.generate:work", (job,), layout.world)
    return 0


def _local(key: str, path: Path, kind: hub.Kind) -> Path:
    """A folder or file of this machine, fetched where it is a name on the Hub."""
    name = hub.Name.of(str(path), kind)
    return path if name is None else Path(hub.fetch(key, name, kind)[0])


def _prompts(path: Path | None, data: DataConfig, tokenizer: Tokenizer) -> PromptSet:
    if path is not None:
        return load_prompts(path, data, tokenizer)
    source = "standard input"
    if sys.stdin is None:
        raise UserError("standard input is closed; give --prompts FILE")
    # Read as files are, whatever the terminal's encoding.
    rows = [
        PromptRow(f"{source}:{i}", None, line) for i, line in lines(decoded(sys.stdin.buffer.read(), source))
    ]
    if not rows:
        raise UserError("no prompts on standard input; give lines, or --prompts FILE")
    return tokenise(rows, source, data, tokenizer)


def work(job: GenerateJob) -> None:
    """What every process does; rank 0 prints, and writes the file once all is there."""
    from puzzle.engine.generate.decode_ring import generate
    from puzzle.engine.generate.model_runner import ModelRunner
    from puzzle.engine.generate.requests import Request, check_room
    from puzzle.engine.generate.sampling import SamplingParams
    from puzzle.engine.runtime.world import World

    params = SamplingParams(**job.sampling)
    tokenizer = load_tokenizer(str(job.model))
    rule = endings(tokenizer, job.model, job.stop).rule
    with World.start(job.device) as world:
        runtime = _load(job, world)
        requests = [Request(prompt.tokens, prompt.index) for prompt in job.prompts]
        check_room(requests, params.max_new_tokens, runtime.spec.max_positions)
        terminal = Terminal(tokenizer, job) if world.rank == 0 else None
        with ModelRunner(runtime.decoder) as passes:
            rows = runtime.rows(len(requests))
            answers = generate(
                runtime.decoder,
                [requests[row] for row in rows],
                params,
                runtime.executor,
                passes=passes,
                most=-(-job.batch // job.layout[2]),
                stop=rule,
                watch=terminal.watch if terminal is not None and len(requests) == 1 else None,
            )
        found = world.gather((rows.start, answers) if runtime.owns_results else None)
        if terminal is not None:
            terminal.show([own for own in found if own is not None])
            terminal.write()


def _load(job: GenerateJob, world: Any) -> ModelRuntime:
    import torch

    from puzzle.engine.pipeline.model import ModelRuntime
    from puzzle.model import hf

    spec = hf.read_spec(job.model, "lm")
    largest = max(max(prompt.tokens) for prompt in job.prompts)
    if largest >= spec.vocab_size:
        raise UserError(
            f"{job.model}: its tokenizer gives token {largest}, its vocabulary has {spec.vocab_size}"
        )
    half = job.dtype == "bf16" or (job.dtype == "auto" and world.device.type == "cuda")
    placement = Placement.default(Layout.even(*job.layout, spec.num_layers))
    dtype = torch.bfloat16 if half else torch.float32
    hf.check_weights(job.model, spec)  # before memory is taken for what config.json alone says
    runtime = ModelRuntime("model", spec, placement, world, dtype)
    loaded = hf.load(runtime.decoder, job.model)
    if world.rank == 0:
        loaded.warn(job.model)
    runtime.freeze()
    return runtime


class Terminal:
    """Prints responses, a single one while it comes, and keeps the lines of the file."""

    def __init__(self, tokenizer: Tokenizer, job: GenerateJob) -> None:
        self.tokenizer, self.job = tokenizer, job
        self._lines: list[str] = []
        self._stream = TextStream(tokenizer, job.prompts[0].tokens)
        self._text, self._shown, self._started = "", 0, False
        # What may yet turn out to begin a stop text is held back.
        self._held = max(map(len, job.stop), default=1) - 1

    def watch(self, _request: int, token: int) -> None:
        """One more token of the only response."""
        if not self._started:
            self._say(self.job.prompts[0].text + "\n> ")
            self._started = True
        new = self._stream.add(token)[0]
        self._text += new if self._text else new.removeprefix(self.job.prompts[0].lead)
        stops = [at for at in (self._text.find(stop) for stop in self.job.stop) if at >= 0]
        certain = max(self._shown, min([len(self._text) - self._held, *stops]))
        self._say(self._text[self._shown : certain])
        self._shown = certain

    def show(self, answers: Answers) -> None:
        """The responses to all prompts."""
        rows = [answer for _, part in sorted(answers, key=lambda own: own[0]) for answer in part]
        for prompt, answer in zip(self.job.prompts, rows, strict=True):
            text = response_text(self.tokenizer, answer.tokens, self.job.stop, prompt.tokens, prompt.lead)
            line = {"prompt": prompt.text, "response": text, "response_ids": answer.tokens}
            self._lines.append(json.dumps(line | {"logprobs": answer.logprobs}, ensure_ascii=False))
            said = text[self._shown :] if self._started else f"{prompt.text}\n> {text}"
            self._say(f"{said}\n\n")

    def write(self) -> None:
        """The file, whole or not at all."""
        if self.job.jsonl is None:
            return
        durable.write_text(self.job.jsonl, "\n".join(self._lines) + "\n")

    @staticmethod
    def _say(text: str) -> None:
        print(text, end="", flush=True)
