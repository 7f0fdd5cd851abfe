"""The scripts that time other systems: what they ask of them, and how they read what these wrote."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peers import trl_cpu, verl_ppo, vllm_alone
from peers.verl_ppo import Host, Setting

from puzzle.bench import harness
from puzzle.bench.generate import GenerateBench
from puzzle.errors import UserError

ROOT = Path(__file__).parents[2]
LOGS = ROOT / "logs/peers/verl-4xh200"
HOST = Host(Path("/w"), "7b", 4, 4, "sdpa", ("+more=1",))


def test_verls_log_is_read_as_its_lines_say() -> None:
    """Means without the first step, beside a sum over the raw text."""
    for name in ("7b-7b", "7b-350m"):
        lines = (LOGS / f"{name}.jsonl").read_text().splitlines()
        found = verl_ppo.means(LOGS / f"{name}.jsonl")
        assert len(verl_ppo.steps_of(LOGS / f"{name}.jsonl")) == len(lines) > 3
        for part, value in found.items():
            told = [
                float(line.split(f'"timing_s/{part}":')[1].split(",")[0].rstrip("}")) for line in lines[1:]
            ]
            assert value == pytest.approx(sum(told) / len(told), rel=1e-12)
        assert found.keys() == set(verl_ppo.PARTS)
        assert sum(value for part, value in found.items() if part != "step") < found["step"] * 1.01


def test_a_log_of_one_step_has_no_means(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    assert verl_ppo.means(log) == {}
    log.write_text((LOGS / "7b-7b.jsonl").read_text().splitlines()[0] + "\n")
    assert verl_ppo.means(log) == {}


def asked(setting: Setting, host: Host = HOST) -> dict[str, str]:
    words = verl_ppo.command(host, setting)
    assert words[1:3] == ["-m", "verl.trainer.main_ppo"]
    pairs = [word.partition("=") for word in words[3:]]
    assert len({name for name, _, _ in pairs}) == len(pairs)
    return {name: value for name, _, value in pairs}


def test_each_setting_changes_what_it_says_and_nothing_else() -> None:
    settings = verl_ppo.settings("7b", 4)
    first = asked(settings["default"])
    assert first["data.train_batch_size"] == first["actor_rollout_ref.actor.ppo_mini_batch_size"] == "64"
    assert first["critic.model.path"] == "/w/7b"
    assert first["+more"] == "1"
    rollout = "actor_rollout_ref.rollout.tensor_model_parallel_size"
    changes = {
        "fused-triton": {"use_fused_kernels", "impl_backend"},
        "fused-torch": {"use_fused_kernels", "impl_backend"},
        "unsharded": {"strategy", "reshard_after_forward"},
        "microbatch": {"ppo_micro_batch_size_per_gpu"},
        "bf16-weights": {"model_dtype"},
        "tp2": {"tensor_model_parallel_size"},
        "tp4": {"tensor_model_parallel_size"},
    }
    assert settings.keys() == {"default", *changes}
    for name, words in changes.items():
        other = asked(settings[name])
        different = {key for key in first.keys() | other.keys() if first.get(key) != other.get(key)}
        assert {key.rpartition(".")[2] for key in different} == words, name
    assert asked(settings["tp4"])[rollout] == "4"
    assert "tp4" not in verl_ppo.settings("7b", 2)
    assert verl_ppo.settings("350m", 4)["default"].microbatch == 16
    assert verl_ppo.settings("7b", 2)["default"].offload


def test_what_helped_is_combined() -> None:
    tried = verl_ppo.settings("7b", 4)
    first = tried["default"]
    seconds = {"default": 8.6, "fused-torch": 8.0, "fused-triton": 7.5, "bf16-weights": 8.5, "tp2": 9.9}
    assert verl_ppo.combined(tried, seconds) == replace(first, fused="triton", weights="bfloat16")
    assert verl_ppo.combined(tried, {"default": 8.6, "tp2": 8.0, "tp4": 9.0}) is None
    assert verl_ppo.combined(tried, {"tp2": 8.0, "tp4": 9.0}) is None


def test_a_search_stops_in_time_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def run(host: Host, setting: Setting, folder: Path) -> int:
        """Stands in for verl: every setting is as fast as the first but one, which fails."""
        ran.append(folder.name)
        folder.mkdir(parents=True)
        (folder / "verl.log").write_text("")
        if setting.fused != "torch":
            shutil.copy(LOGS / "7b-7b.jsonl", folder / "metrics.jsonl")
        return 1

    monkeypatch.setattr(verl_ppo, "run", run)
    verl_ppo.search(HOST, tmp_path, minutes=7.4)
    assert ran == []
    assert "default: not started" in capsys.readouterr().out
    verl_ppo.search(HOST, tmp_path, minutes=7.6)
    assert ran == list(verl_ppo.settings("7b", 4))
    assert "default: 8.63 s\n" in (said := capsys.readouterr().out)
    assert "fused-torch: ended with 1, no numbers" in said
    verl_ppo.search(HOST, tmp_path, minutes=9)
    assert len(ran) == len(set(ran)), "nothing twice, and nothing was faster that could be combined"
    table = verl_ppo.table(tmp_path)
    assert table.splitlines()[-1] == "fused-torch: no numbers"
    assert table.count("8.63") == len(ran) - 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["search", "one"], "search takes WORK and OUT"),
        (["table", "one", "two"], "table takes one folder"),
        (["command", "one", "two", "--only", "fast"], "--only fast: there are default, fused-triton"),
        (["search", "one", "two", "--critic", "13b"], "invalid choice: '13b'"),
        (["search", "one", "two", "--gpus", "0"], "--gpus: '0': give a whole number, at least 1"),
        (["search", "one", "two", "--minutes", "nan"], "--minutes: 'nan': give a finite number"),
        (["search", "/nowhere", "two"], "/nowhere: `prepare` has not written prompts here"),
        (["table", "/nowhere"], "/nowhere: No such file"),
        (["prepare", "/proc/nowhere"], "/proc/nowhere: No such file"),
    ],
)
def test_bad_arguments_end_in_a_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_line(verl_ppo.main(words), said, capsys)


def assert_line(code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    err = capsys.readouterr().err
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: ")
    assert said in err


def test_bad_arguments_beside_trl_and_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, log = tmp_path / "model", str(tmp_path / "log.jsonl")
    model.mkdir()
    (model / "config.json").write_text("{}")
    for words, said in (
        ([str(tmp_path), log], "is no Hugging Face model folder"),
        ([str(model), "/nowhere/log.jsonl"], "no folder /nowhere"),
        ([str(model), log, "--trl", "/nowhere/python"], "/nowhere/python: No such file"),
        ([str(model), log, "--trl", "/bin/false"], "/bin/false lacks one of torch, transformers, trl"),
        ([str(model), log, "--steps", "1"], "--steps: '1': give a whole number, at least 2"),
        ([str(model), log, "--kl", "nan"], "--kl: 'nan': give a finite number"),
    ):
        assert_line(trl_cpu.main(words), said, capsys)
    for words, said in (
        (["/nowhere/log.jsonl"], "no folder /nowhere"),
        ([log, "--batches", "16,,32"], "--batches: '': give a whole number, at least 1"),
        ([log, "--tp", "0"], "--tp: '0': give a whole number"),
        ([log, "--workloads", "fixed", "mixed"], "'mixed': there are fixed, varied, groups, long"),
        ([log, "--workloads", "fixed:0"], "'0': give a whole number, at least 1"),
        ([log, "--memory", "1.5"], "give a finite number above 0 and at most 1"),
        ([log, "--workloads", "groups", "--batches", "8,12"], "groups has 8 samples of each prompt"),
        ([], "no file for the rows"),
        ([log], "the package vllm is not installed"),
    ):
        assert_line(vllm_alone.main(words), said, capsys)
    assert not Path(log).exists()


def test_a_torn_log_of_verl_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "default").mkdir()
    for text in ("{torn", "[]", '{"data": 3}'):
        (tmp_path / "default/metrics.jsonl").write_text(text)
        assert_line(verl_ppo.main(["table", str(tmp_path)]), "is no log of verl's file logger", capsys)


class FakeVllm:
    """Stands in for the package: as many tokens as asked for, and what the engine was told."""

    def __init__(self, lost: int = 0) -> None:
        self.lost, self.settings, self.calls, self.resets = lost, {}, [], 0

    def LLM(self, folder: str, **settings: Any) -> FakeVllm:
        self.settings = settings | json.loads((Path(folder) / "config.json").read_text())
        return self

    def SamplingParams(self, **how: Any) -> SimpleNamespace:
        assert how["ignore_eos"]
        return SimpleNamespace(**how)

    def reset_prefix_cache(self) -> bool:
        self.resets += 1
        return self.resets % 2 == 0

    def generate(self, prompts: list[dict[str, list[int]]], params: list[Any], use_tqdm: bool) -> list[Any]:
        self.calls.append(([one["prompt_token_ids"] for one in prompts], params))
        answers = []
        for one in params:
            made = [SimpleNamespace(token_ids=[0] * (one.max_tokens - self.lost)) for _ in range(one.n)]
            answers.append(SimpleNamespace(outputs=made))
        assert len(params) == len(prompts)
        return answers


def vllm_rows(words: list[str], out: Path, monkeypatch: pytest.MonkeyPatch, fake: FakeVllm) -> list[Any]:
    monkeypatch.setitem(sys.modules, "vllm", fake)
    assert vllm_alone.main([str(out), *words]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_vllms_rows_have_what_the_shipped_ones_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the fastest run; the cache of prefixes is empty before each."""
    shipped = (ROOT / "logs/bench/2026-11-29-4xh200/vllm.jsonl").read_text().splitlines()
    fake = FakeVllm()
    rows = vllm_rows(["--batches", "2,3", "--repeats", "2"], tmp_path / "out", monkeypatch, fake)
    assert [(row["batch"], row["logprobs"]) for row in rows] == [(2, 0), (3, 0), (2, None), (3, None)]
    assert all(row.keys() >= json.loads(shipped[0]).keys() for row in rows)
    assert all(row["gen_s"] == round(min(row["seconds"]), 3) and len(row["seconds"]) == 2 for row in rows)
    assert {len(prompt) for prompts, _ in fake.calls for prompt in prompts} == {256}
    assert fake.resets / 2 == len(fake.calls) == 8
    assert (fake.settings["max_num_seqs"], fake.settings["max_model_len"]) == (3, 512)


