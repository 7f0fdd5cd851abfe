import json
from dataclasses import replace

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from puzzle.errors import UserError
from puzzle.spec.flops import forward_flops, layer_attention_flops, matmul_flops, train_flops
from puzzle.spec.lora import Lora
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


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5},
    ],
)
@pytest.mark.parametrize("left_out", ["rope_parameters", "rope_scaling"])
def test_either_version_of_transformers_finds_the_rotation_in_the_keys_that_it_knows(
    keys, left_out, tmp_path
):
    spec = ModelSpec.from_hf({"model_type": "llama", **SMALL, **keys})
    config = spec.to_hf()
    del config[left_out]
    assert ModelSpec.from_hf(config) == spec
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ModelSpec.from_hf(AutoConfig.from_pretrained(tmp_path).to_dict()) == spec


@pytest.mark.parametrize(
    "keys",
    [
        {
            "rope_theta": 3e4,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 2e4},
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4},
        },
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}},
    ],
)
def test_of_two_rotations_the_one_counts_that_transformers_takes(keys):
    theirs = AutoConfig.for_model("llama", **SMALL, **keys).rope_parameters
    rope = ModelSpec.from_hf({"model_type": "llama", **SMALL, **keys}).rope
    assert (rope.theta, rope.scaling, rope.factor) == (
        theirs["rope_theta"],
        theirs["rope_type"],
        theirs["factor"],
    )


@pytest.mark.parametrize(
    "extra",
    [{}, {"use_sliding_window": True, "max_window_layers": 0}, {"num_key_value_heads": None}],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_of_left_out_keys_are_those_of_transformers(family, extra):
    keys = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "max_position_embeddings")}
    keys |= {"num_attention_heads": 64, "hidden_size": 128, **extra}
    if family == "mistral" and "num_key_value_heads" in extra:
        pytest.skip("its configuration class refuses null")
    config = AutoConfig.for_model(family, **keys)
    ours, theirs = ModelSpec.from_hf({"model_type": family} | keys), ModelSpec.from_hf(config.to_dict())
    assert ours == theirs
    assert ours.sliding_window == getattr(config, "sliding_window", None)


@pytest.mark.parametrize("named", [None, 1, 3])
def test_a_classifier_has_the_labels_that_it_names_else_transformers_two(named):
    labels = {} if named is None else {"id2label": {str(i): f"kind {i}" for i in range(named)}}
    config = {"architectures": ["LlamaForSequenceClassification"], **SMALL, **labels}
    spec = ModelSpec.from_hf(config)
    assert spec.num_labels == AutoConfig.for_model("llama", **SMALL, **labels).num_labels == (named or 2)
    assert spec.tensors()[-1].shape == (named or 2, SMALL["hidden_size"])
    written = AutoConfig.for_model(**spec.to_hf())
    assert written.num_labels == spec.num_labels
    assert set(written.id2label or ()) == {*(written.label2id or {}).values()} == {*range(spec.num_labels)}
    assert ModelSpec.from_hf(spec.to_hf()) == spec
    # A value head on a model of another kind scores once, whatever labels its file mentions.
    other = {"architectures": ["LlamaForCausalLM"], **SMALL, **labels}
    assert ModelSpec.from_hf(other, head="value").num_labels == 1
    assert ModelSpec.from_hf({**config, "id2label": None, "num_labels": 5}).num_labels == 5


MOST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 4096,
    "num_attention_heads": 16384,
    "num_key_value_heads": 16384,
    "head_dim": 16384,
    "max_position_embeddings": 2**40,
    "sliding_window": 2**40,
    "num_labels": 2**20,
}


