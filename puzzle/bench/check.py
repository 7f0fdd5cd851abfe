"""`puzzle bench check`: the engine against transformers on this device, in the layouts its processes allow.

The truth is transformers in float32 on the same device, one unpadded sequence at a time. What a CPU cannot
show is checked too: the packed attention kernel, and that noise is the same on every device.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from puzzle.bench import device, kernels
from puzzle.bench.harness import SHARED, Bench, Row, Sizes, option
from puzzle.bench.texts import mean_loss, microbatches, token_logprobs
from puzzle.cli import whole
from puzzle.engine.generate.decode_ring import generate
from puzzle.engine.generate.model_runner import ModelRunner, Room
from puzzle.engine.generate.peers import share_sums
from puzzle.engine.generate.requests import Request
from puzzle.engine.generate.sampling import SamplingParams
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.pipeline.pipeline import Pipeline, PipelineInput
from puzzle.engine.runtime.world import World
from puzzle.engine.train.zero_adamw import AdamWSettings
from puzzle.errors import UserError
from puzzle.files.limits import MOST_PROCESSES
from puzzle.model import hf
from puzzle.model.weights import boxes
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.pages import whole_pages

STEPS = 3
NEW_TOKENS = 12
PAGE = 16
"""Positions of a page of the cache, so that answers have several."""
COMPILED = ("llama", "qwen3")
MARGIN = 1e-4
"""Two right implementations may choose different tokens whose logits are closer than this."""
ADAM: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-4}
HALF, FULL = torch.bfloat16, torch.float32
TINY: dict[str, Any] = {"vocab_size": 259, "hidden_size": 128, "intermediate_size": 192}
TINY |= {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
TINY |= {"max_position_embeddings": 256, "tie_word_embeddings": False}
MID = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816, "num_key_value_heads": 8}
MID |= {"tie_word_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **TINY},
    "mistral": {"model_type": "mistral", **TINY, "sliding_window": 9},
    "qwen2": {"model_type": "qwen2", **TINY, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **TINY, "head_dim": 32},
    "mid": {"model_type": "llama", **TINY, **MID, "max_position_embeddings": 1024},
}


@dataclass(frozen=True, kw_only=True)
class CheckBench(Bench):
    """Compare the engine with transformers on this device."""

    world: Annotated[int, option(type=whole(1, MOST_PROCESSES), help="processes, one per device")] = 1
    models: Annotated[str, option(help="of: %(default)s")] = ",".join(MODELS)
    share_device: Annotated[bool, option(help=SHARED)] = False

    def check(self) -> None:
        if unknown := set(self.models.split(",")) - set(MODELS):
            raise UserError(f"--models {unknown.pop()}: there are {', '.join(MODELS)}")

    def layouts(self) -> Sequence[Sizes]:
        return ((1, 1, self.world),)

    def join(self) -> World:
        return World.start(self.device, timeout=self.timeout, share_device=self.share_device)

    def measure(self, world: World) -> Iterator[Row | str]:
        """UserError in the end if a comparison failed."""
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        failed = []
        for row in self._rows(world):
            if isinstance(row, dict) and not row["ok"]:
                failed.append(f"{row['what']} {row['place']}")
            yield row
        if failed:
            raise UserError(f"bench check: {len(failed)} comparisons failed, the first: {failed[0]}")

    def _rows(self, world: World) -> Iterator[Row | str]:
        yield kernels.signature()
        for what, value, limit in kernels.compare(world.device):
            yield compared(what, world.device.type, value, limit)
        with tempfile.TemporaryDirectory() as own:
            base = Path(world.share(own))
            for model in self.models.split(","):
                if world.rank == 0:
                    save_random(base / model, model)
                world.share(None)
                yield from _check_model(base / model, model, world)
            world.share(None)

    def line(self, row: Row) -> str:
        line = f"{'ok  ' if row['ok'] else 'FAIL'} {row['what']:<34} {row['place']:<22}"
        return f"{line} {row['value']:10.3g} (at most {row['limit']:.3g}) {row['seconds']:6.1f} s"


def compared(what: str, place: str, value: float, limit: float, seconds: float = 0.0) -> Row:
    """One comparison: `value` must not exceed `limit`; NaN always does."""
    row = {"what": what, "place": place, "value": value, "limit": limit}
    return row | {"ok": value <= limit, "seconds": seconds}


@torch.no_grad()
def save_random(folder: Path, model: str) -> None:
    """A Hugging Face folder of random weights, large enough, with norms and biases uneven, so that every
    parameter matters."""
    config = AutoConfig.for_model(**MODELS[model], dtype="float32")
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    made = AutoModelForCausalLM.from_config(config, dtype=FULL)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in made.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(draw / config.hidden_size**0.5)
        else:
            parameter.copy_((0.0 if name.endswith(".bias") else 1.0) + 0.1 * draw)
    made.save_pretrained(folder)


def sentences(vocab: int) -> list[list[int]]:
    """Ragged random texts."""
    generator = torch.Generator().manual_seed(6)
    lengths = (17, 40, 5, 23, 64, 9, 31)
    return [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lengths]


def layouts(world: int, layers: int) -> list[Layout]:
    """Layouts of exactly `world` processes: every (tp, pp, dp) with pp up to the number of layers."""
    return [
        Layout.even(tp, pp, world // (tp * pp), layers)
        for tp in range(1, world + 1)
        for pp in range(1, min(world, layers) + 1)
        if world % (tp * pp) == 0
    ]


def _check_model(folder: Path, model: str, world: World) -> Iterator[Row]:
    spec = hf.read_spec(folder)
    truth = Truth(folder, sentences(spec.vocab_size), world)
    for layout in layouts(world.size, spec.num_layers):
        try:
            layout.check(spec)
        except UserError:
            continue  # more tensor ranks than this model's heads allow
        place = f"{model} {layout.tp},{layout.pp},{layout.dp}"
        for check in (_logprobs, _training, _generation):
            start = time.perf_counter()
            # All of a kind before any is reported: reports talk to the other ranks.
            for what, value, limit in list(check(folder, Placement.default(layout), world, truth)):
                largest = device.most(world, value)
                yield compared(what, place, largest, limit, time.perf_counter() - start)


class Truth:
    """What transformers computes in this process, in float32."""

    def __init__(self, folder: Path, texts: list[list[int]], world: World) -> None:
        self.folder, self.texts, self.device = folder, texts, world.device
        self.total = sum(len(text) - 1 for text in texts)
        self.model = self._load(FULL)
        self.logprobs = self._logprobs(self.model)
        half = self._load(HALF)
        self.half_error = _mean_gap(self._logprobs(half), self.logprobs)
        del half
        self.answers = [self._greedy(text) for text in texts]
        self.losses, self.norms, self.weights = self._train(self._load(FULL))

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
        adam = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True, **ADAM)
        losses, norms = [], []
        for _ in range(STEPS):
            loss = -torch.stack([self._of(model, text).sum() for text in self.texts]).sum() / self.total
            adam.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
            losses.append(float(loss.detach()))
            adam.step()
        return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


Found = Iterator[tuple[str, float, float]]
"""(what was compared, the largest difference found, the largest allowed)."""


def _runtime(folder: Path, placement: Placement, world: World, dtype: torch.dtype) -> ModelRuntime:
    runtime = ModelRuntime("model", hf.read_spec(folder), placement, world, dtype)
    hf.load(runtime.decoder, folder)
    return runtime


def _logprobs(folder: Path, placement: Placement, world: World, truth: Truth) -> Found:
    for dtype in (FULL, HALF):
        runtime = _runtime(folder, placement, world, dtype)
        batches = microbatches(runtime, truth.texts, 2)
        for mode in ("eager", "compiled"):
            if mode == "compiled":
                if world.device.type == "cpu" or dtype == FULL or folder.name not in COMPILED:
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
            if dtype == FULL:
                yield f"log-probs fp32 {mode}", largest, 1e-4
            else:
                # A shard's texts are few: its mean may lie above that of all, hence the factor.
                yield f"log-probs bf16 {mode}, mean gap", mean, 2 * truth.half_error + 1e-4


def _mean_gap(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    return float((torch.cat(list(some)) - torch.cat(list(others))).abs().mean())


def _training(folder: Path, placement: Placement, world: World, truth: Truth) -> Found:
    for dtype, limit in ((FULL, 1e-4), (HALF, 2e-2)):
        runtime = _runtime(folder, placement, world, dtype)
        runtime.attach_optimizer(AdamWSettings(lr_at=lambda step: 1e-3, grad_clip=0.5, **ADAM))
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
        name = "fp32" if dtype == FULL else "bf16"
        yield f"{STEPS} steps {name}, losses", loss_gap, limit
        yield f"{STEPS} steps {name}, gradient norms", norm_gap, 5 * limit
        if dtype == FULL:
            gap = 0.0
            for tensor, box, values in boxes(runtime.decoder, runtime.decoder.get_parameter):
                gap = max(gap, float((values - truth.weights[tensor][box.slices]).abs().max()))
            yield f"{STEPS} steps {name}, weights", gap, 1e-4


def _generation(folder: Path, placement: Placement, world: World, truth: Truth) -> Found:
    runtime = _runtime(folder, placement, world, FULL)
    rows = runtime.rows(len(truth.texts))
    requests = [Request(truth.texts[row], row) for row in rows]
    samples = [Request(truth.texts[row], row, sample) for row in rows for sample in range(3)]
    pages = whole_pages(max(map(len, truth.texts)), NEW_TOKENS, PAGE)
    # One token of every other answer: rows leave their micro-batch at different steps.
    stops = tuple({truth.answers[row][row % NEW_TOKENS] for row in range(0, len(truth.texts), 2)})
    for mode in ("eager", "graphs", "peer sums"):
        if mode == "peer sums" and (share_sums(runtime, "auto") is not None or runtime.tensor.sums is None):
            continue
        with ModelRunner(runtime.decoder, graphs=mode != "eager", page=PAGE) as passes:
            if mode == "graphs" and not passes.graphs:
                continue
            for ends, asked, stop_ids, told in (
                ("", requests, (), {}),
                (", early ends", requests, stops, {}),
                (", a queue", requests, stops, {"most": 2}),
                (", few pages", requests, (), {"pages": 1 + pages}),
                (", prompts in parts", requests, (), {"prefill_tokens": 7}),
                (", samples", samples, stops, {"most": 5}),
            ):
                params = SamplingParams(greedy=True, max_new_tokens=NEW_TOKENS, stop_ids=stop_ids)
                how: dict[str, Any] = {"passes": passes, **told}
                answers = generate(runtime.decoder, asked, params, runtime.executor, **how)
                margins = [
                    truth.margin(
                        truth.texts[one.prompt_id],
                        _until(truth.answers[one.prompt_id], stop_ids),
                        answer.tokens,
                    )
                    for one, answer in zip(asked, answers, strict=True)
                ]
                yield f"greedy fp32 {mode}{ends}, margin", max(margins, default=0.0), MARGIN
    runtime.tensor.sums = None
    yield from _graphs_that_live(runtime, requests, truth)


def _graphs_that_live(runtime: ModelRuntime, requests: Sequence[Request], truth: Truth) -> Found:
    """A run's iterations: graphs go on while what they read stays, though weights change there, and are
    recorded anew after it has moved."""
    params = SamplingParams(greedy=True, max_new_tokens=NEW_TOKENS)
    pages = sum(whole_pages(len(request.prompt), NEW_TOKENS, PAGE) for request in requests)
    room = Room(len(requests), whole_pages(max(map(len, truth.texts)), NEW_TOKENS, PAGE), max(1, pages))
    rows = runtime.rows(len(truth.texts))
    with ModelRunner(runtime.decoder, page=PAGE, room=room) as passes:
        recorded, before = [], []
        for number, change in enumerate(("recorded", "again", "other weights", "moved", "again")):
            if change == "other weights":
                for weight in runtime.decoder.parameters():
                    weight.data.mul_(0.5)
            if change == "moved":
                for weight in runtime.decoder.parameters():
                    weight.data = 2 * weight.data
            answers = generate(runtime.decoder, requests, params, runtime.executor, passes=passes)
            passes.rest()
            recorded.append(passes.captures)
            if change == "other weights":  # nobody knows what they answer, but it is not the same
                same = any(a.logprobs == b.logprobs for a, b in zip(answers, before, strict=True))
                yield "graphs that live, log-probs of other weights are the old ones", float(same), 0.5
                continue
            before, told = answers, zip(rows, answers, strict=True)
            margins = [
                truth.margin(truth.texts[row], truth.answers[row], answer.tokens) for row, answer in told
            ]
            yield f"graphs that live, {number} {change}, margin", max(margins, default=0.0), MARGIN
        again = recorded[2] - recorded[0] + recorded[4] - recorded[3]
        yield "graphs that live, recorded again without need", float(again), 0.5
        if passes.graphs and requests:
            yield "graphs that live, not recorded after a move", float(recorded[3] == recorded[2]), 0.5


def _until(answer: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    """The answer up to its first stop token."""
    ends = [place + 1 for place, token in enumerate(answer) if token in stop_ids]
    return answer[: min(ends, default=len(answer))]