def test_vllm_is_asked_for_what_our_bench_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, their samples and lengths of every workload, beside a run of the bench by its own words."""
    fake, found = FakeVllm(), {}
    names = list(vllm_alone.WORKLOADS)
    words = ["--workloads", *(f"{name}:1" for name in names), "--batches", "16", "--logprobs", "with"]
    rows = vllm_rows(words, tmp_path / "out", monkeypatch, fake)
    assert [row["workload"] for row in rows] == names

    monkeypatch.setattr(harness.local, "run", lambda _, bench, ranks: found.setdefault("bench", bench[0]))
    for name, row, (prompts, params) in zip(names, rows, fake.calls, strict=True):
        found.clear()
        work = replace(vllm_alone.WORKLOADS[name], sequences=[16])
        assert GenerateBench.run(work.arguments()) == 0
        bench = found["bench"]
        assert bench.sequences == [16]
        read, wanted = bench.requests.given(16, *bench.lengths)
        ours = list(zip(bench.requests.tokens(read, 32000), wanted, strict=True))
        asked = zip(prompts, params, strict=True)
        assert [(prompt, one.max_tokens) for prompt, one in asked for _ in range(one.n)] == ours
        assert {one.logprobs for one in params} == {0}
        assert max(one.n for one in params) == bench.samples
        assert row["tokens"] == sum(wanted)
    assert fake.settings["max_model_len"] == 1024 + 7168


def test_vllm_that_ends_early_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", FakeVllm(lost=1))
    with pytest.raises(RuntimeError, match="fixed, 2 sequences: 510 tokens came instead of 512"):
        vllm_alone.command([str(tmp_path / "out"), "--batches", "2"])


def test_our_commands_beside_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    assert vllm_alone.main(["--ours", "--workloads", "groups", "varied:1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "puzzle bench generate --sequences 512 --modes graphs --lengths fixed --prompt 1024 --new 256"
        " --samples 8 --repeats 3",
        "puzzle bench generate --sequences 1024 --modes graphs --lengths exponential --prompt 64-1024"
        " --new 2048 --mean 512 --arms early --repeats 1",
    ]


def test_a_childs_steps_are_timed_and_its_computing_counted(tmp_path: Path) -> None:
    """Three steps of half a second of computing, in a process of the child's own."""
    inner = (
        "import time\n"
        "for _ in range(3):\n"
        "    began = time.process_time()\n"
        "    while time.process_time() - began < 0.5: pass\n"
        f"    print({trl_cpu.STEP!r}, flush=True)\n"
    )
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    work = replace(trl_cpu.Work(), steps=3)
    found = trl_cpu.measured([sys.executable, "-c", outer], work, tmp_path / "out.txt")
    assert len(found) == 2
    for seconds, cpu in found:
        assert 0.4 < cpu < 0.8
        assert seconds > cpu - 0.1
    with pytest.raises(UserError, match="after 0 steps"):
        trl_cpu.measured([sys.executable, "-c", "raise SystemExit(1)"], work, tmp_path / "out.txt")


def test_ratios_are_of_means_over_all_steps(tmp_path: Path) -> None:
    rows: list[dict[str, str | float]] = [{"record": "settings"}]
    for side, values in (("puzzle", (1.0, 3.0)), ("trl", (5.0, 7.0))):
        rows += [{"record": "step", "side": side, "seconds": v, "cpu_seconds": 2 * v} for v in values]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = trl_cpu.summary(tmp_path / "log.jsonl")
    assert "trl over puzzle, seconds: 3.00" in said
    assert "puzzle  seconds         2.00 +- 1.41 (n=2)" in said


def test_scripts_tell_how_they_are_called() -> None:
    for name in ("trl_cpu", "verl_ppo", "vllm_alone"):
        script = ROOT / f"scripts/peers/{name}.py"
        shown = subprocess.run(
            [sys.executable, str(script), "--help"], capture_output=True, text=True, check=True
        )
        assert shown.stdout.startswith("usage: ")
