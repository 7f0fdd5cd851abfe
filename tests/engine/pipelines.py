"""Actor and critic trained, and asked, apart and as one stream on real ranks: run by `test_fusion`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from puzzle.engine.pipeline.model import ModelRuntime, share
from puzzle.engine.pipeline.pipeline import Pipeline, PipelineInput, PipelineOutput
from puzzle.engine.runtime.world import World
from puzzle.engine.train.zero_adamw import AdamWSettings
from puzzle.errors import UserError
from puzzle.model.packing import pack
from puzzle.model.weights import initialise
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.pipeline.actions import Schedule
from puzzle.plan.pipeline.schedules import Order
from puzzle.spec.model import Head, ModelSpec

STEPS = 3
CLIP = 0.05
"""Of the actor; the critic's gradients are not clipped."""
Shape = tuple
"""(tp, pp, dp) or (tp, pp, dp, layers per stage)."""


@dataclass(frozen=True)
class Case:
    """`rows` texts in passes of `per_pass`. Hidden sizes and layer counts differ between the models. `split`:
    run also apart, but with split backwards; the stream has them, too."""

    actor: Shape
    critic: Shape
    rows: int = 6
    per_pass: tuple[int, int] = (1, 1)
    order: Order = "sequential"
    tied: bool = False
    split: bool = False
    defer: int = 1


def layout(shape: Shape, layers: int) -> Layout:
    tp, pp, dp, *stages = shape
    return Layout(tp, pp, dp, stages[0]) if stages else Layout.even(tp, pp, dp, layers)


def spec(head: Head, hidden: int, layers: int, tied: bool) -> ModelSpec:
    sizes = {
        "model_type": "llama",
        "vocab_size": 61,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
    }
    return ModelSpec.from_hf(sizes, head)


def texts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(2, 14, (count,), generator=generator).tolist()
    return [torch.randint(0, 61, (n,), generator=generator).tolist() for n in lengths]


def models(world: World, case: Case) -> list[ModelRuntime]:
    made = []
    for name, head, hidden, shape, seed in (
        ("actor", "lm", 32, case.actor, 1),
        ("critic", "value", 16, case.critic, 2),
    ):
        layers = sum(shape[3]) if len(shape) > 3 else max(shape[1], 4 if head == "lm" else 3)
        tied = case.tied and head == "lm"
        placement = Placement.default(layout(shape, layers))
        runtime = ModelRuntime(name, spec(head, hidden, layers, tied), placement, world)
        initialise(runtime.decoder, seed)
        clip = CLIP if head == "lm" else None
        runtime.attach_optimizer(AdamWSettings(lambda step: 1e-3, eps=1e-4, grad_clip=clip), bucket=5_000)
        made.append(runtime)
    return made


def work(runtime: ModelRuntime, rows: list[list[int]], per_pass: int) -> PipelineInput:
    """A language model's loss, or a value model's, as sums over the tokens of all rows."""
    total = sum(len(r) - 1 for r in rows)
    sizes = [
        len(share(len(rows), runtime.placement.layout.dp, d)) for d in range(runtime.placement.layout.dp)
    ]
    own = [rows[i] for i in runtime.rows(len(rows))]
    parts = [own[i : i + per_pass] for i in range(0, len(own), per_pass)]

    def loss_fn(index: int, hidden: Tensor) -> Tensor:
        places, targets, start = [], [], 0
        for row in parts[index]:
            places += range(start, start + len(row) - 1)
            targets += row[1:]
            start += len(row)
        where = torch.tensor(places)
        if runtime.name == "critic":
            return (runtime.decoder.values(hidden)[where] - 1.0).square().sum() / total
        return -runtime.decoder.token_stats(hidden, where, torch.tensor(targets)).logprobs.sum() / total

    batches = [pack(part, runtime.placement.layout.tp) for part in parts]
    return PipelineInput(runtime, batches, loss_fn, -(-max(sizes) // per_pass))


def digest(tensors: Sequence[Tensor]) -> str:
    found = hashlib.sha256()
    for x in tensors:
        found.update(x.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def weights(runtime: ModelRuntime) -> str:
    return digest(list(runtime.decoder.parameters()))


def about(schedules: Sequence[Schedule | None]) -> list[tuple[int, str, int]]:
    """Flushes, hashes, and how many backwards are split."""
    return [(s.flushes, s.hash, s.counts().get("backward_weight", 0)) for s in schedules if s is not None]


def steps(world: World, case: Case, fused: bool, split: bool = False) -> dict[str, Any]:
    made = models(world, case)
    for runtime in made:
        runtime.split_backward = split
    rows = texts(case.rows)
    inputs = [work(runtime, rows, size) for runtime, size in zip(made, case.per_pass, strict=True)]
    pipelines = [Pipeline(made)] if fused else [Pipeline([model]) for model in made]
    start = {runtime.name: weights(runtime) for runtime in made}

    def infer() -> list[PipelineOutput]:
        if fused:
            return pipelines[0].infer(inputs, case.order)
        return [pipeline.infer([i])[0] for pipeline, i in zip(pipelines, inputs, strict=True)]

    def train() -> list[PipelineOutput]:
        if fused:
            return pipelines[0].train(inputs, case.order, case.defer)
        return [pipeline.train([i])[0] for pipeline, i in zip(pipelines, inputs, strict=True)]

    trained: list[PipelineOutput] = []
    norms, losses = [], []
    for _ in range(STEPS):
        trained = train()
        losses.append([digest(stage.results) for stage in trained])
        norms.append([n for r in made if r.optimizer is not None for n in r.optimizer.pop_grad_norms()])
        for runtime in made:
            assert runtime.optimizer is not None
            runtime.optimizer.release()
    asked = infer()
    return {
        "start": start,
        "weights": {runtime.name: weights(runtime) for runtime in made},
        "norms": norms,
        "losses": losses,
        "results": [digest(stage.results) for stage in asked],
        "trained": about(list(dict.fromkeys(stage.schedule for stage in trained))),
        "asked": about(list(dict.fromkeys(stage.schedule for stage in asked))),
    }


def run(rank: int, world_size: int, cases: Sequence[Case]) -> list[tuple[dict[str, Any], ...]]:
    """Per case what training apart, as one stream and, if it says so, apart with split backwards gave."""
    world = World(rank, world_size, torch.device("cpu"))
    return [
        (
            steps(world, case, fused=False),
            steps(world, case, fused=True, split=case.split),
            *([steps(world, case, fused=False, split=True)] if case.split else []),
        )
        for case in cases
    ]


def few(rank: int, world_size: int, case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """What the models answer apart and in one pipeline, where replicas may have no text at all. All ranks
    have made as many groups then, so that torch calls the next one by the same name everywhere."""
    world = World(rank, world_size, torch.device("cpu"))
    made = models(world, case)
    inputs = [work(m, texts(case.rows), size) for m, size in zip(made, case.per_pass, strict=True)]
    apart = [result for i in inputs for result in Pipeline([i.model]).infer([i])[0].results]
    fused = [result for output in Pipeline(made).infer(inputs) for result in output.results]
    total = torch.ones(1)
    dist.all_reduce(total, group=world.groups([tuple(range(world_size))], "afterwards"))
    assert total == world_size
    return apart, fused


def refusal(rank: int, case: Case) -> str:
    world = World(rank, 4, torch.device("cpu"))
    made = models(world, case)
    try:
        Pipeline(made)
    except UserError as error:
        return str(error)
    return ""
