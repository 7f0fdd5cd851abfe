"""`puzzle sft` and its kin as commands: what they write, how they go on, what they refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from puzzle.cli import main
from puzzle.config import memory_report as footprint
from puzzle.config.load import load_given
from puzzle.config.resolve import resolve
from puzzle.config.supervised import SFTConfig
from puzzle.runlog import load_runs
from puzzle.runlog.records import Warned
from tests.cli.test_hostile import refused
from tests.data.templates import CHATML, tokenizer

INIT = {
    "vocab_size": 330,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
CHAT = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"}]
RUN: dict[str, Any] = {
    "iterations": 4,
    "batch": 4,
    "device": "cpu",
    "log": {"provenance": "rehearsal"},
    "checkpoint": {"every": 2, "best": True},
    "eval": {"every": 2},
}


def lines(file: str, rows: list[dict[str, Any]]) -> None:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tokenizer(CHATML, marked=True).save_pretrained("tokenizer")
    said = ["the cat", "sat on", "the mat", "hello there"]
    chats = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a in said for b in said
    ]
    lines("chats.jsonl", [{"messages": chat} for chat in chats])
    lines("held.jsonl", [{"messages": chat} for chat in chats[:5]])
    data: dict[str, Any] = {
        "examples": "chats.jsonl",
        "eval_examples": "held.jsonl",
        "tokenizer": "tokenizer",
    }
    data |= {"max_tokens": 64, "chat_template": True}
    actor = {"init": INIT, "optimizer": {"lr": 0.01}}
    Path("sft.yaml").write_text(json.dumps({**RUN, "actor": actor, "data": data}))
    asked = [{"role": "user", "content": "the cat"}, {"role": "user", "content": "hello"}]
    pairs = [
        {
            "prompt": [turn],
            "chosen": [turn, {"role": "assistant", "content": f"the mat {n}"}],
            "rejected": f"{n} hello",
        }
        for turn in asked
        for n in range(6)
    ]
    lines("pairs.jsonl", pairs[2:] + pairs[:1])
    lines("held-pairs.jsonl", pairs)
    data |= {"examples": "pairs.jsonl", "eval_examples": "held-pairs.jsonl"}
    run = {**RUN, "iterations": 12, "eval": {"every": 4}}
    Path("pairs.yaml").write_text(json.dumps({**run, "reward": actor, "data": data}))
    Path("dpo.yaml").write_text(json.dumps({**run, "actor": actor, "data": data}))
    return tmp_path


def sft(out: str, *options: str) -> int:
    return main(["sft", "--config", "sft.yaml", "--out", out, *options])


@pytest.mark.usefixtures("folder")
def test_a_run_learns_saves_and_goes_on_bitwise() -> None:
    assert sft("o") == 0
    (run,) = load_runs(Path("o")).runs
    assert run.config["task"] == "sft"
    losses = [one.metrics["actor_loss"] for one in run.iterations]
    held_out = [one.metrics["loss"] for one in run.evaluations]
    assert len(losses) == 4
    assert held_out[-1] < held_out[0] - 0.5, "it learns"
    assert {row.split(",")[1] for row in Path("o/plots/curves.csv").read_text().splitlines()} >= {
        "actor_loss",
        "held-out loss",
    }
    assert sft("p", "--iterations", "2") == 0
    assert main(["sft", "--out", "p", "--resume", "--iterations", "4"]) == 0
    for name in ("last", "best"):
        straight, resumed = (load_file(f"{out}/checkpoints/{name}/model.safetensors") for out in ("o", "p"))
        assert all(torch.equal(straight[key], resumed[key]) for key in straight | resumed)


@pytest.mark.usefixtures("folder")
def test_transformers_reads_what_was_learned() -> None:
    """Its loss on the held-out examples is the one that the run logged; answers end as they were taught."""
    assert sft("o") == 0
    model = AutoModelForCausalLM.from_pretrained("o/checkpoints/last")
    own: Any = AutoTokenizer.from_pretrained("o/checkpoints/last")
    losses = []
    for line in Path("held.jsonl").read_text().splitlines():
        found = own.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        logits = model(torch.tensor([found["input_ids"]])).logits[0, :-1]
        every = torch.nn.functional.cross_entropy(
            logits, torch.tensor(found["input_ids"][1:]), reduction="none"
        )
        losses += every[torch.tensor(found["assistant_masks"][1:]).bool()].tolist()
    (run,) = load_runs(Path("o")).runs
    assert run.evaluations[-1].metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    end = own.convert_tokens_to_ids("<|im_end|>")
    assert end in json.loads(Path("o/checkpoints/last/config.json").read_text())["eos_token_id"]


BAD = [
    ({"examples": None}, "data.examples is missing"),
    ({"examples": "absent.jsonl"}, "absent.jsonl: no such file"),
    ({"examples": "plain.jsonl"}, "plain.jsonl:1: no field 'response'; it has prompt"),
    ({"examples": "odd.jsonl"}, "odd.jsonl:2: messages must be turns with role and content"),
    ({"examples": "open.jsonl"}, "open.jsonl:1: the chat has no turn of the assistant"),
    ({"chat_template": False}, "chats.jsonl:1: the example is a chat; set data.chat_template"),
    ({"tokenizer": "bytes"}, "the tokenizer has no chat template"),
    ({"max_tokens": 4}, "chats.jsonl:1: the example has"),
    ({"max_tokens": 4, "too_long": "drop"}, "all 16 examples exceed data.max_tokens 4"),
    ({"max_tokens": 500}, "data.max_tokens 500 exceeds its 128 positions"),
    ({"examples": "notes.txt"}, "examples must be .jsonl, .parquet or a Hugging Face dataset folder"),
    ({"eval_examples": None}, "eval.every needs data.eval_examples"),
    ({"prompts": "chats.jsonl"}, "data.prompts: unknown key; it is a key of puzzle train"),
]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("changes", "words"), BAD)
def test_bad_data_is_refused_in_one_line(
    changes: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines("plain.jsonl", [{"prompt": "the cat"}] * 4)
    lines("odd.jsonl", [{"messages": CHAT}, {"messages": "the cat"}])
    lines("open.jsonl", [{"messages": [{"role": "user", "content": "the"}]}])
    Path("notes.txt").write_text("the cat\n")
    config = json.loads(Path("sft.yaml").read_text())
    config["data"] |= changes
    Path("sft.yaml").write_text(json.dumps(config))
    refused(lambda: sft("o"), words, capsys)
    assert not Path("o").exists()


@pytest.mark.usefixtures("folder")
def test_prompts_with_responses_of_three_kinds_of_files() -> None:
    """Text, turns before the response, parquet and a dataset folder: the same tokens are learned."""
    texts = [{"prompt": f"the {n}", "answer": "cat"} for n in range(4)]
    chats = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in texts]
    Dataset.from_list(texts).to_parquet("texts.parquet")
    Dataset.from_list(chats).save_to_disk("chats")
    lines("texts.jsonl", texts)
    names = ("texts.jsonl", "texts.parquet", "chats")
    data = {"data.eval_examples": "null", "eval.every": "0", "checkpoint.best": "false"}
    words = [word for key, value in data.items() for word in (f"--{key}", value)]
    losses = []
    for name in names:
        options = ["--data.examples", name, "--data.response_field", "answer", *words, "--iterations", "1"]
        assert sft(f"o-{name}", *options) == 0
        losses.append(load_runs(Path(f"o-{name}")).runs[0].iterations[0].metrics["actor_loss"])
    assert len(set(losses)) == 1


def conversation(row: dict[str, Any], answer: str) -> list[dict[str, str]]:
    """A chat of the pairs above as transformers' template takes it."""
    said = row[answer]
    return said if isinstance(said, list) else [*row["prompt"], {"role": "assistant", "content": said}]


