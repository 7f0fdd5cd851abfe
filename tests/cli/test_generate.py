"""`puzzle generate` on a tiny model with a byte tokenizer."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle.cli import main
from puzzle.data.tokenizers import byte_tokenizer
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


def test_reads_standard_input(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nworld\n"))
    assert main(["generate", str(model), "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line in ("hello", "world")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompts", "/nowhere.txt"], "no such file"),
        (["--temperature", "0", "--prompts", "P"], "temperature"),
        (["--batch", "0", "--prompts", "P"], "--batch"),
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
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    (tmp_path / "P.txt").write_text("a prompt\n")
    given = [str(tmp_path / "P.txt") if option == "P" else option for option in options]
    assert main(["generate", str(model), "--device", "cpu", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
