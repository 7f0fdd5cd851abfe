"""Random models for `puzzle bench check`, as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

_TINY: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
_MID: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, _TINY),
    "mistral": (MistralConfig, _TINY | {"sliding_window": 9}),
    "qwen2": (Qwen2Config, _TINY | {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, _TINY | {"head_dim": 32}),
    "mid": (LlamaConfig, _MID),
}


@torch.no_grad()
def save_random(folder: Path, model: str) -> None:
    """Weights are large enough, and norms and biases uneven, so that every parameter matters."""
    kind, sizes = MODELS[model]
    config = kind(dtype="float32", bos_token_id=None, eos_token_id=None, pad_token_id=None, **sizes)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
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
