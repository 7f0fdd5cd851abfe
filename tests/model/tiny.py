"""Tiny models for decoder tests: Hugging Face folders, our stages, and gradients put back together."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle.model.decoder import Decoder
from puzzle.model.hf import load, read_spec
from puzzle.model.parallel import TensorGroup
from puzzle.model.weights import boxes
from puzzle.plan.layout import Coord, Layout
from puzzle.plan.shards import Box
from tests.reference.tiny import save_lm, save_value

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": ("llama", {"rope_parameters": LINEAR}),
    "llama-wide-heads": ("llama", {"head_dim": 20}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}),
    "qwen3": ("qwen3", {"head_dim": 24}),
}
# The proportions of SmolLM2: tensor parallelism goes in threes.
THIRDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-thirds": (
        "llama",
        {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    )
}
LENGTHS = (7, 20, 1, 11)


def save_variant(folder: Path, variant: str, value: bool = False) -> Path:
    """A tiny model of a variant as a Hugging Face folder."""
    family, overrides = (VARIANTS | THIRDS)[variant]
    return (save_value if value else save_lm)(folder, family, **overrides)


def sequences(vocab: int = 259) -> list[torch.Tensor]:
    """Ragged random token sequences."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, vocab, (n,), generator=generator) for n in LENGTHS]


def stage(
    folder: Path, tp: int = 1, pp: int = 1, coord: Coord | None = None, group=None, ranks=(), **options
):
    """A loaded stage of the model in a folder; `ranks` by tensor rank, if not ascending."""
    spec = read_spec(folder)
    layout = Layout.even(tp, pp, 1, spec.num_layers)
    decoder = Decoder(spec, layout, coord or Coord(0, 0, 0), TensorGroup(group, ranks), **options)
    load(decoder, folder)
    return decoder


def gradient(parameter: torch.Tensor) -> torch.Tensor:
    """Its gradient; zero where no loss reached it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@contextmanager
def saved_elements():
    """Collects the sizes of the tensors that autograd keeps for the backward pass."""
    sizes: list[int] = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


def gradient_boxes(decoder: Decoder) -> list:
    """(name, slices, gradient) of every piece of a stage."""
    found = boxes(decoder, lambda name: gradient(decoder.get_parameter(name)))
    return [(name, box.slices, values.clone()) for name, box, values in found]


def summed(parts: list, shapes: dict) -> dict:
    """Logical gradients: what all holders of a box have, added up."""
    whole = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name, slices, values in parts:
        whole[name][slices] += values
    return whole


def logical_tensors(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor) of a model that lies in one process, in the order of the spec."""
    parts: dict[str, list[tuple[Box, Tensor]]] = {}
    for name, box, values in boxes(decoder, decoder.get_parameter):
        parts.setdefault(name, []).append((box, values))
    for tensor in decoder.spec.tensors():
        whole = torch.empty(tensor.shape, dtype=decoder.dtype)
        for box, values in parts[tensor.name]:
            whole[box.slices] = values
        yield tensor.name, whole
