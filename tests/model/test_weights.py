"""Hugging Face folders in and out, every layout's boxes, random weights, folders that are wrong."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from puzzle.errors import UserError
from puzzle.model.decoder import Decoder
from puzzle.model.hf import load, read_spec, save
from puzzle.model.parallel import TensorGroup
from puzzle.model.weights import boxes, initialise
from puzzle.plan.layout import Coord, Layout
from tests.model.tiny import VARIANTS, logical_tensors, save_variant, stage


class FakeGroup(TensorGroup):
    """A tensor rank that never communicates."""

    def __init__(self, rank, size):
        super().__init__()
        self.rank, self.size = rank, size


def every_stage(spec, layout):
    for coord in layout.coords():
        if coord.d == 0:
            yield Decoder(spec, layout, coord, FakeGroup(coord.t, layout.tp))


def put_together(decoders):
    """Logical tensors from the boxes of all stages; boxes held twice must agree."""
    whole = {}
    for decoder in decoders:
        shapes = {tensor.name: tensor.shape for tensor in decoder.spec.tensors()}
        for name, box, values in boxes(decoder, decoder.get_parameter):
            tensor = whole.setdefault(name, torch.full(shapes[name], torch.nan))
            held = tensor[box.slices]
            assert torch.equal(torch.where(held.isnan(), values, held), values)
            tensor[box.slices] = values
    return whole


LAYOUTS = [(2, 1), (4, 2), (8, 1), (1, 3), (2, 4)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layout_reads_the_whole_model(variant, tmp_path):
    folder = save_variant(tmp_path / "model", variant)
    expected = load_file(folder / "model.safetensors")
    spec = read_spec(folder)
    for tp, pp in LAYOUTS:
        decoders = list(every_stage(spec, Layout.even(tp, pp, 1, spec.num_layers)))
        for decoder in decoders:
            assert load(decoder, folder) == ((), ())
        found = put_together(decoders)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
@pytest.mark.parametrize("variant", ["llama", "qwen2-tied", "qwen3", "llama3-rope"])
def test_saved_folders_load_in_transformers(variant, shard_bytes, tmp_path):
    folder = save_variant(tmp_path / "model", variant)
    (folder / "tokenizer.json").write_text("{}")
    decoder = stage(folder)
    out = tmp_path / "out"
    save(out, decoder.spec, logical_tensors(decoder), folder, shard_bytes)
    shutil.rmtree(folder)
    assert (out / "model.safetensors.index.json").exists() == (shard_bytes < 1 << 30)
    assert (out / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = stage(out)
    for a, b in zip(decoder.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    reference = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, tensor in logical_tensors(decoder):
        assert torch.equal(reference[name], tensor)


def test_a_saved_reward_model_loads_in_transformers(tmp_path):
    decoder = stage(save_variant(tmp_path / "model", "llama", value=True))
    save(tmp_path / "out", decoder.spec, logical_tensors(decoder))
    reference = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert reference.config.num_labels == 1
    assert torch.equal(reference.state_dict()["score.weight"], decoder.head_weight)


def test_a_folder_is_replaced_only_when_the_new_one_is_whole(tmp_path):
    decoder = stage(save_variant(tmp_path / "model", "llama"))
    before = load_file(tmp_path / "model" / "model.safetensors")

    def breaks():
        yield "model.norm.weight", torch.zeros(64)
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        save(tmp_path / "model", decoder.spec, breaks())
    after = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    save(tmp_path / "model", decoder.spec, ((n, t + 1) for n, t in logical_tensors(decoder)))
    assert torch.equal(
        load_file(tmp_path / "model" / "model.safetensors")["model.norm.weight"],
        before["model.norm.weight"] + 1,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_half_precision_in_and_out(tmp_path):
    folder = save_variant(tmp_path / "model", "llama")
    decoder = stage(folder, dtype=torch.bfloat16)
    save(tmp_path / "half", decoder.spec, logical_tensors(decoder))
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    full = load_file(folder / "model.safetensors")
    for name, tensor in load_file(tmp_path / "half" / "model.safetensors").items():
        assert torch.equal(tensor, full[name].bfloat16())
    again = stage(tmp_path / "half")
    assert torch.equal(again.embed, full["model.embed_tokens.weight"].bfloat16().float())


@pytest.mark.parametrize("variant", ["llama-tied", "qwen2", "qwen3"])
def test_random_weights_are_equal_in_every_layout(variant, tmp_path):
    spec = read_spec(save_variant(tmp_path / "model", variant))
    known = None
    for tp, pp in [(1, 1), *LAYOUTS]:
        decoders = list(every_stage(spec, Layout.even(tp, pp, 1, spec.num_layers)))
        for decoder in decoders:
            initialise(decoder, seed=11)
        found = put_together(decoders)
        known = known or found
        assert all(torch.equal(known[name], found[name]) for name in known)
    assert known is not None
    matrices = [name for name, tensor in known.items() if tensor.dim() == 2]
    spread = AutoConfig.for_model(spec.family).initializer_range  # transformers' own
    assert all(abs(known[name].std() / spread - 1) < 0.1 for name in matrices)
    assert all(abs(known[name].mean()) < 0.1 * spread for name in matrices)
    assert len({known[name].flatten()[0].item() for name in matrices}) == len(matrices)
    for name, tensor in known.items():
        if tensor.dim() == 1:
            assert (tensor == (0.0 if name.endswith("bias") else 1.0)).all()


def test_seeds_differ(tmp_path):
    spec = read_spec(save_variant(tmp_path / "model", "llama"))
    a, b = (next(every_stage(spec, Layout.even(1, 1, 1, 4))) for _ in range(2))
    initialise(a, 1)
    initialise(b, 2)
    assert not torch.equal(a.embed, b.embed)


def test_a_value_head_may_start_anew(tmp_path):
    folder = save_variant(tmp_path / "model", "llama")
    spec = read_spec(folder, head="value")
    decoder = Decoder(spec, Layout.even(1, 1, 1, 4), Coord(0, 0, 0), TensorGroup())
    with pytest.raises(UserError, match=r"1 tensor is missing.*score\.weight"):
        load(decoder, folder)
    assert load(decoder, folder, head_seed=5) == (("score.weight",), ())
    assert abs(decoder.head_weight.std() / AutoConfig.for_model("llama").initializer_range - 1) < 0.3
    assert torch.equal(decoder.embed, load_file(folder / "model.safetensors")["model.embed_tokens.weight"])


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def broken_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')


WRONG = {
    "no folder": (lambda f: shutil.rmtree(f), "no such model folder"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: cannot be read: No such file"),
    "config is not JSON": (
        lambda f: (f / "config.json").write_text("{"),
        r"config\.json: not valid JSON",
    ),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors: no such file"),
    "pickled weights": (only_pickled, "convert them to safetensors"),
    "truncated": (truncate, "not a whole safetensors file"),
    "garbage": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "not a whole safetensors file"),
    "index names no file": (broken_index, r"gone\.safetensors: no such file"),
    "index is empty": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "weight_map is missing; it must be an object",
    ),
    "missing": (
        lambda f: edit_tensors(f, lambda t: [t.pop("model.norm.weight"), t.pop("lm_head.weight")]),
        r"2 tensors are missing from the weights: model\.norm\.weight",
    ),
    "extra": (
        lambda f: edit_tensors(f, lambda t: t.update({"extra.weight": torch.zeros(2)})),
        r"1 tensor is in the weights but not in the model: 'extra\.weight'",
    ),
    "shape": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": torch.zeros(65)})),
        r"model\.norm\.weight has shape \(65,\), config\.json says \(64,\)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_folders_are_refused_in_one_line(case, tmp_path):
    folder = save_variant(tmp_path / "model", "llama")
    change, words = WRONG[case]
    change(folder)
    with pytest.raises(UserError, match=words) as error:
        stage(folder)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_of_new_files(umask, tmp_path):
    """Whoever may read config.json may read the weights, of one file or several."""
    decoder = stage(save_variant(tmp_path / "model", "llama"))
    before = os.umask(umask)
    try:
        save(tmp_path / "one", decoder.spec, logical_tensors(decoder))
        save(tmp_path / "many", decoder.spec, logical_tensors(decoder), shard_bytes=50_000)
    finally:
        os.umask(before)
    files = [file for name in ("one", "many") for file in (tmp_path / name).iterdir()]
    assert len(files) > 6
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}


def test_a_folder_that_cannot_be_written(tmp_path):
    decoder = stage(save_variant(tmp_path / "model", "llama"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the model"):
        save(tmp_path / "file" / "out", decoder.spec, logical_tensors(decoder))
