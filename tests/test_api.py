"""`import puzzle` in programs: scripts without a guard, standard input like a notebook, frames of logs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import puzzle
from puzzle.runlog import RunHeader, RunWriter
from puzzle.runlog.records import End, Evaluation, Iteration, Resume, Switch

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
import os, puzzle
from pathlib import Path
print("started", flush=True)
Path("prompts.jsonl").write_text('{"prompt": "abc"}\\n{"prompt": "xyz"}\\n')
shape = dict(vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
             num_attention_heads=2, max_position_embeddings=64)
config = dict(device="cpu", iterations=3, batch=2, actor=dict(init=shape), generation=dict(max_new_tokens=6),
              data=dict(prompts="prompts.jsonl", tokenizer="bytes", max_prompt_tokens=16),
              log=dict(plots=False))
most = 7.5
def brief(responses):
    return [most - len(response) for response in responses]
"""
SCRIPT = (
    CONFIG
    + """
import json, signal
seen, raised = [], []
two = puzzle.run(config, "out/two", reward=brief, on_iteration=lambda one: seen.append(one.iteration),
                 overrides={"layout.dp": 2})
def stop(one):
    raise ConnectionError(f"enough of {one.iteration}")
try:
    puzzle.run(config, "out/stopped", reward=brief, on_iteration=stop, overrides={"iterations": 200})
except ConnectionError as error:
    raised.append(str(error))
try:
    puzzle.run(config, "out/died", reward=lambda responses: os.kill(os.getpid(), signal.SIGKILL),
               overrides={"reward.workers": 0})
except puzzle.RunError as error:
    raised.append(error.code)
Path("chats.jsonl").write_text('{"prompt": "ab", "response": "c"}\\n' * 4)
data = dict(examples="chats.jsonl", tokenizer="bytes", max_tokens=16)
learnt = puzzle.run(dict(task="sft", iterations=2, batch=2, actor=dict(init=shape), data=data,
                         log=dict(plots=False)), "out/sft")
assert learnt.iterations["actor_loss"].notna().all()
rows = two.iterations["reward"].tolist()
print(json.dumps([seen, raised, rows, two.log.layouts["training"]["dp"], len(two.samples)]))
"""
)