@pytest.mark.parametrize("key", MOST)
def test_sizes_are_at_least_one_and_not_absurd(key):
    base = {"architectures": ["MistralForSequenceClassification"], **SMALL, "head_dim": 8}
    base |= {"num_attention_heads": 16384, "num_key_value_heads": 1, "sliding_window": 4}
    ModelSpec.from_hf(base | {key: MOST[key]})
    for wrong in (0, MOST[key] + 1):
        with pytest.raises(UserError, match=f"config: {key} must be a whole number from 1 to {MOST[key]}"):
            ModelSpec.from_hf(base | {key: wrong})
    llama3 = LLAMA3 | {"original_max_position_embeddings": 2**40}
    assert ModelSpec.from_hf(base | {"rope_scaling": llama3}).rope.original_max_positions == 2**40


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
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ between layers"),
        ({"rope_theta": 0.0}, "rope_theta must be"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "factor must be"),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0}},
            "whole number from 1 to 1099511",
        ),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 2**40 + 1}},
            "from 1 to 1099511627776",
        ),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor must be below"),
        ({"head_dim": 7}, "head_dim is 7; rotary embeddings need an even one"),
        ({"hidden_size": 26}, "hidden_size 26 is not a multiple of num_attention_heads 4"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps must be"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is not supported"),
    ],
)
def test_refused(change, words):
    with pytest.raises(UserError, match=words) as caught:
        ModelSpec.from_hf({"architectures": ["LlamaForCausalLM"], **SMALL} | change)
    assert "\n" not in str(caught.value)


def test_what_says_nothing_new_is_no_obstacle():
    plain = {"architectures": ["LlamaForCausalLM"], **SMALL}
    rope = {"rope_type": "default", "partial_rotary_factor": 1.0}
    more = {"hidden_act": "swish", "quantization_config": None, "rope_parameters": rope} | rope
    assert ModelSpec.from_hf(plain | more) == ModelSpec.from_hf(plain)
    assert ModelSpec.from_hf(plain | {"rms_norm_eps": 0.0}).norm_eps == 0.0
    assert ModelSpec.from_hf(plain | {"hidden_size": 26, "head_dim": 6}).head_dim == 6
    small = {"rope_theta": 0.5, "rope_scaling": {"type": "linear", "factor": 0.5}}
    assert ModelSpec.from_hf(plain | small).rope == Rope(0.5, "linear", 0.5)
    # The first architecture that is known says the family and the head.
    odd = plain | {"architectures": ["Other", "Qwen3ForSequenceClassification"]}
    assert (ModelSpec.from_hf(odd).family, ModelSpec.from_hf(odd).head) == ("qwen3", "value")


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_windows_of_layers_are_those_that_transformers_gives_them(family):
    """All layers alike: their window, or None. Layers of both kinds are refused."""
    full, sliding = "full_attention", "sliding_attention"
    cases = [
        {"sliding_window": None, "max_window_layers": 1},
        *({"sliding_window": 8, "max_window_layers": n} for n in (0, 1, 3, 9)),
        *({"sliding_window": 8, "num_hidden_layers": n} for n in (28, 29)),
        *({"sliding_window": 8, "layer_types": kinds} for kinds in ([sliding] * 3, [full] * 3)),
        {"sliding_window": 8, "layer_types": [full, sliding, full]},
    ]
    for case in cases:
        keys = SMALL | {"use_sliding_window": True} | case
        kinds = set(AutoConfig.for_model(family, **keys).layer_types)
        if len(kinds) > 1:
            with pytest.raises(UserError, match="with and without a sliding window"):
                ModelSpec.from_hf({"model_type": family, **keys})
            continue
        window = ModelSpec.from_hf({"model_type": family, **keys}).sliding_window
        assert window == (8 if kinds == {sliding} else None), case
    for kinds in ([full] * 2, [sliding] * 4, ["chunked_attention"] * 3, [full, full, "linear_attention"]):
        with pytest.raises(UserError, match=r"layer_types must be .* each of 3 layers"):
            ModelSpec.from_hf(
                {"model_type": family, **SMALL, "use_sliding_window": True, "layer_types": kinds}
            )


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
    assert (spec.num_kv_heads, spec.norm_eps, spec.max_positions) == (spec.num_heads, 1e-5, 2048)
    assert not spec.tied
    assert spec.rope == Rope(10000.0)
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
    # Backwards, attention's products have two gradients, frozen weights none.
    adapted = replace(spec, lora=Lora(2, 1.0))
    assert train_flops(adapted, [9]) == 2 * 9 * matmul_flops(spec) + 3 * 3 * per_layer
    assert adapted.parameters - adapted.trained_parameters == adapted.base.parameters == spec.parameters
