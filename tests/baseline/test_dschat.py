"""The DeepSpeed-Chat baseline against the reference: ZeRO on two gloo processes, fp32, greedy.

One start of processes runs all cases: importing and starting DeepSpeed is what takes time (its first start
on a machine also compiles its shared-memory collectives).
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from puzzle.config.run import TrainConfig
from puzzle.errors import exit_code
from puzzle.runlog import UNFAITHFUL, load_runs
from tests.baseline import chat_ranks
from tests.baseline.chat_ranks import CHAT, Case
from tests.helpers import run_ranks
from tests.reference.hf_ppo import ReferencePPO, run_reference
from tests.reference.tiny import save_lm, save_value
from tests.rlhf.ppo_truth import reference_config

pytestmark = [
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="the package deepspeed is not installed"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed compiles its collectives: no c++ here"),
]
WARNING = (
    "the Hybrid Engine was asked for but cannot engage: its inference kernels need a GPU, this run is on cpu"
)
ITERATIONS = 3
LENGTHS = (3, 7, 1, 12, 5, 9, 2, 6)
# Zero's settings, the algorithm's, and whether answers may end early.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "ZeRO-0": ({}, {"microbatch": 4}, False),
    "ZeRO-1": ({"actor_zero_stage": 1, "critic_zero_stage": 1}, {"microbatch": 2}, True),
    "ZeRO-2, mean of means": (
        {"actor_zero_stage": 2, "critic_zero_stage": 1},
        {"microbatch": 1, "minibatch": 4, "loss_average": "microbatch", "whiten": True},
        True,
    ),
    "ZeRO-3": (
        {
            "actor_zero_stage": 3,
            "critic_zero_stage": 3,
            "actor_gradient_checkpointing": True,
            "critic_gradient_checkpointing": True,
            "enable_hybrid_engine": True,
        },
        {"microbatch": 2, "minibatch": 4, "epochs": 2},
        True,
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    lm = {role: save_lm(base / role, seed=seed) for role, seed in (("actor", 0), ("reference", 2))}
    value = {role: save_value(base / role, seed=seed) for role, seed in (("critic", 1), ("reward", 3))}
    folders = lm | value
    # As transformers 4 writes it, where this one writes new keys.
    file = folders["critic"] / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    file.write_text(
        json.dumps(config | {"rope_theta": rope["rope_theta"], "torch_dtype": config.pop("dtype")})
    )
    return folders


@pytest.fixture(scope="module")
def prompts() -> tuple[tuple[int, ...], ...]:
    generator = torch.Generator().manual_seed(5)
    return tuple(tuple(torch.randint(0, 259, (n,), generator=generator).tolist()) for n in LENGTHS)


def configured(folders: dict[str, Path], zero: dict[str, Any], ppo: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "iterations": ITERATIONS,
        "batch": len(LENGTHS),
        "seed": 11,
        "device": "cpu",
        "layout": {"dp": 2},
        "checkpoint": {"save": False},
        "data": {"prompts": "given", "tokenizer": "bytes", "max_prompt_tokens": 32},
        "generation": {"greedy": True, "max_new_tokens": 6, "temperature": 0.9, "decode_microbatch": 3},
        "algorithm": {"old_logprobs": "recompute", **ppo},
        "intra": {"fuse_training": False, "fuse_inference": False},
        "log": {"variant": "dschat", "provenance": "rehearsal", "plots": False},
        **{role: {"model": str(folder)} for role, folder in folders.items()},
    }
    for role in ("actor", "critic"):
        # Where no norm is logged, clipping would hide gradients of another size.
        config[role]["optimizer"] = {"lr": 1e-4, "eps": 1e-4, "grad_clip": 1.0 if zero else None}
    return config


@pytest.fixture(scope="module")
def runs(
    folders: dict[str, Path], prompts: tuple, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Case, list[Any]]]:
    """Every case with what its ranks found."""
    base = tmp_path_factory.mktemp("runs")
    plain = reference_config(TrainConfig.model_validate(configured(folders, {}, {})), ())
    models = [folders[role] for role in ("actor", "critic", "reference", "reward")]
    answers = ReferencePPO(*models, plain).greedy([list(prompt) for prompt in prompts])
    stop = answers[0][2]
    cases = [
        Case(configured(folders, zero, ppo), zero, base / str(i), prompts, (stop,) if ends else ())
        for i, (zero, ppo, ends) in enumerate(CASES.values())
    ]
    spoiled = configured(folders, {}, {"microbatch": 4})
    spoiled["iterations"] = 1
    spoiled["generation"]["temperature"] = 0.05  # untrained weights hardly prefer any token
    cases.append(Case(spoiled, {}, base / "spoiled", prompts, spoiled=True))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    found = run_ranks(chat_ranks.run, 2, 2, cases, timeout=600.0)
    return {
        name: (case, list(per))
        for name, case, per in zip([*CASES, "spoiled"], cases, zip(*found, strict=True), strict=True)
    }


def samples(case: Case) -> list[list[list[int]]]:
    """Per iteration the responses that the log shows."""
    lines = [json.loads(line) for line in (case.out / "samples.jsonl").read_text().splitlines()]
    shown: list[list[list[int]]] = [[] for _ in range(ITERATIONS)]
    for line in lines:
        shown[line["iteration"]].append([int(word) for word in line["response"].split()])
    return shown


def per_iteration(values: Sequence[float]) -> list[float]:
    """Means over the optimizer steps of each iteration."""
    steps = len(values) // ITERATIONS
    return [sum(values[i * steps : (i + 1) * steps]) / steps for i in range(ITERATIONS)]


@pytest.mark.parametrize("name", CASES)
def test_losses_weights_and_answers_equal_the_reference(
    runs: dict, folders: dict[str, Path], name: str
) -> None:
    case, found = runs[name]
    config = reference_config(TrainConfig.model_validate(case.config), case.stop_ids)
    asked = [list(prompt) for prompt in case.prompts]
    actor, critic, reference, reward = (folders[r] for r in ("actor", "critic", "reference", "reward"))
    truth = run_reference(actor, critic, reference, reward, asked, config, iterations=ITERATIONS)
    assert samples(case) == [rollout.responses for rollout in truth.rollouts]
    (run,) = load_runs(case.out).runs
    for role in ("actor", "critic"):
        losses = per_iteration([step.losses[role] for step in truth.steps])
        assert [i.metrics[f"{role}_loss"] for i in run.iterations] == pytest.approx(
            losses, rel=1e-5, abs=1e-5
        )
        if name != "ZeRO-0":  # DeepSpeed knows no norm there in fp32
            norms = per_iteration([step.grad_norms[role] for step in truth.steps])
            assert [i.metrics[f"{role}_grad_norm"] for i in run.iterations] == pytest.approx(norms, rel=1e-3)
        expected = getattr(truth, f"{role}_weights")
        for rank in found:
            assert rank.weights[role].keys() == expected.keys()
            for tensor, value in rank.weights[role].items():
                torch.testing.assert_close(
                    value, expected[tensor], rtol=1e-5, atol=1e-5, msg=f"{role} {tensor}"
                )


def test_the_log_is_one_of_ours_and_reads_like_a_published_one(runs: dict) -> None:
    case, _ = runs["ZeRO-3"]
    loaded = load_runs(case.out)
    (run,) = loaded.runs
    assert not loaded.reports
    assert [r.what for r in run.reports] == [f"the run warned: {WARNING}"]
    assert (run.variant, len(run.iterations)) == ("dschat", ITERATIONS)
    assert run.config["deepspeed"]["hybrid_engine_engaged"] is False
    assert "GPU" in run.config["deepspeed"]["hybrid_engine_obstacle"]
    text = (case.out / "run.log").read_text()
    assert f"warning: {WARNING}\n" in text
    assert "note: DeepSpeed-Chat without its Hybrid Engine\n" in text
    assert text.count("|E2E latency=") == ITERATIONS
    for iteration in run.iterations:
        assert min(iteration.stage_seconds[s] for s in ("generation", "inference", "training")) > 0


def test_tokens_that_the_weights_would_not_give_are_named(runs: dict) -> None:
    case, _ = runs["spoiled"]
    (run,) = load_runs(case.out).runs
    said = [report.what for report in run.reports]
    assert any(UNFAITHFUL in text for text in said), said


def test_shards_are_counted_as_such(runs: dict) -> None:
    def held(name: str) -> int:
        lines = (runs[name][0].out / "run.jsonl").read_text().splitlines()
        return next(r["parameter_bytes"] for r in map(json.loads, lines) if r["record"] == "rank")

    assert held("ZeRO-3") < 0.75 * held("ZeRO-1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--actor_zero_stage", "4"], "invalid choice: 4"),
        (
            ["--per_device_generation_batch_size", "3", "--num_processes", "2", "--algorithm.minibatch", "3"],
            "do not divide",
        ),
        (["--dtype", "fp16"], "fp16 is not supported"),
        (["--checkpoint.every", "2"], "the baseline is run for its log"),
        (["--algorithm.microbatch_tokens", "64"], "replicas must run equally many passes"),
        (["--algorithm.correction.kind", "truncate"], "generate gives no log-probs to correct"),
        (["--actor.layout.pp", "2"], "layout"),
        (["--enable_cuda_graph", "--enable_hybrid_engine", "--actor_zero_stage", "3"], "below 3"),
        (["--enable_cuda_graph", "--enable_hybrid_engine"], "one length"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    words: list[str],
    said: str,
) -> None:
    base = refused(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])  # which the script changes
    monkeypatch.setattr(sys, "argv", [*base[1:], *words])
    assert exit_code(runpy.run_path(base[1])["main"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "out").exists()


def test_a_mistake_is_one_line_of_the_command(tmp_path: Path) -> None:
    words = [*refused(tmp_path), "--dtype", "fp16"]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert ended.stderr.startswith("error: ")


def refused(folder: Path) -> list[str]:
    """A command that would start if there were nothing wrong."""
    init = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = {
        "batch": 2,
        "data": {"random_tokens": 4},
        "actor": {"init": init | {"num_attention_heads": 2}},
        "reward": {"init": init | {"num_attention_heads": 2}},
    }
    (folder / "c.json").write_text(json.dumps(config))
    script = [sys.executable, str(CHAT / "main.py")]
    return [*script, "--config", str(folder / "c.json"), "--out", str(folder / "out")]
