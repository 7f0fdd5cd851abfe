"""`puzzle generate` on a tiny model with a byte tokenizer."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle.cli import main
from puzzle.cli.generate import Terminal
from puzzle.data.tokenizers import byte_tokenizer
from tests.data.kinds import bytes_with_ends
from tests.reference.tiny import save_lm


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_lm(tmp_path_factory.mktemp("generate") / "model")
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_jsonl_has_the_greedy_tokens_of_transformers_in_input_order(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one prompt\nanother, longer prompt\nx\n")
    out = tmp_path / "out.jsonl"
    options = ["--greedy", "--max-new-tokens", "7", "--jsonl", str(out), "--batch", "2", "--device", "cpu"]
    assert main(["generate", str(model), "--prompts", str(prompts), *options]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == prompts.read_text().splitlines()
    reference = cast(Any, AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    for line in lines:
        ids = torch.tensor([byte_tokenizer()(line["prompt"])["input_ids"]])
        wanted = reference.generate(ids, do_sample=False, max_new_tokens=7, eos_token_id=256, pad_token_id=0)
        assert line["response_ids"] == wanted[0, ids.shape[1] :].tolist()
        assert len(line["logprobs"]) == len(line["response_ids"])


def test_ends_where_transformers_does(model: Path, tmp_path: Path) -> None:
    """EOS ids of config.json alone, and a tokenizer that ends every text, also a prompt, with its own."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "generation_config.json").unlink()
    tokenizer = bytes_with_ends()
    tokenizer.save_pretrained(folder)
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("one prompt\n")
    options = ["--greedy", "--max-new-tokens", "12", "--jsonl", str(out), "--device", "cpu"]
    ids = torch.tensor([tokenizer("one prompt")["input_ids"][:-1]])
    reference = cast(Any, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    free = reference.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0)[0, ids.shape[1] :]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [int(free[4]), 257]}))
    reference = cast(Any, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    wanted = reference.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0)[0, ids.shape[1] :]
    assert main(["generate", str(folder), "--prompts", str(prompts), *options]) == 0
    (line,) = out.read_text().splitlines()
    assert json.loads(line)["response_ids"] == wanted.tolist()
    assert len(wanted) <= 5


def test_layouts_and_stop_texts_give_the_same_lines(model: Path, tmp_path: Path) -> None:
    """A stop text of several tokens ends the ids with its last one, and is no part of the text."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("one", "two words", "y")))
    plain, rows = ["--greedy", "--max-new-tokens", "24", "--device", "cpu", "--prompts", str(prompts)], []

    def answers(name: str, *options: str) -> list[dict[str, Any]]:
        out = tmp_path / name
        assert main(["generate", str(model), *plain, "--jsonl", str(out), *options]) == 0
        return [json.loads(line) for line in out.read_text().splitlines()]

    rows = answers("alone")
    layout = ["--layout.tp", "1", "--layout.pp", "2", "--layout.dp", "2"]
    assert [row["response_ids"] for row in answers("ring", *layout)] == [row["response_ids"] for row in rows]
    text = rows[1]["response"]
    stop = re.findall("[ -~]{2}", text)[0]
    ended = answers("stopped", "--stop", "never said", "--stop", stop)
    for before, after in zip(rows, ended, strict=True):
        assert after["response"] == before["response"].partition(stop)[0]
        kept = after["response_ids"]
        assert before["response_ids"][: len(kept)] == kept
        assert stop not in byte_tokenizer().decode(kept[:-1])
    assert ended[1]["response"] != text


def give(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_streams_a_single_response(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    options = ["generate", str(model), "--max-new-tokens", "9", "--device", "cpu", "--greedy"]
    give(monkeypatch, b"hello\nagain\n")
    assert main(options) == 0
    both = capsys.readouterr().out
    said: list[str] = []
    monkeypatch.setattr(Terminal, "_say", lambda _, text: said.append(text))
    give(monkeypatch, b"hello\n")
    assert main(options) == 0
    assert both.startswith("".join(said))
    assert len([piece for piece in said if piece]) >= 4


def test_reads_standard_input_as_it_reads_files(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    options = ["generate", str(model), "--max-new-tokens", "2", "--device", "cpu"]
    give(monkeypatch, b"\xef\xbb\xbfhello\n\nworld\n")
    assert main(options) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line in ("hello", "world")] == [
        "hello",
        "world",
    ]
    refused = {
        b"fine\nbad \xff\n": ":2: not UTF-8 text",
        "hi\n".encode("utf-16"): ": is UTF-16 text",
        b"a\0b\n": ":1: holds",
    }
    for data, said in refused.items():
        give(monkeypatch, data)
        assert main(options) == 2
        assert capsys.readouterr().err.startswith(f"error: standard input{said}")
    monkeypatch.setattr("sys.stdin", None)
    assert main(options) == 2
    assert capsys.readouterr().err == "error: standard input is closed; give --prompts FILE\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompts", "/nowhere.txt"], "no such file"),
        (["--temperature", "0", "--prompts", "P"], "temperature"),
        (["--batch", "0", "--prompts", "P"], "--batch"),
        (["--layout.pp", "0", "--prompts", "P"], "--layout.pp"),
        (["--layout.pp", "5", "--prompts", "P"], "layers"),
        (["--stop", "", "--prompts", "P"], "--stop"),
        (["--jsonl", "/nowhere/out.jsonl", "--prompts", "P"], "no folder"),
        (["--max-new-tokens", "4000", "--prompts", "P"], "positions"),
        ([], "standard input"),
    ],
)
def test_bad_input_is_one_line(
    model: Path,
    tmp_path: Path,
    options: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    give(monkeypatch, b"")
    (tmp_path / "P.txt").write_text("a prompt\n")
    given = [str(tmp_path / "P.txt") if option == "P" else option for option in options]
    assert main(["generate", str(model), "--device", "cpu", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
