"""Models and batches whose memory is counted."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.runtime.world import World
from puzzle.model.packing import pack
from puzzle.model.weights import initialise
from puzzle.plan.layout import Layout, Placement
from puzzle.spec.lora import Lora
from puzzle.spec.model import ModelSpec
from tests.sizes import SIZES

ROWS, PROMPT, RESPONSE = 4, 24, 24
LENGTH = PROMPT + RESPONSE


def spec_of(**changes: object) -> ModelSpec:
    head, lora = "value" if changes.pop("value", False) else "lm", changes.pop("lora", None)
    spec = ModelSpec.from_hf({"model_type": "llama", **SIZES, **changes}, head)
    return replace(spec, lora=lora) if isinstance(lora, Lora) else spec


def built(
    rank: int, spec: ModelSpec, layout: Layout, dtype: torch.dtype, recompute: bool = False
) -> ModelRuntime:
    world = World(rank, layout.world, torch.device("cpu"))
    model = ModelRuntime("actor", spec, Placement.default(layout), world, dtype, recompute)
    initialise(model.decoder, 0)
    for storage in model.stage.storages:
        model.stage.get_parameter(storage.name).requires_grad_(storage.trained)
    return model


def loss_of(model: ModelRuntime, tokens_T: Tensor, prompt: int = PROMPT):
    """Losses of the answers of ROWS full sequences."""
    rows = len(tokens_T) // LENGTH
    where = torch.cat([torch.arange(r * LENGTH + prompt - 1, (r + 1) * LENGTH - 1) for r in range(rows)])

    def loss_fn(index: int, hidden: Tensor) -> Tensor:
        if model.spec.head == "value":
            return model.decoder.values(hidden)[where].square().sum()
        return -model.decoder.token_stats(hidden, where, tokens_T[where + 1]).logprobs.sum()

    return loss_fn


def batch_of(model: ModelRuntime):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 259, (LENGTH,), generator=generator).tolist() for _ in range(ROWS)]
    return pack(texts, model.placement.layout.tp)
