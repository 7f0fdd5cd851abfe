"""The LLaMA-shaped models of the published experiments."""

from __future__ import annotations

from puzzle.errors import UserError
from puzzle.spec.model import ModelSpec


def _llama(layers: int, hidden: int, ffn: int, heads: int) -> ModelSpec:
    return ModelSpec(
        family="llama",
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
    )


PUBLISHED = {
    "350m": _llama(16, 512, 11008, 16),
    "7b": _llama(32, 4096, 11008, 32),
    "13b": _llama(40, 5120, 13824, 40),
    "33b": _llama(64, 6656, 17920, 64),
}


def published(name: str) -> ModelSpec:
    """The model of a published size, such as `7b` or `7B`; UserError if there is none of that name."""
    try:
        return PUBLISHED[name.lower()]
    except KeyError:
        raise UserError(f"no published model size {name!r}; use one of {', '.join(PUBLISHED)}") from None
