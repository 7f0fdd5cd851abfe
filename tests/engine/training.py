"""Language-model training steps on real ranks, to compare with transformers: run by `test_training`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.pipeline.pipeline import Pipeline, PipelineInput
from puzzle.engine.runtime.world import World
from puzzle.engine.train.zero_adamw import AdamWSettings
from puzzle.errors import UserError
from puzzle.model import hf
from puzzle.model.packing import pack
from puzzle.model.weights import boxes, initialise
from puzzle.plan.layout import Layout, Placement
from puzzle.spec.model import ModelSpec

Texts = list[list[int]]


def overflowing(rank: int, layout: Layout) -> tuple[list[bool], list[float], str]:
    """Whether each of three steps, the second with a loss of NaN, changed any weight; the norm of the first;
    what reading the norms says."""
    world = World(rank, layout.world, torch.device("cpu"))
    sizes = {"model_type": "llama", "vocab_size": 61, "hidden_size": 16, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    runtime = ModelRuntime("actor", ModelSpec.from_hf(sizes), Placement.default(layout), world)
    initialise(runtime.decoder, 0)
    runtime.attach_optimizer(AdamWSettings(lambda step: 1e-2, grad_clip=0.5))
    batch, optimizer = pack([[1, 2, 3, 4]], layout.tp), runtime.optimizer
    assert optimizer is not None
    changed: list[bool] = []
    first: list[float] = []
    for factor in (1.0, float("nan"), 1.0):

        def loss_fn(index: int, hidden: Tensor, factor: float = factor) -> Tensor:
            places = torch.arange(3)
            return -factor * runtime.decoder.token_stats(hidden, places, places + 2).logprobs.sum()

        before = [p.detach().clone() for p in runtime.decoder.parameters()]
        Pipeline([runtime]).train([PipelineInput(runtime, [batch], loss_fn)])
        first = first or optimizer.pop_grad_norms()
        changed.append(
            any(not torch.equal(*p) for p in zip(before, runtime.decoder.parameters(), strict=True))
        )
    try:
        optimizer.pop_grad_norms()
    except UserError as error:
        return changed, first, str(error)
    return changed, first, ""


def run(
    rank: int, folder: str, layout: Layout, texts: Texts, per_pass: int, steps: int, bucket: int, value: bool
) -> dict:
    """Weights after `steps` steps as (name, box, values), and what the first step measured."""
    world = World(rank, layout.world, torch.device("cpu"))
    path = Path(folder)
    runtime = ModelRuntime("actor", hf.read_spec(path), Placement.default(layout), world)
    hf.load(runtime.decoder, path)
    runtime.attach_optimizer(
        AdamWSettings(lr_at=lambda step: 1e-3, betas=(0.9, 0.95), eps=1e-4, grad_clip=0.5), bucket
    )
    rows = list(runtime.rows(len(texts)))
    total = sum(len(t) - 1 for t in texts)
    parts = [rows[i : i + per_pass] for i in range(0, len(rows), per_pass)]
    batches = [pack([texts[r] for r in part], layout.tp) for part in parts]

    def loss_fn(index: int, hidden: Tensor) -> Tensor:
        places, targets, start = [], [], 0
        for r in parts[index]:
            places += range(start, start + len(texts[r]) - 1)
            targets += texts[r][1:]
            start += len(texts[r])
        where = torch.tensor(places)
        if value:
            return (runtime.decoder.values(hidden)[where] - 1.0).square().sum() / total
        stats = runtime.decoder.token_stats(hidden, where, torch.tensor(targets))
        return -stats.logprobs.sum() / total

    optimizer = runtime.optimizer
    assert optimizer is not None
    pipeline = Pipeline([runtime])
    norms, losses = [], []
    for _ in range(steps):
        (result,) = pipeline.train([PipelineInput(runtime, batches, loss_fn)])
        own = torch.stack(result.results).sum() if runtime.owns_results else torch.zeros(())
        losses.append(float(world.sum(own.clone())))
        norms += optimizer.pop_grad_norms()
    found = [
        (name, box.intervals, values.clone())
        for name, box, values in boxes(runtime.decoder, runtime.decoder.get_parameter)
    ]
    size = sum(p.nbytes for p in runtime.decoder.parameters())
    return {"weights": found, "norms": norms, "losses": losses, "bytes": size, "moved": dict(world.moved)}
