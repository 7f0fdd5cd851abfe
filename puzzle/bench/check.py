"""`puzzle bench check`: the engine against transformers on this device, in the layouts its processes allow.

The truth is transformers in float32 on the same device, one unpadded sequence at a time. What a CPU cannot
show is checked too: the packed attention kernel, and that noise is the same on every device.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from puzzle.bench import kernels
from puzzle.bench.models import MODELS, save_random, sentences
from puzzle.bench.texts import mean_loss, microbatches, token_logprobs
from puzzle.cli import Parser, whole
from puzzle.engine.generate.decode_ring import Request, generate
from puzzle.engine.generate.model_runner import ModelRunner
from puzzle.engine.generate.sampling import SamplingParams
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.pipeline.pipeline import Pipeline, PipelineInput
from puzzle.engine.runtime.world import World
from puzzle.engine.train.zero_adamw import AdamWSettings
from puzzle.errors import UserError
from puzzle.files.limits import MOST_PROCESSES
from puzzle.launch import local
from puzzle.model import hf
from puzzle.model.weights import boxes
from puzzle.plan.layout import Layout, Placement

STEPS = 3
NEW_TOKENS = 12
COMPILED = ("llama", "qwen3")
MARGIN = 1e-4
"""Two right implementations may choose different tokens whose logits are closer than this."""


@dataclass(frozen=True)
class Comparison:
    """One comparison: `value` must not exceed `limit`."""

    name: str
    where: str
    value: float
    limit: float
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether it held; NaN never does."""
        return self.value <= self.limit


def run(arguments: Sequence[str]) -> int:
    """Parse the command line and start the processes."""
    parser = Parser("puzzle bench check", description="Compare the engine with transformers on this device.")
    parser.add_argument(
        "--world", type=whole(1, MOST_PROCESSES), default=1, metavar="N", help="processes, one per device"
    )
    parser.add_argument("--models", default=",".join(MODELS), help="of: %(default)s")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    given = parser.parse_args(arguments)
    unknown = set(given.models.split(",")) - set(MODELS)
    if unknown:
        raise UserError(f"--models {unknown.pop()}: there are {', '.join(MODELS)}")
    local.run("puzzle.bench.check:work", (tuple(given.models.split(",")), given.device), given.world)
    return 0


def work(models: tuple[str, ...], device: str) -> None:
    """What every process does; UserError if a comparison failed."""
    failed: list[str] = []
    with World.start(device) as world:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False

        def report(row: Comparison) -> None:
            if not row.ok:
                failed.append(f"{row.name} {row.where}")
            if world.rank == 0:
                mark = "ok  " if row.ok else "FAIL"
                line = f"{mark} {row.name:<34} {row.where:<22} {row.value:10.3g} (at most {row.limit:.3g})"
                print(f"{line} {row.seconds:6.1f} s", flush=True)

        for name, value, limit in kernels.compare(world):
            report(Comparison(name, str(world.device.type), value, limit))
        with tempfile.TemporaryDirectory() as own:
            base = Path(world.share(own))
            for model in models:
                if world.rank == 0:
                    save_random(base / model, model)
                world.share(None)
                _check_model(base / model, model, world, report)
            world.share(None)
    if failed:
        raise UserError(f"bench check: {len(failed)} comparisons failed, the first: {failed[0]}")


def layouts(world: int, layers: int) -> list[Layout]:
    """Layouts of exactly `world` processes: every (tp, pp, dp) with pp up to the number of layers."""
    return [
        Layout.even(tp, pp, world // (tp * pp), layers)
        for tp in range(1, world + 1)
        for pp in range(1, min(world, layers) + 1)
        if world % (tp * pp) == 0
    ]


def _check_model(folder: Path, model: str, world: World, report: Callable[[Comparison], None]) -> None:
    spec = hf.read_spec(folder)
    texts = sentences(spec.vocab_size)
    truth = Truth(folder, texts, world)
    for layout in layouts(world.size, spec.num_layers):
        try:
            layout.check(spec)
        except UserError:
            continue  # more tensor ranks than this model's heads allow
        where = f"{model} {layout.tp},{layout.pp},{layout.dp}"
        for check in (_logprobs, _training, _generation):
            start = time.perf_counter()
            for name, value, limit in check(folder, Placement.default(layout), world, truth):
                largest = world.max(torch.tensor(value, dtype=torch.float64, device=world.device))
                report(Comparison(name, where, float(largest), limit, time.perf_counter() - start))


class Truth:
    """What transformers computes in this process, in float32."""

    def __init__(self, folder: Path, texts: list[list[int]], world: World) -> None:
        self.folder, self.texts, self.device = folder, texts, world.device
        self.total = sum(len(text) - 1 for text in texts)
        self.model = self._load(torch.float32)
        self.logprobs = self._logprobs(self.model)
        half = self._load(torch.bfloat16)
        self.half_error = _mean_gap(self._logprobs(half), self.logprobs)
        del half
        self.answers = [self._greedy(text) for text in texts]
        self.losses, self.norms, self.weights = self._train(self._load(torch.float32))

    def _load(self, dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype).to(self.device).eval()

    @torch.no_grad()
    def _logprobs(self, model: Any) -> list[torch.Tensor]:
        return [self._of(model, text) for text in self.texts]

    def _of(self, model: Any, text: list[int]) -> torch.Tensor:
        ids = torch.tensor(text, device=self.device)
        logits = model(ids[None]).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]

    @torch.no_grad()
    def _greedy(self, prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt], device=self.device)
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        return out[0, len(prompt) :].tolist()

    @torch.no_grad()
    def margin(self, prompt: list[int], answer: list[int], got: list[int]) -> float:
        """How much better the truth's token is where `got` first leaves `answer`; 0 if it never does."""
        for place, (right, other) in enumerate(zip(answer, got, strict=True)):
            if right != other:
                ids = torch.tensor([prompt + answer[:place]], device=self.device)
                logits = self.model(ids).logits[0, -1]
                return float(logits[right] - logits[other])
        return 0.0

    def _train(self, model: Any) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
        adam = torch.optim.AdamW(
            model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.0, fused=True
        )
        losses, norms = [], []
        for _ in range(STEPS):
            loss = -torch.stack([self._of(model, text).sum() for text in self.texts]).sum() / self.total
            adam.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
            losses.append(float(loss.detach()))
            adam.step()
        return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


