"""`ModelSpec`: the shape of one decoder-only model, read from and written to a Hugging Face config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from puzzle.spec.hf import read_config, write_config
from puzzle.spec.lora import Lora, adapted
from puzzle.spec.tensors import Split, TensorSpec, VocabSplit

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
Head = Literal["lm", "value"]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base `theta` and how frequencies are scaled for long contexts."""

    theta: float = 10000.0
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class ModelSpec:
    """Everything that determines a model's tensors and arithmetic; nothing about devices or dtypes.

    With `lora`, adapters and a value head are what is trained.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-5
    rope: Rope = field(default_factory=Rope)
    max_positions: int = 2048
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    head: Head = "lm"
    num_labels: int = 1
    lora: Lora | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], head: Head | None = None) -> ModelSpec:
        """Read a Hugging Face `config.json`; `head` overrides what its `architectures` say.

        Raises UserError for missing keys and for families, activations, rope scalings or attention windows
        that the decoder does not compute.
        """
        values = read_config(config, head)
        values["rope"] = Rope(**values["rope"])
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """A `config.json` dictionary that transformers loads; old and new key names where they differ."""
        return write_config(self)

    @property
    def base(self) -> ModelSpec:
        """The model without adapters."""
        return replace(self, lora=None)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding: a value head never is."""
        return self.tie_embeddings and self.head == "lm"

    @property
    def ffn_blocks(self) -> int:
        """Number of equal blocks of ffn rows; tensor parallelism cuts between blocks."""
        return math.gcd(self.num_heads, self.intermediate_size)

    @property
    def head_tensor(self) -> str:
        """Name of the logical tensor that the head multiplies by."""
        if self.head == "value":
            return "score.weight"
        return "model.embed_tokens.weight" if self.tie_embeddings else "lm_head.weight"

    def tensors(self) -> tuple[TensorSpec, ...]:
        """Every logical tensor, in the order of the forward pass."""
        return self._tensors

    @property
    def parameters(self) -> int:
        """Number of parameters; a tied embedding counts once."""
        return sum(tensor.size for tensor in self._tensors)

    @property
    def trained_parameters(self) -> int:
        """Number of parameters that are learned where the model is trained."""
        return sum(tensor.size for tensor in self._tensors if tensor.trained)

    @cached_property
    def _tensors(self) -> tuple[TensorSpec, ...]:
        v, d, whole = self.vocab_size, self.hidden_size, self.lora is None
        place = "tied" if self.tied else "embed"
        out = [TensorSpec("model.embed_tokens.weight", (v, d), place, VocabSplit(), whole)]
        for layer in range(self.num_layers):
            tensors = self._layer_tensors(layer)
            out += tensors if self.lora is None else adapted(tensors, self.lora)
        out.append(TensorSpec("model.norm.weight", (d,), "head", None, whole))
        if self.head == "value":
            out.append(TensorSpec("score.weight", (self.num_labels, d), "head", None))
        elif not self.tied:
            out.append(TensorSpec("lm_head.weight", (v, d), "head", VocabSplit(), whole))
        return tuple(out)

    def _layer_tensors(self, layer: int) -> list[TensorSpec]:
        d, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        heads, kv_heads, blocks = self.num_heads, self.num_kv_heads, self.ffn_blocks
        rows: list[tuple[str, tuple[int, ...], Split | None]] = [("input_layernorm.weight", (d,), None)]
        for name, size, units in (("q", q, heads), ("k", kv, kv_heads), ("v", kv, kv_heads)):
            rows.append((f"self_attn.{name}_proj.weight", (size, d), Split(0, units)))
            if self.qkv_bias:
                rows.append((f"self_attn.{name}_proj.bias", (size,), Split(0, units)))
        if self.qk_norm:
            rows.append(("self_attn.q_norm.weight", (self.head_dim,), None))
            rows.append(("self_attn.k_norm.weight", (self.head_dim,), None))
        rows.append(("self_attn.o_proj.weight", (d, q), Split(1, heads)))
        if self.out_bias:
            rows.append(("self_attn.o_proj.bias", (d,), None))
        rows.append(("post_attention_layernorm.weight", (d,), None))
        for name in ("gate", "up"):
            rows.append((f"mlp.{name}_proj.weight", (f, d), Split(0, blocks)))
            if self.mlp_bias:
                rows.append((f"mlp.{name}_proj.bias", (f,), Split(0, blocks)))
        rows.append(("mlp.down_proj.weight", (d, f), Split(1, blocks)))
        if self.mlp_bias:
            rows.append(("mlp.down_proj.bias", (d,), None))
        return [
            TensorSpec(f"model.layers.{layer}.{name}", shape, layer, split) for name, shape, split in rows
        ]
