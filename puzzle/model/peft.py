"""Adapters as files that the package peft reads, and adapters added to the weights that they belong to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from puzzle.spec.model import ModelSpec

FOLDER = "adapter"
"""Inside the folder of the merged model."""
PREFIX = "base_model.model."
"""What peft writes before the names of a model's tensors."""


def merged(
    spec: ModelSpec, tensors: Iterable[tuple[str, Tensor]], trained: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `spec.base` with adapters added, out of those of `spec` in its order.

    What is trained goes to `trained` as it is. Sums are made in fp32, and rounded once.
    """
    assert spec.lora is not None, "a model with adapters"
    known = {tensor.name: tensor for tensor in spec.tensors()}
    held: tuple[str, Tensor] | None = None
    low = torch.empty(0)
    for name, values in tensors:
        if known[name].trained:
            trained[name] = values
        if known[name].adapter == "A":
            low = values
        elif known[name].adapter == "B":
            assert held is not None, "A and B follow their matrix"
            total = torch.addmm(held[1].float(), values.float(), low.float(), alpha=spec.lora.scale)
            held = held[0], total.to(held[1].dtype)
        else:
            if held is not None:
                yield held
            held = name, values
    if held is not None:
        yield held


def write(folder: Path, spec: ModelSpec, trained: dict[str, Tensor], base: str | None) -> None:
    """Write the trained tensors of a model whose own weights are those of the folder `base`."""
    folder.mkdir()
    values = {PREFIX + name: tensor.contiguous() for name, tensor in trained.items()}
    save_file(values, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod((folder.parent / "config.json").stat().st_mode)
    (folder / "adapter_config.json").write_text(json.dumps(config(spec, base), indent=2) + "\n")


def config(spec: ModelSpec, base: str | None) -> dict[str, Any]:
    """adapter_config.json; a value head is trained in full, which peft calls a module to save."""
    assert spec.lora is not None, "a model with adapters"
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if spec.head == "lm" else "SEQ_CLS",
        "base_model_name_or_path": base,
        "r": spec.lora.rank,
        "lora_alpha": spec.lora.alpha,
        "target_modules": list(spec.lora.targets),
        "modules_to_save": None if spec.head == "lm" else ["score"],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
