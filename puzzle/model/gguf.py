"""GGUF files read as Hugging Face models: metadata to a spec, quantised tensors to float32 by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from puzzle.errors import UserError
from puzzle.files.jsonio import Fields
from puzzle.model.gguf_header import check_header
from puzzle.spec.model import ModelSpec

# Mistral models are of the architecture "llama" in GGUF files.
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_CONFIG_KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
NO_TOKEN = (1 << 32) - 1
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class GgufModel:
    """An open GGUF file. UserError if it is not one, or holds a model that the decoder does not compute."""

    def __init__(self, path: Path) -> None:
        self.path = path
        check_header(path)
        try:
            self._reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
            raise UserError(f"{path}: not a readable GGUF file ({error})") from None
        self._tensors = {self._hf_name(tensor.name): tensor for tensor in self._reader.tensors}
        self.architecture = str(self._field("general.architecture"))[:60]
        if self.architecture not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise UserError(f"{path}: architecture {self.architecture!r} is not supported; use {known}")
        if self._field(f"{self.architecture}.rope.scaling.type") not in (None, "none"):
            raise UserError(f"{path}: GGUF files with rope scaling are not supported; use safetensors")
        try:
            self.spec = ModelSpec.from_hf(self.config())
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def config(self) -> dict[str, Any]:
        """`config.json` of the model."""
        config: dict[str, Any] = {"architectures": [_ARCHITECTURES[self.architecture]]}
        for ours, theirs in _CONFIG_KEYS.items():
            value = self._field(f"{self.architecture}.{theirs}")
            if value is not None:
                config[ours] = value
        # The file stores fp32; the decimal number that was meant has six digits.
        eps = Fields(config, "config").number("rms_norm_eps", least=0.0)
        config["rms_norm_eps"] = float(f"{eps:.6g}")
        if "model.embed_tokens.weight" not in self._tensors:
            raise UserError("it has no tensor token_embd.weight")
        config["vocab_size"] = int(self._tensors["model.embed_tokens.weight"].shape[-1])
        config["tie_word_embeddings"] = "lm_head.weight" not in self._tensors
        return config

    def check_tokenizer(self) -> None:
        """UserError if the file holds weights alone."""
        if "tokenizer.ggml.tokens" not in self._reader.fields:
            raise UserError(f"{self.path}: has no tokenizer; take a GGUF file that has one")

    def token_ids(self) -> dict[str, int]:
        """Beginning, end and padding tokens; what the file does not name is padded with the end token."""
        found = {}
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            key = f"tokenizer.ggml.{theirs}_token_id"
            value = self._field(key)
            if value is not None:
                if value == NO_TOKEN:
                    continue
                most = self.spec.vocab_size - 1
                found[f"{ours}_token_id"] = Fields({key: value}, str(self.path)).integer(key, most=most)
        if "eos_token_id" in found:
            found.setdefault("pad_token_id", found["eos_token_id"])
        return found

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, float32 tensor) in the order of the spec; UserError for any not used."""
        unused = sorted(set(self._tensors) - {tensor.name for tensor in self.spec.tensors()})
        if unused:
            name = self._tensors[unused[0]].name
            raise UserError(f"{self.path}: tensor {name} is no part of the model that the header describes")
        for wanted in self.spec.tensors():
            if wanted.name not in self._tensors:
                raise UserError(f"{self.path}: has no tensor for {wanted.name}")
            tensor = self._tensors[wanted.name]
            shape = tuple(int(extent) for extent in reversed(tensor.shape))
            if shape != wanted.shape:
                raise UserError(
                    f"{self.path}: {tensor.name} has shape {shape}, the header's sizes say {wanted.shape}"
                )
            try:
                values = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
            except NotImplementedError:
                kind = tensor.tensor_type.name
                raise UserError(
                    f"{self.path}: {tensor.name} is quantised as {kind}, which is not read"
                ) from None
            if not np.isfinite(values).all():
                raise UserError(f"{self.path}: {tensor.name} holds NaN or infinite numbers")
            values = values.reshape(wanted.shape)
            yield wanted.name, self._unpermuted(wanted.name, torch.from_numpy(values))

    def _unpermuted(self, name: str, values: Tensor) -> Tensor:
        """Query and key rows of "llama" files alternate the two halves of a head; put the halves in order."""
        heads = {"q_proj": self.spec.num_heads, "k_proj": self.spec.num_kv_heads}.get(name.split(".")[-2])
        if heads is None or self.architecture != "llama":
            return values
        pairs = values.view(heads, self.spec.head_dim // 2, 2, *values.shape[1:])
        return pairs.transpose(1, 2).reshape(values.shape)

    def _field(self, key: str) -> Any:
        field = self._reader.fields.get(key)
        try:
            return None if field is None else field.contents()
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: {key} is not UTF-8 text") from None

    def _hf_name(self, name: str) -> str:
        if name in _NAMES:
            return _NAMES[name]
        match = _LAYER.fullmatch(name)
        if match is None or match[2] not in _LAYER_NAMES:
            raise UserError(f"{self.path}: tensor {name} belongs to no model that the decoder computes")
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
