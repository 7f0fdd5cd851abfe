import json
from dataclasses import replace

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from puzzle.errors import UserError
from puzzle.spec.flops import forward_flops, layer_attention_flops, matmul_flops, train_flops
from puzzle.spec.model import ModelSpec, Rope
from puzzle.spec.published import PUBLISHED, published

SMALL = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
VARIANTS = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"head_dim": 10, "rms_norm_eps": 1e-5}),
    ("mistral", {"sliding_window": 16}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 8, "attention_bias": True}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
]


def hf_model(config, head):
    return (AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification).from_config(config)


@pytest.mark.parametrize(("family", "extra"), VARIANTS)
@pytest.mark.parametrize("head", ["lm", "value"])
def test_tensors_are_those_of_transformers(family, extra, head):
    config = AutoConfig.for_model(family, num_labels=1, **(SMALL | extra))
    model = hf_model(config, head)
    config.architectures = [type(model).__name__]
    spec = ModelSpec.from_hf(config.to_dict())
    assert (spec.family, spec.head, spec.num_labels) == (family, head, 1)
    theirs = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert {t.name: t.shape for t in spec.tensors()} == theirs
    assert spec.parameters == sum(value.numel() for value in model.parameters())
    assert ("lm_head.weight" in theirs) == (head == "lm" and not spec.tied)


@pytest.mark.parametrize(("family", "extra"), VARIANTS)
@pytest.mark.parametrize("head", ["lm", "value"])
def test_to_hf_is_loaded_by_transformers_and_read_back(family, extra, head, tmp_path):
    spec = ModelSpec.from_hf({"model_type": family, **SMALL, **extra}, head=head)
    (tmp_path / "config.json").write_text(json.dumps(spec.to_hf()))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == [
        FAMILIES[family] + {"lm": "ForCausalLM"}.get(head, "ForSequenceClassification")
    ]
    assert config.num_labels == (1 if head == "value" else 2)
    assert ModelSpec.from_hf(config.to_dict()) == spec
    assert ModelSpec.from_hf(spec.to_hf()) == spec
    names = {name for name, _ in hf_model(config, head).named_parameters()}
    assert names == {t.name for t in spec.tensors()}
    # What transformers computes, and no key that its class of this family does not have.
    assert getattr(config, "sliding_window", None) == spec.sliding_window
    if family.startswith("qwen"):
        windowed = spec.sliding_window is not None
        assert set(config.layer_types) == {"sliding_attention" if windowed else "full_attention"}
        assert spec.to_hf()["max_window_layers"] == (0 if windowed else spec.num_layers)
    known = {*AutoConfig.for_model(family).to_dict(), "rope_theta", "rope_scaling", "head_dim"}
    assert spec.to_hf().keys() <= known


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({}, Rope(10000.0)),
        ({"rope_theta": 5e5, "rope_scaling": None}, Rope(5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, Rope(1e6)),
        ({"rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 2.0}}, Rope(2e4, "linear", 2.0)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, Rope(5e5, "llama3", 8.0, 1.0, 4.0, 32)),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, Rope(5e5, "llama3", 8.0, 1.0, 4.0, 32)),
    ],
)
def test_rope_in_old_and_new_keys(keys, rope, tmp_path):
    spec = ModelSpec.from_hf({"architectures": ["LlamaForCausalLM"], **SMALL, **keys})
    assert spec.rope == rope
    assert type(spec.rope.original_max_positions) is int
    assert all(type(x) is float for x in (spec.rope.theta, spec.rope.factor, spec.rope.low_freq_factor))
    (tmp_path / "config.json").write_text(json.dumps(spec.to_hf()))
    theirs = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert (theirs["rope_type"], theirs["rope_theta"]) == (rope.scaling, rope.theta)
    assert ModelSpec.from_hf({"model_type": "llama", **SMALL, "rope_parameters": theirs}).rope == rope


def test_defaults_of_left_out_keys_are_those_of_transformers():
    keys = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "max_position_embeddings")}
    keys |= {"num_attention_heads": 64, "hidden_size": 128}
    for family in FAMILIES:
        config = AutoConfig.for_model(family, **keys)
        ours, theirs = ModelSpec.from_hf({"model_type": family} | keys), ModelSpec.from_hf(config.to_dict())
        assert ours == theirs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"architectures \['GPT2LMHeadModel'\] is not supported"),
        ({"architectures": [], "model_type": "opt"}, "'opt' is not supported"),
        ({"hidden_size": None}, "hidden_size must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number from 1 to"),
        ({"vocab_size": "many"}, "vocab_size must be a whole number from 1 to 16777216, found 'many'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "lacks low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is not supported"),
    ],
)
def test_refused(change, words):
    with pytest.raises(UserError, match=words) as caught:
        ModelSpec.from_hf({"architectures": ["LlamaForCausalLM"], **SMALL} | change)
    assert "\n" not in str(caught.value)


def test_sliding_windows():
    base = {"model_type": "qwen2", **SMALL, "sliding_window": 8}
    assert ModelSpec.from_hf(base).sliding_window is None
    whole = ModelSpec.from_hf(base | {"use_sliding_window": True, "max_window_layers": 0})
    assert whole.sliding_window == 8
    assert (
        ModelSpec.from_hf(base | {"use_sliding_window": True, "max_window_layers": 9}).sliding_window is None
    )
    with pytest.raises(UserError, match="with and without a sliding window"):
        ModelSpec.from_hf(base | {"use_sliding_window": True, "max_window_layers": 1})


def test_head_can_be_forced():
    spec = ModelSpec.from_hf({"model_type": "qwen2", **SMALL, "tie_word_embeddings": True}, head="value")
    assert (spec.head, spec.num_labels, spec.tied) == ("value", 1, False)
    assert spec.tensors()[-1].shape == (1, 24)
    assert spec.tensors()[0].place == "embed"
    assert replace(spec, head="lm").tensors()[0].place == "tied"


@pytest.mark.parametrize(
    ("name", "lm", "value"),
    [("350M", 0.320, 0.304), ("7B", 6.738, 6.607), ("13B", 13.016, 12.852), ("33B", 34.669, 34.456)],
)
def test_published_sizes(name, lm, value):
    spec = published(name)
    assert round(spec.parameters / 1e9, 3) == lm
    assert round(replace(spec, head="value").parameters / 1e9, 3) == value
    assert spec.head_dim * spec.num_heads == spec.hidden_size
    with pytest.raises(UserError, match="350m, 7b, 13b, 33b"):
        published("8b")
    assert len(PUBLISHED) == 4


@pytest.mark.parametrize("window", [None, 5])
def test_flops_count_every_product(window):
    """Against a count of the multiply-adds that a loop over tokens and tensors would do."""
    spec = replace(ModelSpec.from_hf({"model_type": "qwen3", **SMALL, "head_dim": 8}), sliding_window=window)
    matrices = [t for t in spec.tensors() if len(t.shape) == 2 and "embed" not in t.name]
    assert matmul_flops(spec) == 2 * sum(t.size for t in matrices)
    seen = sum(1 for i in range(9) for j in range(i + 1) if window is None or i - j < window)
    per_layer = 2 * 2 * spec.num_heads * spec.head_dim * seen
    assert layer_attention_flops(spec, 9) == per_layer
    assert forward_flops(spec, [9, 9]) == 2 * (9 * matmul_flops(spec) + 3 * per_layer)
    assert train_flops(spec, [9]) * 2 == 3 * forward_flops(spec, [9, 9])
