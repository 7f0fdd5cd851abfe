import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from puzzle.cli import main

ROOT = Path(__file__).parents[2]
CONFIG = """\
actor:
  init: {vocab_size: 258, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2,
         num_attention_heads: 8}
reward: {function: "puzzle.rlhf.rewards:vader_sentiment"}
data: {prompts: prompts.jsonl, tokenizer: bytes}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The soup was"}\n' * 40)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    (tmp_path / "ended/checkpoints/last").mkdir(parents=True)
    (tmp_path / "ended/checkpoints/last/config.json").write_text("{}")
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2/config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "used").mkdir()
    (tmp_path / "used/run.jsonl").write_text("{}\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "fine"}\n{"prompt": "cut\n')
    (tmp_path / "gaps.jsonl").write_text('{"prompt": " "}\n')
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "weights.gguf").write_text("GGUF")
    return tmp_path


RUN = ["train", "--config", "run.yaml", "--out", "o"]
BAD = [
    ([], "usage: puzzle COMMAND"),
    (["trian"], "trian: unknown command; there are train"),
    (["train"], "actor: no model"),
    (["train", "--config"], "expected one argument"),
    (["train", "--config", "absent.yaml"], "absent.yaml: no such file"),
    (["train", "--config", "run.yaml"], "--out DIR is missing"),
    ([*RUN, "--algorithm.clp", "1"], "did you mean algorithm.clip?"),
    ([*RUN, "--out", "run.yaml"], "is a file, not a folder"),
    ([*RUN, "--out", "used"], "already holds a run"),
    ([*RUN, "--out", "/proc/x"], "/proc/x: "),
    ([*RUN, "--actor.model", "absent"], "actor.model: absent: no such folder"),
    ([*RUN, "--actor.model", "empty", "--data.tokenizer", "bytes"], "empty has no config.json"),
    (
        [*RUN, "--actor.model", "ended", "--data.tokenizer", "bytes"],
        "but that of a run, whose model is ended/checkpoints/last",
    ),
    ([*RUN, "--critic.model", "broken"], "broken/config.json: not valid JSON"),
    ([*RUN, "--reward.model", "weights.gguf"], "is a file, not a model folder; puzzle convert makes"),
    ([*RUN, "--reward.model", "gpt2"], "reward.model: gpt2: config: model_type 'gpt2' is not supported"),
    ([*RUN, "--data.prompts", "gone.jsonl"], "gone.jsonl: no such file"),
    ([*RUN, "--data.prompts", "bad.jsonl"], "error: bad.jsonl:2: not valid JSON"),
    ([*RUN, "--data.prompts", "blank.txt"], "error: blank.txt: holds no prompts"),
    ([*RUN, "--data.prompts", "gaps.jsonl"], "error: gaps.jsonl:1: the prompt is empty"),
    ([*RUN, "--data.field", "text"], "error: prompts.jsonl:1: no field 'text'; it has prompt"),
    ([*RUN, "--data.eval_prompts", "weights.gguf"], "weights.gguf: prompts must be .jsonl"),
    ([*RUN, "--reward.function", "nowhere:score"], "reward.function nowhere:score: No module named"),
    ([*RUN, "--reward.function", "math:score"], "reward.function math:score: math has no function score"),
    ([*RUN, "--actor.init.preset", "8b"], "no published model size '8b'"),
    ([*RUN, "--actor.layers", "3"], "actor.layers is 3, but the model has only 2"),
    ([*RUN, "--critic.init.preset", "7b"], "critic: its vocabulary has 32000 tokens, the actor's 258"),
    ([*RUN, "--generation.max_new_tokens", "1900"], "exceed its 2048 positions"),
    ([*RUN, "--log.variant", "dschat"], "log.variant dschat is another program's: run DeepSpeedExamples/"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_bad_input_ends_with_one_line_and_code_2(folder, capsys, arguments, words):
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert words in out + err
    if arguments:
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_dry_run_prints_the_whole_configuration(folder, capsys):
    """On request, and so that it can be given back; the plan comes first, short, where people look."""
    assert main(["train", "--config", "run.yaml", "--dry-run=json", "--seed", "5"]) == 0
    printed, beside = capsys.readouterr()
    resolved = json.loads(printed)
    assert resolved["seed"] == 5
    assert resolved["critic"]["init"] == resolved["actor"]["init"]
    (folder / "whole.yaml").write_text(printed)
    for words in (["--dry-run"], ["--dry-run=text"]):
        assert main(["train", "--config", "whole.yaml", *words]) == 0
        plan, nothing = capsys.readouterr()
        assert (plan.splitlines()[1:], nothing) == (beside.splitlines()[1:], "")
        assert plan.startswith("run plan ")
        assert len(plan.splitlines()) < 30
    steps = (
        resolved["iterations"]
        * resolved["batch"]
        // (resolved["algorithm"]["minibatch"] or resolved["batch"])
    )
    assert f"{resolved['iterations']} iterations, {steps} optimizer steps of actor and critic" in plan
    assert main(["train", "--config", "run.yaml", "--dry-run=yaml"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(p.name for p in folder.iterdir() if p.name == "o") == []


def test_dry_run_shows_the_job_that_slurm_would_be_asked_for(folder, capsys, monkeypatch):
    (folder / "mine.yaml").write_text("time: '1:00:00'\n")
    monkeypatch.setenv("PUZZLE_SLURM", str(folder / "mine.yaml"))
    words = ["train", "--config", "run.yaml", "--out", "o", "--launcher", "slurm"]
    for how in (["--dry-run"], ["--dry-run=text"], ["--dry-run", "json"]):
        assert main([*words[:1], *how, *words[1:]]) == 0
        out, err = capsys.readouterr()
        asked, command = (err or out).splitlines()[-2:]
        assert command.endswith(f" -m puzzle.cli {' '.join(words)}")
    assert asked.startswith("job: 1 cores, limit 1:00:00")
    assert asked.endswith("as mine.yaml says; submitted by")
    assert " --time=1:00:00 " in command
    assert not (folder / "o").exists()


def test_help_names_every_command_and_key_without_torch():
    code = (
        "import sys; from puzzle.cli import main\n"
        "assert main(['--help']) == 0 and main(['train', '--help']) == 0 and main(['--version']) == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "train " in done.stdout
    assert "--actor.optimizer.lr" in done.stdout


def test_the_reader_of_the_help_may_leave():
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, "-m", "puzzle.cli", "--help"]
    done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_interrupted(monkeypatch):
    monkeypatch.setattr("puzzle.cli.train.run", lambda words: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["train"]) == 130
