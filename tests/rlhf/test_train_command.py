"""`puzzle train` on several processes: what its log proves, and how it refuses and fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from puzzle.cli import main
from puzzle.plan.pipeline.decode_ring import Ring
from puzzle.plan.simulate.timeline import Timeline
from puzzle.runlog import load_runs
from tests.plan.single import forward_only, one_f_one_b

ROOT = Path(__file__).parents[2]
VOCAB, D, F, LAYERS, HEADS, KV = 258, 32, 64, 4, 8, 2
CONFIG = f"""\
iterations: 2
batch: 4
device: cpu
actor:
  init: {{vocab_size: {VOCAB}, hidden_size: {D}, intermediate_size: {F}, num_hidden_layers: {LAYERS},
         num_attention_heads: {HEADS}, num_key_value_heads: {KV}, max_position_embeddings: 64}}
reward: {{function: "puzzle.rlhf.rewards:letter_share"}}
data: {{prompts: prompts.jsonl, tokenizer: bytes, max_prompt_tokens: 16}}
generation: {{max_new_tokens: 4}}
algorithm: {{minibatch: 2, microbatch: 1}}
checkpoint: {{save: false}}
log: {{plots: false}}
"""
MIXED = [
    *("--actor.layout.tp", "2", "--actor.layout.pp", "2", "--critic.layout.pp", "2"),
    *("--critic.layout.dp", "2", "--reference.layout.tp", "4", "--layout.dp", "4"),
    *("--critic.layout.tp", "1", "--reference.layout.dp", "1", "--actor.layout.dp", "1"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The soup was"}\n{"prompt": "Rain"}\n' * 4)
    return tmp_path


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "puzzle.cli", "train", "--config", "run.yaml", *options]


def environment(**values: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **values}


def layer_bytes(tp: int) -> int:
    """fp32 bytes of a layer on a tensor rank that holds `1/tp` of all heads and blocks, kv heads at least
    one."""
    head = D // HEADS
    rows = D // tp + 2 * max(1, KV // tp) * head  # query, key and value rows
    return 4 * (rows * D + D * D // tp + 3 * D * F // tp + 2 * D)


def test_the_log_proves_layouts_and_schedules(folder: Path) -> None:
    done = subprocess.run(
        command("--out", "o", *MIXED, "--log.trace", "1"), env=environment(), capture_output=True, timeout=400
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    (run,) = load_runs(folder / "o").runs
    last = {record["rank"]: record for record in run.ranks}
    assert sorted(last) == [0, 1, 2, 3]
    words = 4 * VOCAB * D
    for rank, record in last.items():
        t, p = rank % 2, rank // 2
        assert record["coordinates"]["actor"] == {"t": t, "p": p, "d": 0}
        assert record["coordinates"]["critic"] == {"t": 0, "p": p, "d": t}
        # 258 words are cut by eighths of 33 rows: 132 on each of 2 ranks, 66 on each of 4.
        actor = 2 * layer_bytes(2) + 4 * 132 * D + (4 * D if p else 0)
        critic = 2 * layer_bytes(1) + (words if p == 0 else 8 * D)
        reference = LAYERS * layer_bytes(4) + 2 * 4 * 66 * D + 4 * D
        assert record["parameter_bytes"] == actor + critic + reference
        moved = record["collective_bytes"]
        # 2 iterations x 2 minibatches; a value head of one row is padded to one row per replica.
        assert moved["reduce_scatter"] == 4 * (critic + (4 * D if p else 0))
        assert moved["all_gather"] == moved["reduce_scatter"]
        assert ("activation" in moved, "gradient" in moved) == (p == 0, p == 1)
        assert moved["tensor_parallel.actor"] > 0
        assert moved["tensor_parallel.reference"] > 0
        assert "tensor_parallel.critic" not in moved
    stages = {record["name"]: record for record in run.stages}
    expected = {
        # The last of five rounds brings the fourth tokens to the second stage.
        "generation": Ring(2, 4, 2).unrolled(((1, 1), *[()] * 4)),
        "inference.reference": forward_only(1, 4, "reference"),
        "inference.critic": forward_only(2, 2, "critic"),
        "training.actor": one_f_one_b(2, 2, "actor", optimizer=True),
        "training.critic": one_f_one_b(2, 1, "critic", optimizer=True),
    }
    assert stages.keys() == expected.keys()
    # Two prompts, each in a pass of its own, of two samples.
    pairs = {"prefill": 2, "prefill_sequences": 1, "decode": 2, "decode_sequences": 2}
    assert stages["generation"]["microbatches"] == {**pairs, "rounds": 5}
    assert len(run.stages) == len(stages)
    for name, schedule in expected.items():
        found = stages[name]
        assert (found["schedule"], found["hash"]) == (schedule.name, schedule.hash)
        assert found["actions"] == schedule.counts()
        assert found["flushes"] == schedule.flushes
        assert 0 <= found["bubble_share"] < 1
    # One micro-batch on two stages: at least half of the time one of the two waits.
    assert stages["training.critic"]["bubble_share"] >= 0.45
    timeline = Timeline.from_perfetto(json.loads((folder / "o/traces/iteration-1.json").read_text()))
    assert timeline.rows == (0, 1, 2, 3)
    kinds = {(span.model, span.category) for span in timeline.spans}
    assert {("actor", "prefill"), ("actor", "backward"), ("critic", "step"), ("", "stage")} <= kinds
    assert any(s.name.startswith("reduce-scatter critic") for s in timeline.spans)


def test_a_run_without_anything_to_infer(folder: Path) -> None:
    free = ("--algorithm.name", "rloo", "--algorithm.reference_free", "true", "--generation.samples", "2")
    run = subprocess.run(
        command("--out", "free", *free), env=environment(), capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    (log,) = load_runs(Path("free")).runs
    assert [record.iteration for record in log.iterations] == [0, 1]


def test_nan_ends_all_ranks_with_one_line(folder: Path) -> None:
    options = ["--out", "o", "--layout.dp", "2", "--actor.optimizer.lr", "1e30"]
    done = subprocess.run(command(*options), env=environment(), capture_output=True, text=True, timeout=400)
    over = time.time()
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "rror" in line]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("error: ")
    assert "nan" in errors[0] or "inf" in errors[0]
    end = [json.loads(line) for line in (folder / "o/run.jsonl").read_text().splitlines()][-1]
    assert (end["record"], end["status"]) == ("end", "failed")
    assert over - end["time"] < 10


@pytest.mark.parametrize(
    ("world", "number"),
    [
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.long),
        (2, signal.SIGTERM),
        pytest.param(2, signal.SIGINT, marks=pytest.mark.long),
    ],
)
def test_a_stopped_run_says_so_in_its_log(folder: Path, world: int, number: int) -> None:
    run = subprocess.Popen(
        command("--out", "o", "--layout.dp", str(world), "--iterations", "100000"),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    log = folder / "o/run.jsonl"
    try:
        until = time.monotonic() + 200
        while not (log.exists() and '"record":"iteration"' in log.read_text()):
            assert run.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        run.send_signal(number)
        assert run.wait(timeout=60) == 128 + number
    finally:
        run.kill()
    end = json.loads(log.read_text().splitlines()[-1])
    assert (end["record"], end["status"]) == ("end", "interrupted")


def test_processes_of_another_launcher(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            command("--out", "o", "--layout.tp", "2", "--iterations", "1"),
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **place),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=400)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    (run,) = load_runs(folder / "o").runs
    assert len(run.iterations) == 1
    assert {record["rank"] for record in run.ranks} == {0, 1}


BAD = [
    (["--layout.tp", "3"], "layout.tp=3 does not divide 8 query heads", "use one of 1, 2, 4, 8"),
    (["--layout.pp", "5"], "layout.pp=5 is more than the model's 4 layers", "use at most 4"),
    (["--layout.stages", "3,2", "--layout.pp", "2"], "5", "layers"),
    (["--layout.dp", "2", "--critic.layout.dp", "4"], "critic.layout: tp x pp x dp", "2 processes"),
    (["--layout.dp", "4"], "actor.layout.dp 4 exceeds the 2 sequences of algorithm.minibatch", "lower dp"),
    (["--layout.dp", "8", "--algorithm.minibatch", "4"], "layout.dp 8 exceeds the 4 sequences", "lower dp"),
    (["--actor.optimizer.backend", "apex"], "actor.optimizer.backend: apex cannot be imported", "torch"),
]


@pytest.mark.parametrize(("options", "what", "mend"), BAD, ids=lambda x: str(x)[:40])
def test_refused_before_any_process_starts(folder, capsys, options, what, mend) -> None:
    assert main(["train", "--config", "run.yaml", "--out", "o", *options]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert "\n" not in said
    assert what in said
    assert mend in said
    assert not (folder / "o").exists()


def test_another_number_of_processes(folder, capsys, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert main(["train", "--config", "run.yaml", "--out", "o", "--layout.dp", "2"]) == 2
    assert "3 processes were started (WORLD_SIZE) but tp x pp x dp is 2" in capsys.readouterr().err


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("address", ["no-such-host.invalid", "two..dots"])
def test_an_address_that_is_none(folder, capsys, monkeypatch, rank: str, address: str) -> None:
    """One line within seconds, where torch would look for it for minutes."""
    place = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    import_module("puzzle.rlhf.trainer")  # what takes long on a busy host is no part of it
    began = time.monotonic()
    assert main(["train", "--config", "run.yaml", "--out", "o", "--layout.dp", "2"]) == 2
    assert time.monotonic() - began < 60
    said = capsys.readouterr().err
    assert said.startswith(f"error: MASTER_ADDR={address}: ")
    assert said.count("\n") == 1
    assert not (folder / "o").exists()


def test_stop_texts_end_responses_and_are_no_part_of_their_text(folder: Path) -> None:
    """Every small letter is a stop text: a tenth of what a random model draws."""
    letters = ", ".join("abcdefghijklmnopqrstuvwxyz".replace("n", "").replace("y", ""))
    config = CONFIG.replace("{max_new_tokens: 4}", f"{{max_new_tokens: 24, stop: [{letters}]}}")
    config = config.replace("algorithm: {", "algorithm: {old_logprobs: recompute, ")
    config = config.replace("iterations: 2", "iterations: 1")
    (folder / "run.yaml").write_text(config)
    assert main(["train", "--config", "run.yaml", "--out", "o"]) == 0
    (run,) = load_runs(folder / "o").runs
    metrics = run.iterations[0].metrics
    samples = [json.loads(line) for line in (folder / "o/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    assert not any(set(sample["response"]) & set(letters) - {",", " "} for sample in samples)
    assert metrics["response_tokens"] < 4 * 24
    assert metrics["useful_token_share"] == 1
    assert 0 <= metrics["logprob_gap"] <= metrics["logprob_gap_max"] <= 1e-5
    assert metrics["first_ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["first_ratio_gap"] <= 1e-5
