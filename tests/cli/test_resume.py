"""A killed run goes on as if nothing had happened; what cannot go on says why."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Self

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils import chat_template_utils

from puzzle.cli import main, train
from puzzle.data.tokenizers import byte_tokenizer
from puzzle.errors import UserError
from puzzle.rlhf import trainer
from puzzle.runlog import folders, load_runs

ROOT = Path(__file__).parents[2]
CONFIG = """\
iterations: 6
batch: 8
actor:
  init: {vocab_size: 258, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
         num_attention_heads: 4, max_position_embeddings: 128}
  optimizer: {lr: 1.0e-3, schedule: cosine, warmup: 2}
reward: {function: "puzzle.rlhf.rewards:vader_sentiment"}
data: {prompts: prompts.jsonl, tokenizer: bytes, max_prompt_tokens: 40}
generation: {max_new_tokens: 8}
algorithm: {minibatch: 4, reward_norm: true, kl: {target: 0.1}}
checkpoint: {every: 1, keep: 3}
log: {provenance: rehearsal, variant: tiny, plots: false}
"""
RUN = ["train", "--config", "run.yaml", "--out"]
START = "import sys; from puzzle.cli import main; sys.exit(main(sys.argv[1:]))"


def killed(folder: Path, out: Path) -> None:
    """A run that dies by SIGKILL some time after its second checkpoint."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", START, *RUN, str(out)]
    run = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    try:
        while not (out / "checkpoints" / "state-2").exists():
            assert run.poll() is None
            time.sleep(0.001)
    finally:
        run.kill()
    assert run.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`alone`: a run left alone; `killed`: one that was killed."""
    base = tmp_path_factory.mktemp("resume")
    (base / "run.yaml").write_text(CONFIG)
    words = (
        "soup",
        "film",
        "sea",
        "long road",
        "first day of the year",
        "dog",
        "end",
        "noise next door",
        "a",
        "tea",
    )
    (base / "prompts.jsonl").write_text("".join(f'{{"prompt": "The {word} was"}}\n' for word in words))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)
        assert main([*RUN, "alone"]) == 0
        killed(base, base / "killed")
    return base


@pytest.fixture(autouse=True)
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / "last" / "model.safetensors")


ODD = ("iteration-1.bak", "iteration-\u0662", "iteration-01", "state-1.bak", "state-\u00b2", "state-x")


def test_the_same_layout_ends_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    """Copies and files with odd names beside the checkpoints change nothing, and stay."""
    out = Path(shutil.copytree(folder / "killed", tmp_path / "again"))
    for name in ODD:
        (out / "checkpoints" / name).mkdir()
    (out / "checkpoints" / "state-99").touch()
    assert main(["train", "--resume", "--out", str(out)]) == 0
    alone, again = load_runs(folder / "alone").runs[0], load_runs(out).runs[0]
    ours, theirs = weights(out), weights(folder / "alone")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [i.metrics for i in again.iterations] == [i.metrics for i in alone.iterations]
    records = [json.loads(line) for line in (out / "run.jsonl").read_text().splitlines()]
    (resume,) = (record for record in records if record["record"] == "resume")
    assert 2 <= resume["iteration"] < 6
    assert resume["checkpoint"] == f"checkpoints/state-{resume['iteration']}"
    assert resume["changed"] == {}
    assert records[-1]["status"] == "completed"
    left = {path.name for path in (out / "checkpoints").iterdir()}
    assert left >= {*ODD, "state-99", "state-4", "state-5", "state-6", "last", "last-critic"}


def test_another_layout_goes_on_with_the_same_losses(folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(folder / "killed", tmp_path / "wider"))
    assert main(["train", "--resume", "--out", str(out), "--layout.dp", "2"]) == 0
    alone, again = load_runs(folder / "alone").runs[0], load_runs(out).runs[0]
    for ours, theirs in zip(again.iterations, alone.iterations, strict=True):
        spread = {"balance": ours.metrics["balance"]}  # of replicas: here there are two
        assert ours.metrics == pytest.approx({**theirs.metrics, **spread}, rel=1e-4, abs=1e-5)


def test_a_damaged_checkpoint_is_said_and_the_former_used(folder: Path, tmp_path: Path, capsys) -> None:
    out = Path(shutil.copytree(folder / "killed", tmp_path / "damaged"))
    last = max((out / "checkpoints").glob("state-?"))
    (last / "rank-00000.safetensors").write_bytes(b"short")
    assert main(["train", "--resume", "--out", str(out), "--iterations", "4"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"warning: {last} is damaged: rank-00000.safetensors has 5 bytes")
    assert said[1:] == ["warning: resumed with other settings: iterations 6 -> 4"]
    warnings = [
        json.loads(line) for line in (out / "run.jsonl").read_text().splitlines() if '"warning"' in line
    ]
    assert any("is damaged" in warning["text"] for warning in warnings)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--resume needs --out DIR"),
        (["--out", "nowhere"], "nowhere holds no run; without --resume one begins"),
        (["--out", "nowhere", "--config", "run.yaml"], "nowhere holds no run"),
        (
            ["--out", "copy", "--actor.init.hidden_size", "64"],
            "actor: the checkpoint is of a model of another shape",
        ),
        (
            ["--out", "copy", "--actor.lora.rank", "4"],
            "actor: the checkpoint is of a model of another shape, or with other adapters (lora.rank",
        ),
        (["--out", "copy", "--seed", "7"], "seed is 7 but 0 in the checkpoint"),
        (["--out", "copy", "--log.variant", "other"], "holds a run with variant 'tiny', not 'other'"),
    ],
)
def test_what_cannot_go_on_says_why(
    folder: Path, tmp_path: Path, monkeypatch, capsys, arguments, words
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run.yaml", "prompts.jsonl"):
        shutil.copy(folder / name, tmp_path)
    shutil.copytree(folder / "killed", tmp_path / "copy")
    assert main(["train", "--resume", *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("old", [False, True])
def test_the_command_line_changes_what_was_given_not_what_came_of_it(
    folder: Path, tmp_path: Path, capsys, old: bool
) -> None:
    """`old`: a log that holds the resolved configuration alone."""
    out = tmp_path / "out"
    out.mkdir()
    record = json.loads((folder / "killed/run.jsonl").read_text().splitlines()[0])
    del record["crc"]
    if old:
        del record["given"]
    (out / "run.jsonl").write_text(json.dumps(record) + "\n")
    model = ["--actor.init.hidden_size", "64", "--critic.layout.dp", "2"]
    words = ["train", "--resume", "--out", str(out), "--layout.tp", "2", "--layout.dp", "4", *model]
    assert main([*words, "--critic.layout.pp", "2", "--dry-run=json"]) == 0
    config = json.loads(capsys.readouterr().out)
    for role in ("actor", "generation", "reference"):
        assert (config[role]["layout"]["tp"], config[role]["layout"]["dp"]) == (2, 4)
    critic = config["critic"]["layout"]
    assert (critic["tp"], critic["pp"], critic["dp"]) == (2, 2, 2)
    assert {config[role]["init"]["hidden_size"] for role in ("actor", "critic", "reference")} == {64}
    assert (config["iterations"], config["actor"]["optimizer"]["lr"]) == (6, 1e-3)


def digests(out: Path) -> dict[str, str]:
    """Of every model folder's weights."""
    files = sorted((out / "checkpoints").glob("*/model.safetensors"))
    return {file.parent.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_finished_run_leaves_a_state_and_nothing_untrained_replaces_a_model(tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    words = ["--checkpoint.every", "0", "--iterations", "2", "--checkpoint.best", "true", "--eval.every", "1"]
    assert main([*RUN, str(out), *words, "--data.eval_prompts", "prompts.jsonl"]) == 0
    assert (out / "checkpoints/state-2/manifest.json").is_file()
    before = digests(out)
    assert before.keys() == {"best", "last", "last-critic"}
    resume = ["train", "--resume", "--out", str(out)]
    assert main(resume) == 0  # nothing is left to do
    assert digests(out) == before
    assert main([*resume, "--iterations", "3", "--actor.optimizer.lr", "0.002"]) == 0
    said = capsys.readouterr().err
    assert "resumed with other settings: actor.optimizer.lr 0.001 -> 0.002, iterations 2 -> 3\n" in said
    records = [json.loads(line) for line in (out / "run.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in records if r["record"] == "iteration"] == [0, 1, 2]
    before = digests(out)
    for state in (out / "checkpoints").glob("state-*"):
        shutil.rmtree(state)
    assert main([*resume, "--iterations", "4"]) == 2
    assert "holds models (last, last-critic) but no state-N to go on from" in capsys.readouterr().err
    assert digests(out) == before
    shutil.rmtree(out / "checkpoints")
    assert main([*resume, "--iterations", "4"]) == 2
    assert "is complete and left no checkpoint" in capsys.readouterr().err


def test_a_run_that_goes_on_on_another_day_writes_its_first_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Into the prompts of a template with a clock, which are not those of the checkpoint otherwise."""
    tokenizer = byte_tokenizer()
    written = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.chat_template = f"{{{{ strftime_now('%d %b %Y %H:%M:%S') }}}}{written}"
    tokenizer.save_pretrained(tmp_path / "dated")
    options = ["--data.tokenizer", str(tmp_path / "dated"), "--data.chat_template", "true"]
    words = [*RUN, str(tmp_path / "out"), *options, "--data.max_prompt_tokens", "60"]
    assert main([*words, "--iterations", "1"]) == 0

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls.fromtimestamp(time.time() + 86400, tz)

    for module in (chat_template_utils, train, trainer):
        monkeypatch.setattr(module, "datetime", Tomorrow)
    assert main([*words, "--iterations", "2", "--resume"]) == 0, capsys.readouterr().err
    log = tmp_path / "out/run.jsonl"
    header, *rest = (json.loads(line) for line in log.read_text().splitlines())
    assert [record["iteration"] for record in rest if record["record"] == "iteration"] == [0, 1]
    # A run of another day has other prompts, so that the dates above are compared at all.
    header["started"] = Tomorrow.now(UTC).isoformat()
    header.pop("crc")
    log.write_text("\n".join([json.dumps(header), *log.read_text().splitlines()[1:], ""]))
    assert main([*words, "--iterations", "3", "--resume"]) == 2
    assert "the prompts or their tokens are not those of the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["checkpoints", "ranks", "plots", "run.log", "traces"])
@pytest.mark.parametrize("kind", ["dangling", "other"])
def test_what_stands_in_the_way_is_noticed_before_training(
    tmp_path: Path, capsys, name: str, kind: str
) -> None:
    place = tmp_path / "out" / name
    place.parent.mkdir()
    if kind == "dangling":
        place.symlink_to(tmp_path / "nowhere")
    elif name == "run.log":
        place.mkdir()
    else:
        place.touch()
    assert main([*RUN, str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {place}: ")
    assert err.count("\n") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_what_was_saved_before_training_does_not_forbid_to_begin_again(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/best").mkdir(parents=True)
    (tmp_path / "checkpoints/best/config.json").touch()
    head = {"seq": 0, "time": 1.0}
    stages = dict.fromkeys(("generation", "inference", "training", "switch", "other"), 1.0)
    trained = {
        "record": "iteration",
        "iteration": 0,
        "stage_seconds": stages,
        "e2e_seconds": 5.0,
        "metrics": {},
    }
    saved = {"record": "checkpoint", "path": "checkpoints/best"}
    logs = {  # what the log tells of, whether the model that is there may be replaced
        True: [[], [saved | {"iteration": 0}], [saved | {"iteration": 0}, trained]],
        False: [[trained], [saved | {"iteration": 0}, trained, saved | {"iteration": 1}]],
    }
    for free, told in logs.items():
        for records in told:
            lines = [json.dumps(head | record) for record in records]
            (tmp_path / "run.jsonl").write_text("\n".join(lines) + "\n")
            if free:
                folders.refuse_replacing(tmp_path / "checkpoints")
            else:
                with pytest.raises(UserError, match=r"holds models \(best\) but no state-N"):
                    folders.refuse_replacing(tmp_path / "checkpoints")
    for name in ("last", "last-critic"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "config.json").touch()
    with pytest.raises(UserError, match=r"--actor.model \S+/checkpoints/last from that model"):
        folders.refuse_replacing(tmp_path / "checkpoints")