Found = list[tuple[str, float, float]]
"""(what was compared, the largest difference found, the largest allowed)."""


def _runtime(folder: Path, placement: Placement, world: World, dtype: torch.dtype) -> ModelRuntime:
    runtime = ModelRuntime("model", hf.read_spec(folder), placement, world, dtype)
    hf.load(runtime.decoder, folder)
    return runtime


def _logprobs(folder: Path, placement: Placement, world: World, truth: Truth) -> Found:
    found: Found = []
    for dtype in (torch.float32, torch.bfloat16):
        runtime = _runtime(folder, placement, world, dtype)
        batches = microbatches(runtime, truth.texts, 2)
        for mode in ("eager", "compiled"):
            if mode == "compiled":
                if world.device.type == "cpu" or dtype == torch.float32 or folder.name not in COMPILED:
                    continue  # compiling takes its time; a CPU does it in the tests
                runtime.decoder.compile_layers()
            asked = PipelineInput(runtime, batches, token_logprobs(runtime, batches))
            (found_logprobs,) = Pipeline([runtime]).infer([asked])
            largest = mean = 0.0
            if runtime.decoder.last:
                mine = [truth.logprobs[row] for row in runtime.rows(len(truth.texts))]
                ours = torch.cat(found_logprobs.results)
                largest = float((ours - torch.cat(mine)).abs().max())
                mean = _mean_gap([ours], [torch.cat(mine)])
            if dtype == torch.float32:
                found.append((f"log-probs fp32 {mode}", largest, 1e-4))
            else:
                # A shard's texts are few: its mean may lie above that of all, hence the factor.
                found.append((f"log-probs bf16 {mode}, mean gap", mean, 2 * truth.half_error + 1e-4))
    return found


def _mean_gap(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    return float((torch.cat(list(some)) - torch.cat(list(others))).abs().mean())


def _training(folder: Path, placement: Placement, world: World, truth: Truth) -> Found:
    found: Found = []
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        runtime = _runtime(folder, placement, world, dtype)
        settings = AdamWSettings(lr_at=lambda step: 1e-3, betas=(0.9, 0.95), eps=1e-4, grad_clip=0.5)
        runtime.attach_optimizer(settings)
        optimizer = runtime.optimizer
        assert optimizer is not None
        batches = microbatches(runtime, truth.texts, 2)
        pipeline = Pipeline([runtime])
        loss = PipelineInput(runtime, batches, mean_loss(runtime, batches, truth.total))
        loss_gap = norm_gap = 0.0
        for step in range(STEPS):
            (result,) = pipeline.train([loss])
            own = torch.zeros((), device=world.device)
            if runtime.owns_results:
                own = own + torch.stack(result.results).sum()
            loss_gap = max(loss_gap, abs(float(world.sum(own)) / truth.losses[step] - 1))
            norm_gap = max(norm_gap, abs(optimizer.pop_grad_norms()[-1] / truth.norms[step] - 1))
        name = str(dtype).removeprefix("torch.").replace("float32", "fp32").replace("bfloat16", "bf16")
        found.append((f"{STEPS} steps {name}, losses", loss_gap, limit))
        found.append((f"{STEPS} steps {name}, gradient norms", norm_gap, 5 * limit))
        if dtype == torch.float32:
            gap = 0.0
            for tensor, box, values in boxes(runtime.decoder, runtime.decoder.get_parameter):
                gap = max(gap, float((values - truth.weights[tensor][box.slices]).abs().max()))
            found.append((f"{STEPS} steps {name}, weights", gap, 1e-4))
    return found


def _generation(folder: Path, placement: Placement, world: World, truth: Truth) -> Found:
    runtime = _runtime(folder, placement, world, torch.float32)
    rows = runtime.rows(len(truth.texts))
    requests = [Request(truth.texts[row], row) for row in rows]
    # One token of every other answer: rows leave their micro-batch at different steps.
    stops = tuple({truth.answers[row][row % NEW_TOKENS] for row in range(0, len(truth.texts), 2)})
    found: Found = []
    for mode in ("eager", "graphs"):
        with ModelRunner(runtime.decoder, graphs=mode == "graphs") as passes:
            for ends, stop_ids in (("", ()), (", early ends", stops)):
                params = SamplingParams(greedy=True, max_new_tokens=NEW_TOKENS, stop_ids=stop_ids)
                answers = generate(runtime.decoder, requests, params, runtime.executor, passes=passes)
                margins = [
                    truth.margin(truth.texts[row], _until(truth.answers[row], stop_ids), answer.tokens)
                    for row, answer in zip(rows, answers, strict=True)
                ]
                found.append((f"greedy fp32 {mode}{ends}, margin", max(margins, default=0.0), MARGIN))
    return found


def _until(answer: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    """The answer up to its first stop token."""
    ends = [place + 1 for place, token in enumerate(answer) if token in stop_ids]
    return answer[: min(ends, default=len(answer))]
