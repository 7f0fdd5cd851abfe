"""Adapters trained by the package peft, a sequence at a time, without the project's engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from puzzle.model.hf import read_spec
from puzzle.model.weights import random_tensor
from puzzle.spec.lora import PROJECTIONS, Lora
from puzzle.spec.model import ModelSpec
from tests.rlhf import supervised_truth as truth

RANK, ALPHA = 3, 7.0
CPU = torch.device("cpu")


def lora(targets: tuple[str, ...] = PROJECTIONS, **more: Any) -> dict[str, Any]:
    """The section of a configuration."""
    return {"rank": RANK, "alpha": ALPHA, "targets": list(targets), **more}


def ours(folder: Path, targets: tuple[str, ...] = PROJECTIONS) -> ModelSpec:
    """The table of such a model."""
    return replace(read_spec(folder), lora=Lora(RANK, ALPHA, targets))


def name_of(theirs: str) -> str:
    """A tensor's name without what peft puts around it."""
    name = theirs.removeprefix("base_model.model.").replace(".default.", ".")
    return name.replace("base_layer.", "").replace("modules_to_save.", "")


@torch.no_grad()
def adapted(folder: Path, seed: int, targets: tuple[str, ...] = PROJECTIONS) -> Any:
    """peft's model, whose A begin as ours of `seed`; of a classifier the head is trained as well."""
    spec = ours(folder, targets)
    config: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(targets)}
    if spec.head == "value":
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    base = truth.causal(folder) if spec.head == "lm" else truth.classifier(folder)
    model = get_peft_model(base, LoraConfig(**config))
    begin = {t.name: random_tensor(t, seed, CPU) for t in spec.tensors() if t.adapter}
    for name, parameter in trained(model).items():
        if name in begin:
            parameter.copy_(begin[name])
    return model


def trained(model: Any) -> dict[str, Any]:
    """What is learned, by our names."""
    return {name_of(name): p for name, p in model.named_parameters() if p.requires_grad}


def learn(
    model: Any, loss: Callable[[Any], Tensor], steps: int, optimizer: dict[str, Any]
) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Losses and gradients of AdamW's steps, which change the model."""
    parameters = trained(model)
    adam = torch.optim.AdamW(
        parameters.values(), optimizer["lr"], (0.9, 0.95), optimizer["eps"], weight_decay=0.0
    )
    losses, grads = [], []
    for _ in range(steps):
        value = loss(model)
        value.backward()
        losses.append(float(value.detach()))
        grads.append({name: p.grad.clone() for name, p in parameters.items()})
        torch.nn.utils.clip_grad_norm_(parameters.values(), optimizer["grad_clip"])
        adam.step()
        adam.zero_grad()
    return losses, grads
