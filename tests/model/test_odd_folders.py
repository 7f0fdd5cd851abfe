"""Model folders whose files say more than a model, or numbers that are none; how many files are written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from puzzle.errors import UserError
from puzzle.model.decoder import Decoder
from puzzle.model.hf import Loaded, check_weights, load, read_spec, save
from puzzle.model.parallel import TensorGroup
from puzzle.model.weights import fill
from puzzle.plan.layout import Coord, Layout
from puzzle.spec.model import ModelSpec
from tests.model.tiny import logical_tensors, save_variant, stage

NORM = "model.norm.weight"
BUFFER = "model.layers.{}.self_attn.rotary_emb.inv_freq"


def whole(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> Decoder:
    return Decoder(spec, Layout.even(1, 1, 1, spec.num_layers), Coord(0, 0, 0), TensorGroup(), dtype)


def add(folder: Path, **tensors: Tensor) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | {name.replace("__", "."): x for name, x in tensors.items()}, file)


def norm_of(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    weights = torch.ones(64, dtype=dtype)
    weights[: len(values)] = torch.tensor(values, dtype=dtype)
    return weights


@pytest.mark.parametrize(
    ("tensor", "dtype", "words"),
    [
        (norm_of(torch.nan), torch.float32, "holds NaN or infinite numbers as float32"),
        (norm_of(1.0, torch.inf), torch.float32, "holds NaN or infinite numbers as float32"),
        (norm_of(torch.inf, -torch.inf), torch.float32, "holds NaN or infinite numbers as float32"),
        (norm_of(1e300, dtype=torch.float64), torch.float32, "holds NaN or infinite numbers as float32"),
        (norm_of(1e300, dtype=torch.float64), torch.bfloat16, "holds NaN or infinite numbers as bfloat16"),
        (norm_of(7e4), torch.float16, "holds NaN or infinite numbers as float16"),
        (norm_of(7e4), torch.bfloat16, None),
        (norm_of(3e38, 3e38), torch.float32, None),  # whose sum is infinite
        (norm_of(3e38, 3e38, 3e38, -3e38, -3e38, -3e38), torch.float32, None),
        (norm_of(2.0, dtype=torch.float16), torch.float32, None),
        (norm_of(2.0, dtype=torch.float64), torch.float32, None),
        (torch.ones(64, dtype=torch.int32), torch.float32, "is stored as I32; weights must be F64, F32, F16"),
        (torch.ones(64, dtype=torch.int8), torch.float32, "is stored as I8"),
        (torch.ones(64).to(torch.float8_e4m3fn), torch.float32, "is stored as F8_E4M3"),
    ],
)
def test_weights_are_finite_numbers(tensor: Tensor, dtype: torch.dtype, words: str | None, tmp_path) -> None:
    folder = save_variant(tmp_path / "model", "llama")
    add(folder, **{NORM: tensor})
    decoder = whole(read_spec(folder), dtype)
    if words is None:
        load(decoder, folder)
        assert torch.equal(decoder.final_norm.double(), tensor.to(dtype).double())
    else:
        with pytest.raises(UserError, match=rf"{NORM} {words}"):
            load(decoder, folder)


def test_a_tied_head_in_the_files_must_be_the_embedding(tmp_path) -> None:
    folder = save_variant(tmp_path / "model", "llama-tied")
    embed = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    add(folder, lm_head__weight=embed.clone())
    assert load(whole(read_spec(folder)), folder) == ((), ())
    other = embed.clone()
    other[-1, -1] += 1e-3
    for wrong in (other, embed[:-1].clone(), embed.t().contiguous()):
        add(folder, lm_head__weight=wrong)
        with pytest.raises(UserError, match=r"lm_head\.weight differs from the embedding"):
            load(whole(read_spec(folder)), folder)
    assert load(whole(read_spec(folder, "value")), folder, head_seed=0).initialised == ("score.weight",)


def test_a_language_head_beside_a_value_head_is_told(tmp_path, capsys) -> None:
    folder = save_variant(tmp_path / "model", "llama")
    spec = read_spec(folder, "value")
    assert load(whole(spec), folder, head_seed=0) == (("score.weight",), ())
    add(folder, score__weight=torch.ones(1, 64))
    found = load(whole(spec), folder)
    assert found == ((), ("lm_head.weight",))
    capsys.readouterr()
    found.warn(folder)
    assert capsys.readouterr().err == f"warning: {folder}: 1 tensor is not used: lm_head.weight\n"
    Loaded((), ("a", "b")).warn(folder)
    assert capsys.readouterr().err == f"warning: {folder}: 2 tensors are not used: a\n"
    Loaded(("score.weight",), ()).warn(folder)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("variant", ["llama", "llama3-rope", "llama-linear-rope"])
def test_rotary_frequencies_in_the_files_may_be_those_that_follow_from_the_config(variant, tmp_path) -> None:
    folder = save_variant(tmp_path / "model", variant)
    config = AutoModelForCausalLM.from_pretrained(folder).config
    theta, kind = config.rope_parameters["rope_theta"], config.rope_parameters["rope_type"]
    plain = 1.0 / theta ** (torch.arange(0, 8, 2) / 8)
    theirs = plain if kind == "default" else ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0]
    right = {BUFFER.format(0): theirs, BUFFER.format(1): theirs.half(), BUFFER.format(2): plain.clone()}
    add(folder, **right)
    assert load(whole(read_spec(folder)), folder) == ((), ())
    wrong = {BUFFER.format(1): theirs * 1.05, BUFFER.format(2): theirs[:3].clone()}
    wrong |= {BUFFER.format(3): torch.cat((theirs[:3], theirs[3:] * 0.9))}
    add(folder, **wrong)
    assert load(whole(read_spec(folder)), folder) == ((), tuple(sorted(wrong)))
    add(folder, **{BUFFER.format(4): theirs})  # of a layer that is not there
    with pytest.raises(UserError, match=r"1 tensor is in the weights but not in the model: .*layers\.4"):
        load(whole(read_spec(folder)), folder)


def test_the_first_layers_of_a_deeper_model_may_be_read(tmp_path) -> None:
    folder = save_variant(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    decoder = whole(replace(read_spec(folder), num_layers=2))
    assert load(decoder, folder) == ((), ())
    for name, tensor in logical_tensors(decoder):
        assert torch.equal(tensor, tensors[name])
    with pytest.raises(UserError, match=r"9 tensors are missing from the weights: model\.layers\.4"):
        load(whole(replace(read_spec(folder), num_layers=5)), folder)


def test_weights_are_checked_without_being_read(tmp_path) -> None:
    folder = save_variant(tmp_path / "model", "llama")
    add(folder, **{NORM: norm_of(torch.nan)})
    check_weights(folder, read_spec(folder))
    with pytest.raises(UserError, match=r"1 tensor is missing from the weights: score\.weight"):
        check_weights(folder, read_spec(folder, "value"))
    check_weights(folder, read_spec(folder, "value"), new_head=True)


def in_files(folder: Path, files: dict[str, list[str] | None], weight_map: dict[str, Any]) -> None:
    """The tensors of a folder by file (None: all), and an index of them; `weight_map` says more."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for file, names in files.items():
        save_file({name: tensors[name] for name in (tensors if names is None else names)}, folder / file)
    right = {name: file for file, names in files.items() for name in (tensors if names is None else names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": right | weight_map}))


@pytest.mark.parametrize(
    ("files", "weight_map", "words"),
    [
        ({"a.safetensors": None}, {NORM: "../other.safetensors"}, "must be a file of the same folder"),
        ({"a.safetensors": None}, {NORM: ".."}, "must be a file of the same folder"),
        ({"a.safetensors": None}, {NORM: ""}, "must be a file of the same folder"),
        ({"a.safetensors": None}, {NORM: "a" * 256}, "must be a file of the same folder"),
        ({"a.safetensors": None}, {NORM: "a" * 255}, "no such file"),
        ({"a.safetensors": None, "b.safetensors": [NORM]}, {}, "a.safetensors and b.safetensors both hold"),
        ({"a.safetensors": None}, {"model.more.weight": "a.safetensors"}, "is not in the file that it names"),
        ({"a.safetensors": None}, {}, None),
    ],
)
def test_an_index_names_every_tensor_once(files, weight_map, words, tmp_path) -> None:
    folder = save_variant(tmp_path / "model", "llama")
    in_files(folder, files, weight_map)
    if words is None:
        load(whole(read_spec(folder)), folder)
        (folder / "model.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
        words = "remove one of them"
    with pytest.raises(UserError, match=words):
        load(whole(read_spec(folder)), folder)


def test_files_are_as_large_as_allowed_and_the_index_counts_bytes(tmp_path) -> None:
    decoder = stage(save_variant(tmp_path / "model", "llama"))
    tensors = [(f"t{i}", torch.full((n,), float(i))) for i, n in enumerate((4, 2, 6, 9, 1, 1))]
    save(tmp_path / "out", decoder.spec, iter(tensors), shard_bytes=4 * 8)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert [sorted(load_file(file)) for file in files] == [["t0", "t1"], ["t2"], ["t3"], ["t4", "t5"]]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4 * 23}
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    save(tmp_path / "one", decoder.spec, iter(tensors), shard_bytes=4 * 23)
    assert [file.name for file in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]


def test_a_saved_folder_says_what_it_is_told(tmp_path) -> None:
    decoder = stage(save_variant(tmp_path / "model", "llama"), dtype=torch.bfloat16)
    save(tmp_path / "plain", decoder.spec, logical_tensors(decoder))
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config == decoder.spec.to_hf() | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert not (tmp_path / "plain" / "generation_config.json").exists()
    more, generation = {"eos_token_id": 5, "dtype": "other"}, {"temperature": 0.5}
    save(tmp_path / "told", decoder.spec, logical_tensors(decoder), more=more, generation=generation)
    assert json.loads((tmp_path / "told" / "config.json").read_text()) == config | more
    assert json.loads((tmp_path / "told" / "generation_config.json").read_text()) == generation


def test_weights_lie_where_the_stage_does_and_every_storage_ticks(tmp_path) -> None:
    spec = read_spec(save_variant(tmp_path / "model", "llama-biases"))
    layout = Layout.even(1, 1, 1, spec.num_layers)
    there = Decoder(spec, layout, Coord(0, 0, 0), TensorGroup(), torch.bfloat16, "meta")
    assert {p.device.type for p in (*there.parameters(), *there.buffers())} == {"meta"}
    assert {p.dtype for p in there.parameters()} == {torch.bfloat16}
    cache = there.new_cache(3, 20)
    assert (cache.k.device.type, cache.k.dtype) == ("meta", torch.bfloat16)
    assert cache.k.shape == cache.v.shape == (4, 2, 3, 20, 8)
    decoder, ticks = whole(spec), []
    tensors = {tensor.name: torch.ones(tensor.shape) for tensor in spec.tensors()}
    fill(decoder, tensors.__getitem__, lambda: ticks.append(1))
    assert len(ticks) == len(list(decoder.parameters()))
    for t, p, size in ((1, 0, 2), (0, 0, 1)):
        group = TensorGroup()
        group.rank, group.size = 0, size
        with pytest.raises(ValueError, match="cannot be"):
            Decoder(spec, Layout.even(2, 1, 1, spec.num_layers), Coord(t, p, 0), group)
