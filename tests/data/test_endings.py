"""What ends a response, beside what transformers makes of the same folder."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle.data.endings import endings
from puzzle.data.tokenizers import byte_tokenizer
from puzzle.errors import UserError
from puzzle.model import hf
from tests.data.kinds import sentencepiece
from tests.reference.tiny import save_lm

# eos_token_id of config.json and of generation_config.json ("none": no such file), and what ends responses;
# None: transformers ends none, the tokenizer's 256 does.
NAMED = [
    ([7, 9], "none", (7, 9)),
    (7, "none", (7,)),
    (7, [9, 3], (3, 9)),
    ([7, 256], 9, (9,)),
    (None, 9, (9,)),
    (7, None, None),
    (None, None, None),
    (None, "none", None),
    (None, [], None),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_lm(tmp_path_factory.mktemp("endings") / "model", num_hidden_layers=1)
    byte_tokenizer().save_pretrained(folder)
    return folder


def named(source, folder, config, generation):
    """A copy of a model folder with these values of `eos_token_id`."""
    shutil.copytree(source, folder)
    for file, value in (("config.json", config), ("generation_config.json", generation)):
        known = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(known | {"eos_token_id": value}))
    if generation == "none":
        (folder / "generation_config.json").unlink()
    return folder


def by_transformers(folder):
    """The ids at which its `generate` ends a response to these weights."""
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).generation_config.eos_token_id
    return tuple(sorted(found if isinstance(found, list) else [] if found is None else [found]))


@pytest.mark.parametrize(("config", "generation", "ids"), NAMED)
def test_eos_is_what_transformers_takes_and_stays_so_in_exports(model, tmp_path, config, generation, ids):
    """The tokenizer lies in another folder, whose own settings count for nothing."""
    folder = named(model, tmp_path / "model", config, generation)
    other = named(model, tmp_path / "other", 1, [2, 3])
    found = endings(byte_tokenizer(), folder)
    assert by_transformers(folder) == (ids or ())
    assert found.eos == found.stop_ids == (ids or (256,))
    with hf.open_checkpoint(folder) as checkpoint:
        tensors = [(name, checkpoint[name][(slice(None),)]) for name in sorted(checkpoint.names)]
    spec = hf.read_spec(folder)
    hf.save(tmp_path / "out", spec, tensors, other, more=found.config, generation=found.generation)
    assert by_transformers(tmp_path / "out") == found.eos
    assert endings(byte_tokenizer(), tmp_path / "out").eos == found.eos
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_without_a_tokenizer_nothing_ends_and_exports_say_what_the_folder_says(model, tmp_path):
    folder = named(model, tmp_path / "model", 7, [9, 3])
    found = endings(None, folder)
    assert (found.eos, found.stop_ids, found.rule) == ((), (), None)
    assert found.config["eos_token_id"] == 7
    assert found.generation == json.loads((folder / "generation_config.json").read_text())


def test_a_model_without_a_folder_ends_as_its_tokenizer_says():
    found = endings(byte_tokenizer(), None)
    assert found.eos == (256,)
    assert found.config == {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257}
    assert endings(None, None).stop_ids == ()


def test_a_stop_text_that_is_one_special_token_is_a_stop_token(model):
    tokenizer = sentencepiece()
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert endings(tokenizer, None, ("<|end|>", "</s>")).stop_ids == (2, end)
    assert endings(tokenizer, None, ("<|end|>",)).rule is None
    assert endings(tokenizer, None, ("<|end|>",)).eos == (2,)
    assert endings(tokenizer, None, ("<|end|>", "<|end|>\n")).rule is not None
    assert endings(byte_tokenizer(), None, ("<|end|>",)).stop_ids == (256,)  # text to this tokenizer


@pytest.mark.parametrize("value", ["256", [256, None], True, 1.5, -1, {"a": 1}])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_ids_that_are_none_are_named(model, tmp_path, file, value):
    odd = (value, "none") if file == "config.json" else (None, value)
    folder = named(model, tmp_path / "model", *odd)
    with pytest.raises(
        UserError, match=rf"{file}: eos_token_id must be a token id, a list of them, or null, found "
    ):
        endings(byte_tokenizer(), folder)
    for text in ("{", "[1]", "[" * 100_000, "9" * 5000):
        (folder / file).write_text(text)
        with pytest.raises(UserError, match=rf"{file}: (not valid JSON|must hold a JSON object)"):
            endings(byte_tokenizer(), folder)
