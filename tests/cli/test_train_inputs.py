"""Bad inputs that only show once a run starts: one line, code 2, no folder left behind."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from puzzle.cli import main
from puzzle.data.tokenizers import byte_tokenizer
from puzzle.engine.runtime import world as worlds
from puzzle.runlog.load import load_runs
from tests.reference.tiny import save_value

CONFIG = """\
iterations: 2
batch: 4
actor:
  init: {vocab_size: 258, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
         num_attention_heads: 4, max_position_embeddings: 64}
reward: {function: "puzzle.rlhf.rewards:letter_share"}
data: {prompts: prompts.jsonl, tokenizer: bytes, max_prompt_tokens: 24}
generation: {max_new_tokens: 4}
log: {plots: false}
"""
SCORERS = """
def fails(prompts, responses): raise RuntimeError("no such score")
def nan(prompts, responses): return [float("nan")] * len(responses)
def short(prompts, responses): return [0.0]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "scorers.py").write_text(SCORERS)
    lines = [json.dumps({"prompt": f"opening {i}", "key": f"k{i}"}) + "\n" for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    (tmp_path / "long.jsonl").write_text("".join([*lines, json.dumps({"prompt": "x" * 25})]))
    (tmp_path / "few.jsonl").write_text("".join(lines[:3]))
    for name in ("no-tokenizer", "no-weights"):
        (tmp_path / name).mkdir()
    shape = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = {**shape, "model_type": "llama", "num_attention_heads": 4, "max_position_embeddings": 64}
    for name in ("no-tokenizer", "no-weights"):
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def train(folder, monkeypatch, capsys):
    """Runs the command in this process, which has torch already; gives exit code, stdout, stderr."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "scorers", raising=False)

    def run(*options: str) -> tuple[int, str, str]:
        capsys.readouterr()  # what making models has said
        code = main(["train", "--config", "run.yaml", "--out", "out", *options])
        return code, *capsys.readouterr()

    return run


BEFORE_THE_LOG = [
    (
        ["--data.prompts", "long.jsonl"],
        "long.jsonl:9: the prompt has 25 tokens",
    ),
    (["--data.prompts", "few.jsonl"], "batch is 4 but there are only 3 prompts"),
    (["--data.chat_template", "true"], "the tokenizer has no chat template"),
    (["--actor.model", "no-tokenizer", "--data.tokenizer", "null"], "no-tokenizer: has no tokenizer"),
    (["--reference.model", "no-weights"], "no-weights"),
    (
        ["--actor.model", "some-org/Some-7B"],
        "fetch it where there is a network, by hf download some-org/Some",
    ),
    (["--data.tokenizer", "some-org/Some-7B"], "hf download some-org/Some-7B --local-dir Some-7B"),
    (["--data.prompts", "some-org/some-data"], "hf download some-org/some-data --repo-type dataset"),
    (["--data.prompts", "~/absent.jsonl"], f"{Path.home()}/absent.jsonl: no such file"),
    (["--data.prompts", "$NOT_SET_HERE/p.jsonl"], "$NOT_SET_HERE is not set in the environment"),
    (["--data.max_prompt_tokens", "61"], "lower generation.max_new_tokens or data.max_prompt_tokens"),
]


@pytest.mark.parametrize(("options", "words"), BEFORE_THE_LOG)
def test_refused_before_the_log_begins(folder, train, options, words):
    code, _, err = train(*options)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert not (folder / "out").exists()


def test_a_run_without_enough_memory_begins_if_told_so(folder, train, monkeypatch):
    """Responses count at full length, which they may not reach."""
    monkeypatch.setattr(worlds, "host_free", lambda: 1 << 16)
    code, _, err = train()
    assert code == 2
    assert err.count("\n") == 1
    *_, option, value, _, _ = err.split()
    assert (option, value) == ("--launch.skip_memory_check", "true")
    assert not (folder / "out").exists()
    code, _, err = train(option, value)
    assert code == 0
    assert err.startswith("warning: rank 0 needs ")
    (run,) = load_runs(folder / "out").runs
    assert len(run.iterations) == 2


OTHER_REWARDS = [
    ({"vocab_size": 200}, " is outside its vocabulary of 200"),
    ({"vocab_size": 258, "max_position_embeddings": 9}, "reward: a dialogue of"),
]


@pytest.mark.parametrize(("shape", "words"), OTHER_REWARDS)
def test_reward_models_that_cannot_read_a_dialogue(folder, train, shape, words):
    """Known only once there is a response, which another tokenizer may have to read."""
    save_value(folder / "reward", **shape)
    byte_tokenizer().save_pretrained(folder / "reward")
    code, _, err = train("--reward.function", "null", "--reward.model", "reward", "--iterations", "9")
    assert code == 2
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fails", "scorers:fails raised RuntimeError: no such score"),
        ("nan", "scorers:nan gave nan for the response"),
        ("short", "scorers:short gave 1 scores for 4 responses"),
    ],
)
def test_rewards_that_break_are_named_and_logged(folder, train, name, words):
    code, _, err = train("--reward.function", f"scorers:{name}")
    assert code == 2
    assert err.count("\n") == 1
    assert words in err
    last = json.loads((folder / "out/run.jsonl").read_text().splitlines()[-1])
    assert (last["record"], last["status"]) == ("end", "failed")
    assert words in last["text"]


def test_refused_on_every_rank_with_one_line(folder, train):
    code, _, err = train("--layout.dp", "2", "--data.prompts", "long.jsonl")
    assert code == 2
    assert err.startswith("error: long.jsonl:9: the prompt has 25 tokens")
    assert err.count("\n") == 1
    assert not (folder / "out").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named(folder, train):
    (folder / "out").mkdir()
    (folder / "out/samples.jsonl").symlink_to("/dev/full")
    code, _, err = train()
    assert code == 2
    assert err.count("\n") == 1
    assert "samples.jsonl" in err
    assert "No space left on device" in err


def test_a_run_that_works_is_left_whole(folder, train):
    code, out, err = train("--data.id_field", "key")
    assert (code, err) == (0, "")
    assert "2/2" in out
    assert (folder / "out/checkpoints/last/tokenizer.json").exists()
    # transformers ends what the exported model says where this run did.
    assert json.loads((folder / "out/checkpoints/last/config.json").read_text())["eos_token_id"] == 256
    rows = [json.loads(line) for line in (folder / "out/samples.jsonl").read_text().splitlines()]
    assert sorted(row["prompt_id"] for row in rows) == [f"k{i}" for i in range(8)]
    assert all(row["prompt"] == f"opening {row['prompt_id'][1:]}" for row in rows)
    assert train()[0] == 2


def test_a_reward_model_with_another_tokenizer_reads_the_text(folder, train):
    """Its tokens: the bytes from last to first, and "in" as one."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    core = Tokenizer(models.BPE({s: i for i, s in enumerate([*symbols, "in"])}, [("i", "n")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    theirs = PreTrainedTokenizerFast(tokenizer_object=core)
    theirs.save_pretrained(save_value(folder / "reward", vocab_size=257, max_position_embeddings=128))
    code, _, err = train("--reward.function", "null", "--reward.model", "reward", "--generation.samples", "2")
    assert (code, err) == (0, "")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "reward").eval()
    rows = [json.loads(line) for line in (folder / "out/samples.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 4 * 2
    for row in rows:
        ids = torch.tensor([theirs(row["prompt"] + row["response"])["input_ids"]])
        with torch.no_grad():
            score = model(ids, attention_mask=torch.ones_like(ids)).logits[0, 0]
        assert row["reward"] == pytest.approx(float(score), abs=1e-5)
