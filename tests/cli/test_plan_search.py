"""`puzzle plan search` and `puzzle train --plan` from the command line."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from puzzle.cli import main
from puzzle.cli.layouts import options_of
from puzzle.cli.workloads import workload_of
from puzzle.config.load import load_config
from puzzle.config.resolve import resolve
from puzzle.plan.pipeline.schedules import PipelineModel, forward_only, one_f_one_b
from puzzle.plan.predict.job import Choice
from puzzle.plan.simulate.check import checked

CONFIG = """\
actor: {init: {preset: 7b}}
critic: {init: {preset: 350m}}
reward: {init: {preset: 350m}}
layout: {tp: 1, pp: 4}
batch: 32
dtype: bf16
data: {random_tokens: 256}
generation: {max_new_tokens: 128}
algorithm: {microbatch_tokens: 4096}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


def searched(config: Path, capsys, *more: str) -> dict:
    given = ["plan", "search", "--config", str(config), "--gpus", "4", *more]
    assert main([*given, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def flags(options: Mapping[str, Any]) -> list[str]:
    """As a person would give them."""
    words = ((key, value if isinstance(value, str) else json.dumps(value)) for key, value in options.items())
    return [word for key, value in words for word in (f"--{key}", value)]


def test_every_plan_is_one_that_runs(config: Path, capsys) -> None:
    """It resolves, fits, has legal schedules, and is predicted as it was found."""
    found = searched(config, capsys, "--top", "4")
    assert len(found["plans"]) == 4
    seconds = [plan["end_to_end"] for plan in found["plans"]]
    assert seconds == sorted(seconds)
    for row in found["plans"]:
        options = flags(row["options"])
        assert (
            main(["train", "--config", str(config), *options, "--dry-run", "--device-memory", "141GB"]) == 0
        )
        capsys.readouterr()
        predict = ["plan", "predict", "--config", str(config), "--calibration", "h200", *options, "--json"]
        assert main(predict) == 0
        alone = json.loads(capsys.readouterr().out)
        assert alone["end_to_end"] == pytest.approx(row["end_to_end"])
        assert alone["memory"]["bytes"] == row["memory_bytes"] <= 150109880320
        plan = resolve(load_config(config, options))
        assert plan.world == 4
        stages, size = plan.actor.layout.pp, row["options"]["algorithm.microbatch"]
        count = -(-plan.batch.minibatch // size)
        models = tuple(PipelineModel(role, count) for role in plan.training.roles)
        checked(one_f_one_b, models, stages, split=plan.config.intra.split_backward)
        judged = tuple(PipelineModel(role, count) for role in plan.inference.roles)
        checked(forward_only, judged, stages)


def test_invariant_numerics_are_counted_and_cut_alike(config: Path, capsys) -> None:
    """Beyond 32 devices by closed forms; no plan has more tensor ranks than sums have parts."""
    more = ["--gpus", "64", "--top", "5", "--numerics"]
    plain, most, two = (
        searched(config, capsys, *more, *numerics)["plans"]
        for numerics in (
            ["fast"],
            ["invariant", "--numerics_parts", "8"],
            ["invariant", "--numerics_parts", "2"],
        )
    )
    assert {plan["options"]["generation.layout.tp"] for plan in plain} - {1, 2}
    fast, parts = (
        {json.dumps(plan["options"]): plan["memory_bytes"] for plan in plans} for plans in (plain, most)
    )
    assert len(fast.keys() & parts.keys()) > 1
    assert all(fast[options] < parts[options] for options in fast.keys() & parts.keys())
    keys = ("layout.tp", "generation.layout.tp")
    assert {plan["options"][key] for plan in two for key in keys} <= {1, 2}


def test_plans_say_why_they_are_not_taken(config: Path, capsys) -> None:
    assert main(["plan", "search", "--config", str(config), "--gpus", "4", "--calibration", "a100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("*") for line in lines) == 1
    plans = [line for line in lines if " -> " in line and "micro-batches of" in line]
    reasons = [line.strip() for line in lines if line.startswith(" " * 12)]
    assert len(plans) == len(reasons) == 10
    assert sum(reason.startswith("taken: ") for reason in reasons) == 1
    assert all(r.startswith(("taken: ", "tied (", "+")) for r in reasons)
    assert "from data sheets: expect it to be off by 15% either way" in lines


def test_a_run_takes_a_plan_from_a_file_or_finds_it(config: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "plan.json"
    found = searched(config, capsys, "--out", str(out))
    assert json.loads(out.read_text()) == found
    options = found["plans"][found["taken"]]["options"]
    for plan in (str(out), "auto"):
        assert main(["train", "--config", str(config), "--plan", plan, "--dry-run=json"]) == 0
        said = capsys.readouterr()
        config_then = json.loads(said.out)
        for key, value in options.items():
            at = config_then
            for part in key.split("."):
                at = at[part]
            assert at == value, key
        assert said.err.startswith(f"plan ({out if plan != 'auto' else 'h200 predicts'}")
        assert f"layout.tp {options['layout.tp']}, layout.pp {options['layout.pp']}" in said.err


def test_layouts_of_roles_and_lists_of_stages_give_way(config: Path, tmp_path: Path, capsys) -> None:
    config.write_text(CONFIG + "reference: {layout: {tp: 4, pp: 1, stages: [32]}}\n")
    found = searched(config, capsys, "--top", "1")
    options = found["plans"][0]["options"]
    assert options["reference.layout.stages"] == "even"
    assert options["reference.layout.pp"] == options["layout.pp"]
    assert options["algorithm.microbatch_tokens"] is None
    assert resolve(load_config(config, flags(options))).models["reference"].layout.tp == options["layout.tp"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"schema": 2}', "schema is 2, this version reads 1; search again"),
        ('{"schema": 1, "plans": []}', "plans must be plans of a search"),
        ('{"schema": 1, "plans": [{}], "taken": 1}', "taken must be a whole number from 0 to 0"),
        ('{"schema": 1, "plans": [{"options": {"seed": 3}}], "taken": 0}', "seed is no option of a plan"),
        (
            '{"schema": 1, "plans": [{"options": {"layout.tp": []}}], "taken": 0}',
            "layout.tp must be a number",
        ),
        ("[]", "must hold a JSON object"),
    ],
)
def test_files_that_are_no_plans_are_refused_in_a_line(
    config: Path, tmp_path: Path, capsys, text: str, said: str
) -> None:
    (tmp_path / "plan.json").write_text(text)
    line = ["train", "--config", str(config), "--plan", str(tmp_path / "plan.json"), "--dry-run"]
    assert main(line) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["train", "--plan", "auto", "--dry-run"], "--plan auto needs --config FILE"),
        (["train", "--calibration", "h200", "--dry-run"], "--calibration: only --plan auto rests on one"),
        (["plan", "search", "--config", "CONFIG", "--gpus", "1"], "no plan fits 139.8 GiB per device"),
        (["plan", "search", "--config", "CONFIG", "--gpus", "0"], "from 1 to"),
        (["plan", "search", "--config", "CONFIG", "--gpus", "2", "--batch", "0"], "batch"),
    ],
)
def test_mistakes_are_one_line(config: Path, capsys, line: list[str], said: str) -> None:
    if "1" in line:  # more than any device holds
        config.write_text(CONFIG.replace("preset: 7b", "preset: 33b"))
    assert main([str(config) if word == "CONFIG" else word for word in line]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_keys_of_the_command_line_are_blamed_on_it_and_named_once(config: Path, capsys) -> None:
    """And what a search chooses takes the place of what was given, lists too."""
    line = [str(config), "--gpus", "2", "--top", "2", "--ppo.clip", "0.3", "--layout.stages", "8,8,8,8"]
    assert main(["plan", "search", "--config", *line]) == 0
    assert capsys.readouterr().err.count("note: the command line: ppo is now algorithm") == 1
    for command in (["search", "--gpus", "2"], ["predict", "--calibration", "h200"]):
        words = ["--config", str(config), "--batch", "7", "--algorithm.minibatch", "5"]
        assert main(["plan", *command, *words]) == 2
        assert capsys.readouterr().err.startswith(
            "error: command line: algorithm.minibatch 5 does not divide"
        )


def test_plans_have_room_for_what_is_kept(tmp_path: Path, config: Path, capsys) -> None:
    """Where generation.keep_graphs says that it stays, plans without that room are none."""
    one = ["--gpus", "1", "--top", "1", "--actor.init.preset", "350m", "--generation.keep_graphs"]
    plain, kept = (searched(config, capsys, *one, word)["plans"][0] for word in ("false", "true"))
    assert kept["memory_bytes"] > plain["memory_bytes"]
    assert kept["stages"]["generation"] < plain["stages"]["generation"]
    calibration = json.loads(Path("puzzle/plan/predict/profiles/h200.json").read_text())
    calibration["memory_bytes"] = kept["memory_bytes"] - 1
    (tmp_path / "small.json").write_text(json.dumps(calibration))
    words = ["--config", str(config), *one, "true", "--calibration", str(tmp_path / "small.json"), "--json"]
    assert main(["plan", "search", *words]) == 0
    smaller = json.loads(capsys.readouterr().out)
    assert smaller["too_large"] > 0
    assert smaller["plans"][0]["memory_bytes"] < kept["memory_bytes"]


def test_options_are_what_was_chosen(config: Path) -> None:
    """Every decision, in one choice or another, through the configuration to the work that is predicted."""
    plain = Choice((1, 4, 1), (2, 2, 1), 2)
    for choice in (
        plain,
        replace(plain, recompute=True, fuse_training=True, slots=7),
        replace(plain, split=True, fuse_inference=True, offload=True, decode=5),
    ):
        work = workload_of(
            resolve(
                load_config(config, flags(options_of(choice, {"algorithm": {"microbatch_tokens": 4096}})))
            )
        )
        assert (work.microbatch, work.decode, work.slots) == (2, choice.decode, choice.slots)
        assert (work.split, work.recompute, work.offload) == (choice.split, choice.recompute, choice.offload)
        assert (work.fuse_training, work.fuse_inference) == (choice.fuse_training, choice.fuse_inference)
        layouts = [(one.tp, one.pp, one.dp) for one in (work.actor.layout, work.generation)]
        assert layouts == [choice.training, choice.generation]