def said(words: list[str], folder: Path, text: str | None = None) -> list[str]:
    """Lines that a Python program prints; it must end well."""
    command = [sys.executable, *words]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    environment["FORCE_COLOR"] = "1"  # as notebooks have it
    done = subprocess.run(command, cwd=folder, env=environment, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_importing_is_light(tmp_path: Path) -> None:
    heavy = "numpy pandas torch transformers pydantic yaml scipy rich"
    script = f"import puzzle, sys; print(sorted(set({heavy.split()!r}) & set(sys.modules)), dir(puzzle))"
    (line,) = said(["-c", script], tmp_path)
    assert line.startswith("[] ")
    assert "'load_run', 'plan_switch', 'run'" in line
    with pytest.raises(AttributeError, match="no attribute 'runs'"):
        puzzle.runs  # noqa: B018


def test_a_missing_package_is_one_line(tmp_path: Path) -> None:
    """Of what the package itself needs, as in an environment for figures alone."""
    script = "import sys, puzzle; sys.modules['pydantic'] = None\ntry: puzzle.run\n"
    (line,) = said(["-c", script + "except Exception as error: print(type(error).__name__, error)"], tmp_path)
    assert line.startswith("UserError the package pydantic is not installed; ")


def test_a_script_without_a_guard_runs_follows_and_ends_runs(tmp_path: Path) -> None:
    """Two processes with a reward of the script; a callback that raises; a rank that is killed."""
    (tmp_path / "script.py").write_text(SCRIPT)
    lines = said(["script.py"], tmp_path)
    assert lines.count("started") == 1
    seen, raised, rewards, dp, samples = json.loads(lines[-1])
    assert seen == [0, 1, 2]
    assert raised == ["enough of 0", 137]
    logged = [json.loads(line) for line in (tmp_path / "out/two/samples.jsonl").read_text().splitlines()]
    assert (dp, samples) == (2, len(logged))
    for iteration, reward in enumerate(rewards):
        own = [7.5 - len(one["response"]) for one in logged if one["iteration"] == iteration]
        assert reward == pytest.approx(sum(own) / len(own))
    ends = (tmp_path / "out/stopped/run.jsonl").read_text().splitlines()
    assert json.loads(ends[-1])["status"] == "interrupted"
    assert len(ends) < 200


@pytest.mark.long
def test_a_program_without_a_file_runs_too(tmp_path: Path) -> None:
    """As the cells of a notebook: nothing that a process could import; several processes."""
    text = CONFIG + (
        'two = puzzle.run(config, reward=brief, overrides={"layout.tp": 2})\n'
        "print(two.folder.parent.name, len(two.iterations))\n"
    )
    lines = said(["-"], tmp_path, text)
    assert lines[-1] == "runs 3"
    assert not any("\x1b[2K" in line for line in lines)  # no bar, which would be drawn again and again


def header(**more: Any) -> RunHeader:
    fields: dict[str, Any] = {
        "run_id": "a",
        "figures": (),
        "cluster": "local",
        "variant": "puzzle",
        "actor": "2x16",
        "critic": None,
        "config": {"iterations": 2, "global_batch_size": 2},
        "layouts": {},
        "provenance": "measured",
        "software": {},
        "hardware": {},
        "git_commit": None,
        "started": None,
    }
    return RunHeader(**{**fields, **more})


def stages(**more: float) -> dict[str, float]:
    return {"generation": 1.0, "inference": 0.0, "training": 2.0, "switch": 0.0, "other": 0.0, **more}


def written(folder: Path) -> Path:
    """A run whose last iteration was done twice."""
    with RunWriter(folder, header()) as log:
        log.write(Evaluation(0, {"reward": 0.5}))
        for iteration, reward in [(0, 1.0), (1, 9.0)]:
            log.write(Iteration(iteration, stages(), 3.0, {"reward": reward}))
            log.sample(iteration, "p", f"r{iteration}", reward=reward, prompt_id=0, held_out=False)
    with RunWriter(folder, header(), resume=True) as log:
        log.write(Resume(1))
        log.write(Switch(1, 0.25, fields={"bytes": 4096}))
        log.write(Iteration(1, stages(switch=0.25), 3.25, {"reward": 2.0, "kl": 0.1}))
        log.sample(1, "p", "r1", reward=2.0, prompt_id=0, held_out=False)
        log.write(End("completed"))
    return folder


def test_frames_hold_what_counts(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    run = puzzle.load_run(written(tmp_path / "run"))
    assert run.folder == tmp_path / "run"
    frame = run.iterations
    assert isinstance(frame, pandas.DataFrame)
    assert frame.index.tolist() == [0, 1]
    assert frame["reward"].tolist() == [1.0, 2.0]
    assert frame["kl"].isna().tolist() == [True, False]
    assert frame["seconds.e2e"].tolist() == [3.0, 3.25]
    assert frame["seconds.switch"].tolist() == [0.0, 0.25]
    assert run.evaluations["reward"].to_dict() == {0: 0.5}
    assert run.switches["bytes"].to_dict() == {1: 4096}
    assert run.samples["reward"].to_dict() == {0: 1.0, 1: 2.0}


def test_without_pandas_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = puzzle.load_run(written(tmp_path / "run"))
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert run.log.iterations[1].metrics["reward"] == 2.0
    with pytest.raises(puzzle.UserError, match="the package pandas is not installed"):
        _ = run.iterations


def test_a_folder_of_several_runs_is_none(tmp_path: Path) -> None:
    written(tmp_path / "one")
    with RunWriter(tmp_path / "two", header(run_id="b")) as log:
        log.write(End("completed"))
    with pytest.raises(puzzle.UserError, match="holds 2 runs; give the folder of one"):
        puzzle.load_run(tmp_path)


def test_a_planned_switch_is_that_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    from puzzle.cli import main

    switch = puzzle.plan_switch(
        "7b", (2, 4, 1), (4, 1, 2), gpus_per_node=4, strategy="fixed-order", itemsize=4, inter_gbs=10.0
    )
    line = "plan switch --from 2,4,1 --to 4,1,2 --model 7b --gpus-per-node 4 --strategy fixed-order"
    line += " --dtype fp32 --inter-gbs 10"
    assert main([*line.split(), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert switch.hash == told["hash"]
    assert switch.bytes_received == sum(pair["bytes"] for pair in told["pairs"])
    assert switch.seconds_model == told["seconds_model"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"config": {"iterationz": 2}}, "config: iterationz: unknown key; did you mean iterations?"),
        ({"config": "absent.yaml"}, "absent.yaml: no such file"),
        ({"config": {}, "overrides": {"batch": "x"}}, "overrides: batch: expected a whole number"),
        ({"config": {}, "launcher": "slurm", "on_iteration": print}, "follows runs of the launcher local"),
    ],
)
def test_bad_requests_are_one_line(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    arguments["config"] = (
        arguments["config"]
        if isinstance(arguments["config"], str)
        else {
            "actor": {"init": {"preset": "7b"}},
            "reward": {"init": {"preset": "350m"}},
            "data": {"random_tokens": 4},
            **arguments["config"],
        }
    )
    with pytest.raises(puzzle.UserError, match=words.replace("?", r"\?")):
        puzzle.run(out=tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []
