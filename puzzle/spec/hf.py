"""Hugging Face `config.json` to and from the fields of `ModelSpec`, in the keys of transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from puzzle.errors import UserError

if TYPE_CHECKING:
    from puzzle.spec.model import ModelSpec, Rope


class _Family(NamedTuple):
    """What a family's configuration class means where a file leaves a key out."""

    prefix: str  # of the architecture names
    kv_heads: int | None  # None: as many as query heads
    max_positions: int
    head_dim: int | None  # None: hidden size / heads
    window: int | None  # sliding window in tokens


_FAMILIES = {
    "llama": _Family("Llama", None, 2048, None, None),
    "mistral": _Family("Mistral", 8, 4096 * 32, None, 4096),
    "qwen2": _Family("Qwen2", 32, 32768, None, 4096),
    "qwen3": _Family("Qwen3", 32, 32768, 128, 4096),
}
_SUFFIXES = {"ForCausalLM": "lm", "ForSequenceClassification": "value"}
_ROPE_KEYS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_positions": "original_max_position_embeddings",
    },
    "default": {},
}


def read_config(config: Mapping[str, Any], head: str | None) -> dict[str, Any]:
    """Fields of `ModelSpec` (`rope` as a dictionary of `Rope`'s fields) from a parsed `config.json`.

    Raises UserError, in one line, for whatever is missing or not computed by the decoder.
    """
    family, declared_head = _family_and_head(config)
    defaults = _FAMILIES[family]
    act = config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise UserError(f"config: hidden_act {act!r} is not supported; the decoder computes silu")
    heads = _count(config, "num_attention_heads")
    hidden = _count(config, "hidden_size")
    kv_heads = config.get("num_key_value_heads", defaults.kv_heads) or heads
    values: dict[str, Any] = {
        "family": family,
        "vocab_size": _count(config, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _count(config, "intermediate_size"),
        "num_layers": _count(config, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": config.get("head_dim", defaults.head_dim) or hidden // heads,
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "max_positions": config.get("max_position_embeddings", defaults.max_positions),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "sliding_window": _window(config, family),
        "head": head or declared_head,
        "num_labels": _labels(config) if declared_head == "value" else 1,
        "rope": _rope(config),
        **_biases(config, family),
    }
    if heads % kv_heads:
        raise UserError(
            f"config: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    return values


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """A `config.json` that transformers 4 and 5 load; without a dtype, which belongs to the weights."""
    suffix = next(name for name, head in _SUFFIXES.items() if head == spec.head)
    config: dict[str, Any] = {
        "architectures": [_FAMILIES[spec.family].prefix + suffix],
        "model_type": spec.family,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps,
        "max_position_embeddings": spec.max_positions,
        "tie_word_embeddings": spec.tie_embeddings,
        **_rope_config(spec.rope),
    }
    if spec.head == "value":
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(spec.num_labels)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(spec.num_labels)}
    if spec.family in ("llama", "qwen3"):
        config["attention_bias"] = spec.qkv_bias
    if spec.family == "llama":
        config["mlp_bias"] = spec.mlp_bias
    if spec.family != "llama":
        config["sliding_window"] = spec.sliding_window
    if spec.family in ("qwen2", "qwen3"):
        config["use_sliding_window"] = spec.sliding_window is not None
        config["max_window_layers"] = spec.num_layers if spec.sliding_window is None else 0
    return config


def _family_and_head(config: Mapping[str, Any]) -> tuple[str, str]:
    names = config.get("architectures") or []
    for name in names:
        for family, row in _FAMILIES.items():
            for suffix, head in _SUFFIXES.items():
                if name == row.prefix + suffix:
                    return family, head
    family = config.get("model_type")
    if not names and family in _FAMILIES:
        return str(family), "lm"
    what = ", ".join(names) or f"model_type {family!r}"
    known = ", ".join(row.prefix for row in _FAMILIES.values())
    raise UserError(
        f"config: {what} is not supported; use {known} as ForCausalLM or ForSequenceClassification"
    )


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise UserError(f"config: {key} must be a positive integer, found {value!r}")
    return value


def _labels(config: Mapping[str, Any]) -> int:
    if "id2label" in config:
        return len(config["id2label"])
    return int(config.get("num_labels", 2))


def _biases(config: Mapping[str, Any], family: str) -> dict[str, bool]:
    attention = bool(config.get("attention_bias", False)) and family in ("llama", "qwen3")
    return {
        "qkv_bias": attention or family == "qwen2",
        "out_bias": attention,
        "mlp_bias": bool(config.get("mlp_bias", False)) and family == "llama",
        "qk_norm": family == "qwen3",
    }


def _window(config: Mapping[str, Any], family: str) -> int | None:
    """The one attention window of all layers; refuses models whose layers differ."""
    window = config.get("sliding_window", _FAMILIES[family].window)
    if family == "llama" or window is None:
        return None
    if family == "mistral":
        return int(window)
    if not config.get("use_sliding_window", False):
        return None
    layers = _count(config, "num_hidden_layers")
    full = min(int(config.get("max_window_layers", 28)), layers)
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if len(set(kinds)) > 1:
        raise UserError("config: layers with and without a sliding window in one model are not supported")
    return int(window) if kinds[0] == "sliding_attention" else None


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    scaling: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _ROPE_KEYS:
        known = ", ".join(_ROPE_KEYS)
        raise UserError(f"config: rope scaling {kind!r} is not supported; the decoder computes {known}")
    if scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError("config: partial_rotary_factor other than 1 is not supported")
    out: dict[str, Any] = {"theta": float(scaling.get("rope_theta", config.get("rope_theta", 10000.0)))}
    out["scaling"] = kind
    for ours, theirs in _ROPE_KEYS[kind].items():
        if theirs not in scaling:
            raise UserError(f"config: rope scaling {kind!r} lacks {theirs}")
        out[ours] = int(scaling[theirs]) if ours == "original_max_positions" else float(scaling[theirs])
    return out


def _rope_config(rope: Rope) -> dict[str, Any]:
    scaling = {"rope_type": rope.scaling}
    scaling |= {theirs: getattr(rope, ours) for ours, theirs in _ROPE_KEYS[rope.scaling].items()}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.scaling == "default" else dict(scaling),
        "rope_parameters": {"rope_theta": rope.theta, **scaling},
    }
