"""Hugging Face `config.json` to and from the fields of `ModelSpec`, in the keys of transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from puzzle.errors import UserError
from puzzle.files.jsonio import Fields, shown

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


# Far above any model, and low enough that plans and tables are made at once. A drawn token's number must be
# exact in float32, hence the vocabulary's.
_MOST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "max_position_embeddings": 1 << 40,
    "sliding_window": 1 << 40,
    "num_labels": 1 << 20,
}


def read_config(config: Mapping[str, Any], head: str | None) -> dict[str, Any]:
    """Fields of `ModelSpec` (`rope` as a dictionary of `Rope`'s fields) from a parsed `config.json`.

    Raises UserError, in one line, for whatever is missing, of another type or size than a model's, or not
    computed by the decoder.
    """
    fields = Fields(config, "config")
    family, declared_head = _family_and_head(fields)
    defaults = _FAMILIES[family]
    act = fields.text("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise UserError(f"config: hidden_act {act!r} is not supported; the decoder computes silu")
    if config.get("quantization_config") is not None:
        raise UserError("config: quantization_config is not supported; give the model's full weights")
    heads = _count(fields, "num_attention_heads")
    hidden = _count(fields, "hidden_size")
    kv_heads = _optional(fields, "num_key_value_heads", defaults.kv_heads) or heads
    values: dict[str, Any] = {
        "family": family,
        "vocab_size": _count(fields, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _count(fields, "intermediate_size"),
        "num_layers": _count(fields, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": _head_dim(fields, defaults.head_dim, hidden, heads),
        "norm_eps": fields.number("rms_norm_eps", 1e-6, least=0.0),
        "max_positions": _count(fields, "max_position_embeddings", defaults.max_positions),
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
        "sliding_window": _window(fields, family),
        "head": head or declared_head,
        "num_labels": _labels(fields) if declared_head == "value" else 1,
        "rope": _rope(fields),
        **_biases(fields, family),
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


def _family_and_head(fields: Fields) -> tuple[str, str]:
    names = fields.texts("architectures", None, nullable=True) or []
    for name in names:
        for family, row in _FAMILIES.items():
            for suffix, head in _SUFFIXES.items():
                if name == row.prefix + suffix:
                    return family, head
    family = fields.text("model_type") if not names else None
    if family in _FAMILIES:
        return family, "lm"
    what = f"architectures {shown(names)}" if names else f"model_type {shown(family)}"
    known = ", ".join(row.prefix for row in _FAMILIES.values())
    raise UserError(
        f"config: {what} is not supported; use {known} as ForCausalLM or ForSequenceClassification"
    )


def _count(fields: Fields, key: str, *default: int) -> int:
    return fields.integer(key, *default, least=1, most=_MOST[key])


def _optional(fields: Fields, key: str, default: int | None) -> int | None:
    return fields.integer(key, default, least=1, most=_MOST[key], nullable=True)


def _head_dim(fields: Fields, default: int | None, hidden: int, heads: int) -> int:
    size = _optional(fields, "head_dim", default)
    if size is None and hidden % heads:
        raise UserError(f"config: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    size = size or hidden // heads
    if size % 2:
        raise UserError(f"config: head_dim is {size}; rotary embeddings need an even one")
    return size


def _labels(fields: Fields) -> int:
    """How many labels a classifier has: of those that are named, else by number, else transformers' two."""
    named = fields.optional_section("id2label")
    return len(list(named)) if named is not None else _count(fields, "num_labels", 2)


def _biases(fields: Fields, family: str) -> dict[str, bool]:
    attention = family in ("llama", "qwen3") and fields.flag("attention_bias", False)
    return {
        "qkv_bias": attention or family == "qwen2",
        "out_bias": attention,
        "mlp_bias": family == "llama" and fields.flag("mlp_bias", False),
        "qk_norm": family == "qwen3",
    }


def _window(fields: Fields, family: str) -> int | None:
    """The one attention window of all layers; refuses models whose layers differ.

    Llama has none, but transformers' cache forgets what lies before a window that its config.json names: it
    generates otherwise than it computes.
    """
    if family == "llama":
        window = _optional(fields, "sliding_window", None)
        if window is not None and window < _count(fields, "max_position_embeddings", 2048):
            fields.refuse("sliding_window", "null in a Llama, which has no window; for one use Mistral")
        return None
    window = _optional(fields, "sliding_window", _FAMILIES[family].window)
    if window is None or family == "mistral":
        return window
    if not fields.flag("use_sliding_window", False):
        return None
    layers = _count(fields, "num_hidden_layers")
    kinds = fields.texts("layer_types", None, nullable=True)
    if kinds is None:
        full = min(fields.integer("max_window_layers", 28), layers)
        kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if len(kinds) != layers or not {*kinds} <= {"full_attention", "sliding_attention"}:
        fields.refuse("layer_types", f"full_attention or sliding_attention for each of {layers} layers")
    if len(set(kinds)) > 1:
        raise UserError("config: layers with and without a sliding window in one model are not supported")
    return window if kinds[0] == "sliding_attention" else None


def _rope(fields: Fields) -> dict[str, Any]:
    """Where both stand, transformers 5 takes `rope_scaling` before `rope_parameters`."""
    scaling = fields.optional_section("rope_scaling")
    if scaling is None or not scaling.values:
        scaling = fields.optional_section("rope_parameters") or Fields({}, "config: rope_parameters")
    if any(isinstance(value, Mapping) for value in scaling.values.values()):
        raise UserError(f"{scaling.place}: rotary embeddings that differ between layers are not supported")
    kind = scaling.text("rope_type", scaling.values.get("type", "default"))
    if kind not in _ROPE_KEYS:
        known = ", ".join(_ROPE_KEYS)
        raise UserError(f"config: rope scaling {shown(kind)} is not supported; the decoder computes {known}")
    for place in (fields, scaling):
        given = place.values.get("partial_rotary_factor")
        if given is not None and place.number("partial_rotary_factor") != 1.0:
            raise UserError("config: partial_rotary_factor other than 1 is not supported")
    source = scaling if "rope_theta" in scaling else fields
    out: dict[str, Any] = {"theta": source.number("rope_theta", 10000.0, above=0.0), "scaling": kind}
    for ours, theirs in _ROPE_KEYS[kind].items():
        if theirs not in scaling:
            raise UserError(f"config: rope scaling {kind!r} lacks {theirs}")
        if ours == "original_max_positions":
            out[ours] = scaling.integer(theirs, least=1, most=_MOST["max_position_embeddings"])
        else:
            out[ours] = scaling.number(theirs, above=0.0)
    if kind == "llama3" and out["low_freq_factor"] >= out["high_freq_factor"]:
        raise UserError(f"{scaling.place}: low_freq_factor must be below high_freq_factor")
    return out


def _rope_config(rope: Rope) -> dict[str, Any]:
    scaling = {"rope_type": rope.scaling}
    scaling |= {theirs: getattr(rope, ours) for ours, theirs in _ROPE_KEYS[rope.scaling].items()}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.scaling == "default" else dict(scaling),
        "rope_parameters": {"rope_theta": rope.theta, **scaling},
    }