@pytest.mark.usefixtures("folder")
def test_transformers_and_training_read_the_reward_model() -> None:
    """A batch of its classifier, padded on the right, gives scores with the accuracy and gap that were
    logged; PPO takes it for its reward."""
    assert main(["reward-model", "--config", "pairs.yaml", "--out", "o"]) == 0
    (run,) = load_runs(Path("o")).runs
    assert run.evaluations[-1].metrics["accuracy"] == 1.0
    assert run.evaluations[-1].metrics["score_gap"] > run.evaluations[0].metrics["score_gap"] + 1
    folder = "o/checkpoints/last"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    own: Any = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == own.pad_token_id != own.convert_tokens_to_ids("<|im_end|>")
    rows = [json.loads(line) for line in Path("held-pairs.jsonl").read_text().splitlines()]
    scores = []
    for answer in ("chosen", "rejected"):
        # The template's line break behind the end of a turn is no part of what is scored.
        chats = [own.apply_chat_template(conversation(row, answer), tokenize=False).rstrip() for row in rows]
        scores.append(model(**own(chats, add_special_tokens=False, padding=True, return_tensors="pt")).logits)
    gap = (scores[0] - scores[1])[:, 0]
    assert bool((gap > 0).all())
    assert run.evaluations[-1].metrics["score_gap"] == pytest.approx(float(gap.detach().mean()), rel=1e-5)
    lines("prompts.jsonl", [{"prompt": "the cat"}] * 4)
    assert sft("s", "--iterations", "1") == 0
    train = {**RUN, "iterations": 1, "actor": {"model": "s/checkpoints/last"}, "reward": {"model": folder}}
    train |= {"data": {"prompts": "prompts.jsonl", "chat_template": True, "max_prompt_tokens": 32}}
    train |= {"generation": {"max_new_tokens": 4}, "eval": {}, "checkpoint": {}}
    Path("train.yaml").write_text(json.dumps(train))
    assert main(["train", "--config", "train.yaml", "--out", "t"]) == 0


