"""Tiny random models of every supported family, as Hugging Face folders.

Weights are larger than usual and norms and biases are not constant, so that every parameter
matters and argmaxes are seldom near ties.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tests.sizes import SIZES

FAMILIES: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
DEFAULTS: dict[str, Any] = {
    **SIZES,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def tiny_config(family: str = "llama", **overrides: Any) -> PreTrainedConfig:
    """Configuration of a tiny model; `overrides` are keys of `config.json`."""
    sizes = {**DEFAULTS, **overrides}
    if family == "qwen3" and "head_dim" not in sizes:
        sizes["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
    return FAMILIES[family](dtype="float32", **sizes)


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int) -> None:
    """Redraw every parameter: matrices N(0, 1.2 / sqrt(hidden)), norm weights 1 + N(0, 0.1), biases N(0,
    0.1).
    """
    generator = torch.Generator().manual_seed(seed)
    scale = 1.2 / model.config.hidden_size**0.5
    for name, parameter in model.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            parameter.copy_(scale * draw)
        else:
            parameter.copy_((0.0 if name.endswith(".bias") else 1.0) + 0.1 * draw)


def save_lm(folder: Path, family: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    """A causal language model; gives `folder` back."""
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=torch.float32)
    randomise(model, seed)
    model.save_pretrained(folder)
    return folder


def save_value(folder: Path, family: str = "llama", seed: int = 1, **overrides: Any) -> Path:
    """A value or reward model: a sequence classifier with one label, whose head is `score.weight` (1,
    hidden).
    """
    config = tiny_config(family, **overrides)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    randomise(model, seed)
    model.save_pretrained(folder)
    return folder
