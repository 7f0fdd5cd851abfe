"""Model folders, tokenizers and GGUF files that others wrote: taken rightly, or refused in one line."""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from puzzle.cli import main
from puzzle.data.tokenizers import byte_tokenizer
from puzzle.model.decoder import Decoder
from puzzle.model.hf import load, read_spec
from puzzle.model.parallel import TensorGroup
from puzzle.plan.layout import Coord, Layout
from tests.model.test_gguf import write_gguf
from tests.reference.tiny import save_lm

DEEP = "[" * 100_000
LONG = "1" + "0" * 5000
SIZE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
NO_SIZES = (0, -1, "64", 64.5, 64.0, True, [64], {"a": 1}, 10**9, 10**15, 10**18)
NO_ROPES: tuple[Any, ...] = (
    *({"rope_theta": value, "rope_parameters": None} for value in (0, -1.0, "10000", True, [])),
    {"rope_theta": None, "rope_parameters": None},
    {"rope_theta": float("nan"), "rope_parameters": None},
    {"rope_theta": float("inf"), "rope_parameters": None},
    {"rope_theta": 10**399, "rope_parameters": None},
    {"rope_parameters": "default"},
    {"rope_parameters": [1]},
    {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
    {"rope_parameters": {"rope_type": ["linear"]}},
    {"rope_parameters": {"rope_type": None}},
    {"rope_parameters": {"rope_type": "linear", "factor": 0}},
    {"rope_parameters": {"rope_type": "linear", "factor": "2"}},
    {"rope_parameters": {"rope_type": "linear", "factor": None}},
    {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}},
    {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
    {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 4.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    {"partial_rotary_factor": 0.5},
    {"partial_rotary_factor": "1"},
)
NO_CONFIGS: list[dict[str, Any]] = [
    *({key: value} for key in SIZE_KEYS for value in NO_SIZES if (key, value) != (SIZE_KEYS[-1], 10**9)),
    *NO_ROPES,
    *({"rms_norm_eps": value} for value in (None, "1e-6", -1e-6, [], True, float("nan"), 10**399)),
    *({"tie_word_embeddings": value} for value in (None, "false", 0, 1, [])),
    *({"attention_bias": value} for value in (None, "true", 1)),
    *({"mlp_bias": value} for value in ("no", {})),
    *({"hidden_act": value} for value in (None, "gelu", ["silu"], 3)),
    *({"architectures": value} for value in ("LlamaForCausalLM", [1], [None], {}, ["GPT2LMHeadModel"])),
    *({"architectures": None, "model_type": value} for value in (None, [], {}, 3, "gpt2")),
    {"hidden_size": 60, "head_dim": None},
    {"head_dim": 7},
    {"sliding_window": 2},
    {"num_key_value_heads": 3},
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, and prompts beside it."""
    folder = tmp_path_factory.mktemp("foreign")
    save_lm(folder / "model", num_hidden_layers=1)
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("one\ntwo\nthree\nfour\n")
    return folder


@pytest.fixture
def model(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to spoil, in the working folder."""
    shutil.copytree(source / "model", tmp_path / "model")
    shutil.copy(source / "prompts.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "model"


def refused(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command says; it must end with code 2 and one line of error."""
    capfd.readouterr()
    assert main(list(words)) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("[transformers]")]
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: "), errors
    return errors[0]


def dry_run(capfd: pytest.CaptureFixture[str], *more: str) -> str:
    words = ["train", "--dry-run", "--batch", "4", "--actor.model", "model", "--data.prompts", "prompts.txt"]
    words += ["--reward.function", "puzzle.rlhf.rewards:letter_share", "--data.max_prompt_tokens", "16"]
    return refused(capfd, *words, *more)


def answer(capfd: pytest.CaptureFixture[str], *more: str) -> str:
    words = ["generate", "model", "--prompts", "prompts.txt", "--max-new-tokens", "2", "--device", "cpu"]
    return refused(capfd, *words, *more)


def edit(file: Path, values: dict[str, Any]) -> None:
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(found | values))


@pytest.mark.parametrize("values", NO_CONFIGS, ids=lambda values: json.dumps(values)[:60])
def test_values_of_config_that_are_none_of_a_model(model: Path, capfd, values: dict[str, Any]) -> None:
    edit(model / "config.json", values)
    said = dry_run(capfd)
    assert "actor.model: model: config" in said
    assert any(key.split("_")[0] in said for key in values)


@pytest.mark.parametrize("key", SIZE_KEYS[:5])
def test_sizes_that_are_missing(model: Path, capfd, key: str) -> None:
    config = json.loads((model / "config.json").read_text())
    del config[key]
    (model / "config.json").write_text(json.dumps(config))
    assert f"config: {key} is missing" in dry_run(capfd)


NO_JSON = {
    "empty": "",
    "cut": '{"vocab_size": 2',
    "list": "[1, 2]",
    "deep": DEEP,
    "deep object": '{"a":' * 50_000,
    "long integer": f'{{"vocab_size": {LONG}}}',
    "text": '"config"',
    "latin-1": b'{"model_type": "\xe9"}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
}
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", NO_JSON)
def test_files_that_are_no_json_objects(model: Path, capfd, file: str, kind: str) -> None:
    content = NO_JSON[kind]
    (model / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert f"model/{file}: " in answer(capfd)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_pipe_is_not_waited_for(model: Path, capfd, file: str) -> None:
    (model / file).unlink(missing_ok=True)
    os.mkfifo(model / file)
    assert file in answer(capfd)


@pytest.mark.parametrize("value", ["256", [256, None], [["256"]], -1, 2.0, True, {"a": 1}, 10**12])
def test_ids_that_end_nothing(model: Path, capfd, value: Any) -> None:
    edit(model / "generation_config.json", {"eos_token_id": value})
    assert "generation_config.json: eos_token_id must be a token id" in answer(capfd)


TOKENIZERS: dict[str, Any] = {
    "no model": {"model": None},
    "model of no type": {"model": {"type": "Nothing", "vocab": {}}},
    "vocabulary of texts": {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}},
    "merges of nothing": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
    "negative id": {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
    "huge id": {"model": {"type": "BPE", "vocab": {"a": 10**15}, "merges": []}},
    "panic at loading": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "panic in use": {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
    "no unknown token": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}},
    "added tokens": {"added_tokens": [{"id": "x", "content": 3}]},
    "added token far away": {"added_tokens": [{"id": 10**15, "content": "<x>", "special": True}]},
    "pre-tokenizer": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "x"}},
    "normalizer": {"normalizer": 3},
    "post-processor": {"post_processor": {"type": "TemplateProcessing", "single": [], "pair": []}},
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_that_the_library_cannot_use(model: Path, capfd, kind: str) -> None:
    edit(model / "tokenizer.json", TOKENIZERS[kind])
    assert "okenizer" in answer(capfd)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] + 1 }}",
        "{{ messages[7].x.y }}",
        "{{ 1 // 0 }}",
        "{% for",
        "{{ raise_exception('no') }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        [{"name": "rag", "template": "x"}],
        [{"template": 3}],
        {"a": 1},
        3,
    ],
)
def test_templates_that_fail(model: Path, capfd, template: Any) -> None:
    (model / "chat_template.jinja").unlink(missing_ok=True)
    edit(model / "tokenizer_config.json", {"chat_template": template})
    answer(capfd)


def test_an_unknown_token_that_the_vocabulary_lacks(model: Path, capfd) -> None:
    edit(model / "tokenizer_config.json", {"unk_token": ""})
    answer(capfd)


def spoil(model: Path, name: str, tensor: torch.Tensor) -> None:
    file = model / "model.safetensors"
    save_file(load_file(file) | {name: tensor}, file)


NORM = "model.norm.weight"
WEIGHTS = {
    "integers": torch.ones(64, dtype=torch.int32),
    "bytes": torch.ones(64, dtype=torch.uint8),
    "8-bit floats": torch.ones(64).to(torch.float8_e4m3fn),
    "complex": torch.ones(64, dtype=torch.complex64),
    "NaN": torch.full((64,), torch.nan),
    "one infinity": torch.tensor([-torch.inf, *[1.0] * 63]),
    "beyond float32": torch.full((64,), 1e300, dtype=torch.float64),
    "short": torch.ones(63),
    "matrix": torch.ones(8, 8),
    "scalar": torch.ones(()),
    "empty": torch.ones(0),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_no_model_can_have(model: Path, capfd, kind: str) -> None:
    spoil(model, NORM, WEIGHTS[kind])
    assert NORM in answer(capfd)


def test_a_tied_head_must_be_the_embedding(model: Path, capfd) -> None:
    edit(model / "config.json", {"tie_word_embeddings": True})
    assert "lm_head.weight differs from the embedding" in answer(capfd)
    spoil(model, "lm_head.weight", torch.ones(9, 64))
    assert "lm_head.weight differs from the embedding" in answer(capfd)
    spoil(
        model, "lm_head.weight", load_file(model / "model.safetensors")["model.embed_tokens.weight"].clone()
    )
    assert main(["generate", "model", "--prompts", "prompts.txt", "--max-new-tokens", "2"]) == 0


def index(model: Path, files: dict[str, list[str] | None], weight_map: dict[str, Any] | None = None) -> None:
    """Tensors by file (None: all), and an index of them; `weight_map` says something else."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    for file, names in files.items():
        save_file({name: tensors[name] for name in (tensors if names is None else names)}, model / file)
    right = {name: file for file, names in files.items() for name in (tensors if names is None else names)}
    entries = {"weight_map": right | (weight_map or {})}
    (model / "model.safetensors.index.json").write_text(json.dumps(entries))


INDEXES: dict[str, tuple[Any, Any, str]] = {
    "outside": ({"a.safetensors": None}, {NORM: "../other.safetensors"}, "file of the same folder"),
    "absolute": ({"a.safetensors": None}, {NORM: "/etc/hostname"}, "file of the same folder"),
    "folder": ({"a.safetensors": None}, {NORM: ".."}, "file of the same folder"),
    "number": ({"a.safetensors": None}, {NORM: 3}, "must be a text"),
    "long name": ({"a.safetensors": None}, {NORM: "a" * 9999}, "file of the same folder"),
    "missing": ({"a.safetensors": None}, {NORM: "b.safetensors"}, "no such file"),
    "twice": ({"a.safetensors": None, "b.safetensors": [NORM]}, None, "both hold"),
    "elsewhere": (
        {"a.safetensors": None, "b.safetensors": ["lm_head.weight"]},
        {"x": "a.safetensors"},
        "both hold",
    ),
    "of nothing": ({"a.safetensors": None}, {"model.more.weight": "a.safetensors"}, "is not in the file"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_that_is_wrong(model: Path, capfd, kind: str) -> None:
    files, weight_map, words = INDEXES[kind]
    index(model, files, weight_map)
    assert words in answer(capfd)


def test_an_index_beside_a_single_file(model: Path, capfd) -> None:
    index(model, {"a.safetensors": None})
    shutil.copy(model / "a.safetensors", model / "model.safetensors")
    assert "remove one of them" in answer(capfd)


def test_a_language_head_beside_a_value_head_is_named(model: Path, capfd) -> None:
    spoil(model, "score.weight", torch.zeros(1, 64))
    spec = read_spec(model, "value")
    decoder = Decoder(spec, Layout.even(1, 1, 1, spec.num_layers), Coord(0, 0, 0), TensorGroup())
    loaded = load(decoder, model)
    assert loaded == ((), ("lm_head.weight",))
    loaded.warn(model)
    assert "lm_head.weight" in capfd.readouterr().err


def field(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def head(fields: bytes = b"", tensors: int = 0, count: int = 1, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, count) + fields


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + data


HEADERS = {
    "empty": b"",
    "magic alone": b"GGUF",
    "version 1": head(version=1),
    "10^9 fields": head(count=10**9),
    "2^64 fields": head(count=2**64 - 1),
    "2^60 tensors": head(tensors=2**60, count=0),
    "array of 2^60": head(field("a", 9, array(4, 2**60))),
    "array of 2^60 texts": head(field("a", 9, array(8, 2**60))),
    "array of arrays": head(field("a", 9, array(9, 1, array(4, 1, b"\0" * 4)))),
    "array of a type": head(field("a", 9, array(77, 1, b"\0" * 4))),
    "text of 2^63": head(field("a", 8, struct.pack("<Q", 2**63))),
    "key of 2^40": head(struct.pack("<Q", 2**40)),
    "type 99": head(field("a", 99, b"\0" * 8)),
    "key not UTF-8": head(struct.pack("<Q", 1) + b"\xff" + struct.pack("<I", 0) + b"\0"),
    "tensor of 9 dimensions": head(struct.pack("<Q1sI", 1, b"a", 9) + b"\1" * 99, tensors=1, count=0),
    "tensor of a type": head(struct.pack("<Q1sIQIQ", 1, b"a", 1, 32, 999, 0), tensors=1, count=0),
    "tensor beyond the end": head(struct.pack("<Q1sIQIQ", 1, b"a", 1, 2**60, 0, 0), tensors=1, count=0),
    "tensor of nothing": head(struct.pack("<Q1sIQIQ", 1, b"a", 1, 0, 0, 0), tensors=1, count=0),
    "no fields": head(count=0),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_gguf_headers_that_are_hostile(tmp_path: Path, capfd, kind: str) -> None:
    (tmp_path / "a.gguf").write_bytes(HEADERS[kind])
    assert "a.gguf: " in refused(capfd, "convert", str(tmp_path / "a.gguf"), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize(
    ("method", "value"),
    [
        ("add_block_count", 10**9),
        ("add_block_count", 0),
        ("add_block_count", 2),
        ("add_head_count", [4, 4]),
        ("add_head_count", 0),
        ("add_key_length", 7),
        ("add_embedding_length", 2**32 - 1),
        ("add_feed_forward_length", 95),
        ("add_layer_norm_rms_eps", float("nan")),
        ("add_rope_freq_base", -1.0),
        ("add_eos_token_id", 10**6),
        ("add_token_list", ["a"]),
        ("add_tokenizer_model", "nothing"),
    ],
)
def test_gguf_values_that_are_none_of_a_model(
    source: Path, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch, method: str, value: Any
) -> None:
    original = getattr(gguf.GGUFWriter, method)
    monkeypatch.setattr(gguf.GGUFWriter, method, lambda writer, _: original(writer, value))
    write_gguf(tmp_path / "a.gguf", source / "model", "llama")
    assert "a.gguf" in refused(capfd, "convert", str(tmp_path / "a.gguf"), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_gguf_weights_that_are_not_finite(source: Path, tmp_path: Path, capfd) -> None:
    path = write_gguf(tmp_path / "a.gguf", source / "model", "llama")
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "output_norm.weight")
    with path.open("r+b") as file:
        file.seek(tensor.data_offset)
        file.write(np.float32(np.nan).tobytes())
    assert "output_norm.weight" in refused(capfd, "convert", str(path), str(tmp_path / "out"))