@pytest.mark.usefixtures("folder")
def test_dpo_learns_to_prefer() -> None:
    """Before the first step the actor is the reference: no implicit reward, all pairs half right."""
    assert main(["dpo", "--config", "dpo.yaml", "--out", "o"]) == 0
    (run,) = load_runs(Path("o")).runs
    first, last = run.evaluations[0].metrics, run.evaluations[-1].metrics
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["score_gap"] == pytest.approx(0, abs=1e-5)
    assert last["accuracy"] == 1.0
    assert last["chosen_reward"] > last["rejected_reward"] + 1


BAD_PAIRS = [
    ({"chosen_field": "better"}, "pairs.jsonl:1: no field 'better'; it has prompt, chosen, rejected"),
    ({"margin_field": "prompt"}, "pairs.jsonl:1: prompt must be a number, found"),
    ({"examples": "bare.jsonl"}, "bare.jsonl:1: no field 'prompt', which chosen answers"),
    ({"examples": "open.jsonl"}, "open.jsonl:1: chosen must end with the assistant's turn"),
]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("changes", "words"), BAD_PAIRS)
def test_bad_pairs_are_refused_in_one_line(
    changes: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines("bare.jsonl", [{"chosen": "the cat", "rejected": "hello"}])
    lines("open.jsonl", [{"chosen": CHAT[:1], "rejected": CHAT}])
    for command, file in (("reward-model", "pairs.yaml"), ("dpo", "dpo.yaml")):
        config = json.loads(Path(file).read_text())
        config["data"] |= changes
        Path(file).write_text(json.dumps(config))
        refused(lambda c=command, f=file: main([c, "--config", f, "--out", "o"]), words, capsys)
        assert not Path("o").exists()


@pytest.mark.usefixtures("folder")
def test_a_run_is_not_gone_on_with_other_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert sft("o", "--iterations", "2") == 0
    rows = [json.loads(line) for line in Path("chats.jsonl").read_text().splitlines()]
    rows[3]["messages"][1]["content"] = "cat"
    lines("chats.jsonl", rows)
    capsys.readouterr()
    words = "the examples or their tokens are not those of the checkpoint"
    refused(lambda: main(["sft", "--out", "o", "--resume", "--iterations", "4"]), words, capsys)


@pytest.mark.usefixtures("folder")
def test_what_is_left_out_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in Path("chats.jsonl").read_text().splitlines()]
    rows[3]["messages"][1]["content"] = "cat " * 80
    rows[5]["messages"][0]["content"] = ""
    lines("chats.jsonl", rows)
    drop = ["--iterations", "1", "--data.too_long", "drop"]
    refused(lambda: sft("o", *drop), ":6: messages: turn 1, the user's, is empty; mend it, or", capsys)
    assert sft("o", *drop, "--data.empty", "drop") == 0
    said = [
        "1 of 16 examples are longer than data.max_tokens and are left out, the first is chats.jsonl:4",
        "1 of 16 examples are empty in part or whole and are left out, the first is chats.jsonl:6",
    ]
    assert capsys.readouterr().err == "".join(f"warning: {one}\n" for one in said)
    assert [one.text for one in load_runs(Path("o")).runs[0].of(Warned)] == said


@pytest.mark.usefixtures("folder")
def test_memory_is_forecast_without_generation(capsys: pytest.CaptureFixture[str]) -> None:
    """Masters aside, weights, moments and gradients of fp32 are four times the parameters; what does not fit
    is refused with what lowers it."""
    big = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8}
    words = [w for key, value in big.items() for w in (f"--actor.init.{key}", str(value))]
    assert main(["sft", "--config", "sft.yaml", "--dry-run", *words]) == 0
    said = capsys.readouterr().out
    assert "generation" not in said
    config = load_given(SFTConfig, Path("sft.yaml"), words)[0]
    plan = resolve(config)
    (rank,) = footprint.estimate(plan, fused=False)
    assert set(rank.stages) == {"inference", "training"}
    held = sum(rank.resident.values()) + rank.stages["training"]["actor gradients"]
    assert held == 4 * 4 * plan.main.spec.parameters
    refused_ = [*words, "--device-memory", "100MB"]
    assert main(["sft", "--config", "sft.yaml", "--out", "o", *refused_]) == 2
    assert "raise actor.layout" in capsys.readouterr().err


OPTIONS = [
    (["--batch", "17"], "batch is 17 but there are only 16 examples"),
    (["--layout.dp", "8"], "actor.layout.dp 8 exceeds the 4 examples of a batch"),
    (["--algorithm.microbatch_tokens", "32"], "microbatch_tokens 32 is less than 64"),
    (["--generation.samples", "2"], "unknown option"),
    (["--actor.init", "null"], "actor: no model; give actor.model or actor.init"),
    (["--resume"], "o holds no run"),
]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("options", "words"), OPTIONS)
def test_bad_options_are_refused_in_one_line(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(lambda: sft("o", *options), words, capsys)


@pytest.mark.usefixtures("folder")
def test_another_commands_run_is_not_gone_on_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert sft("o", "--iterations", "1") == 0
    capsys.readouterr()
    refused(lambda: main(["train", "--out", "o", "--resume"]), "holds a run of puzzle sft", capsys)
