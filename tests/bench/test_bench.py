"""The measurements run on a CPU too: small shapes, real processes, numbers that must fit together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch

from puzzle.bench import check, device, kernels
from puzzle.bench.check import compared, layouts
from puzzle.bench.generate import GenerateBench, Subject
from puzzle.bench.texts import next_tokens
from puzzle.cli import main
from puzzle.cli.bench import BENCHES
from puzzle.engine.runtime.world import World
from puzzle.model.packing import pack
from puzzle.model.peer_sums import PeerSums
from puzzle.model.pointwise import Pointwise
from puzzle.spec.published import published

SMALL = ["--model", "350m", "--layers", "1", "--device", "cpu"]


def test_training_rows_fit_together(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    options = ["--rows", "1", "--length", "6", "--microbatches", "2", "--modes", "eager", "--repeats", "1"]
    assert main(["bench", "train", *SMALL, *options, "--layout", "1,1,2", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["pass"] for row in rows] == ["train", "forward"]
    for row in rows:
        assert row["where"]["processes"] == 2
        assert row["mfu"] is None
        assert row["tokens_per_s"] == pytest.approx(2 * 2 * 6 / row["median_s"])
        # Random weights know nothing: about the logarithm of the vocabulary.
        assert abs(row["loss"] - 10.37) < 0.5


def test_generation_counts_every_token(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    options = ["--sequences", "3", "--prompt", "4", "--new", "3", "--repeats", "3"]
    options += ["--out", str(out)]
    assert main(["bench", "generate", *SMALL, *options]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["mode"] for row in rows] == ["eager", "graphs"]
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(9 / row["total_s"])
        assert len(row["seconds"]) == 3
        assert row["total_s"] == sorted(row["seconds"])[1]
        assert row["decode_s"] == pytest.approx(row["total_s"] - row["prefill_s"])
        assert row["decode_floor_s"] > 0
        assert row["prefilled_tokens"] == 3 * 3


def test_ways_to_sum_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    world, peers = World(0, 1, torch.device("cpu")), PeerSums(0, [torch.zeros(2, 1, 1)], [torch.zeros(1)])
    bench = GenerateBench(
        model="350m", layers=1, dtype="fp32", sequences=(2,), prompt=(3, 3), new=2, repeats=2
    )
    monkeypatch.setattr(device, "copy_bandwidth", lambda _: 1e9)
    subject = Subject(bench, world)
    subject.sums = {"collective": None, "peer": peers}
    used: list[PeerSums | None] = []

    def seconds(*_: object, **__: object) -> float:
        used.append(subject.runtime.tensor.sums)
        return float(len(used))

    monkeypatch.setattr(subject, "seconds", seconds)
    monkeypatch.setattr(subject, "_predicted", lambda *_: 0)
    rows = list(subject.fixed("graphs", ([3, 3], [2, 2])))
    assert used[2:] == [None, peers] * 2
    assert [(row["tp_sums"], row["seconds"]) for row in rows] == [("collective", [3, 5]), ("peer", [4, 6])]
    monkeypatch.setattr(subject, "_varied", lambda *_: {"arms": subject.runtime.tensor.sums})
    varied = [(row["tp_sums"], row["arms"]) for row in subject.varied("graphs", ([3], [2]))]
    assert varied == [("collective", None), ("peer", peers)]


def test_generation_of_groups_in_few_rows_with_lengths_from_a_file(tmp_path: Path) -> None:
    """Three prompts of two samples: each prompt is read once, but for its last token."""
    out, lengths = tmp_path / "rows.jsonl", tmp_path / "lengths.txt"
    lengths.write_text("3\n1\n5\n")
    options = ["--sequences", "6", "--samples", "2", "--at-a-time", "2", "--prompt", "4-9", "--new", "5"]
    options += ["--modes", "eager", "--repeats", "1", "--arms", "early", "--lengths", str(lengths)]
    assert main(["bench", "generate", *SMALL, *options, "--out", str(out)]) == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["tokens"] == 2 * (3 + 1 + 5)
    assert 3 * 3 <= row["arms"]["early stop"]["prefilled_tokens"] <= 3 * 8
    assert row["decode_floor_s"] > 0
    assert "ratio" not in row


def test_rewards_beside_the_longest_responses(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    options = [
        "--sequences",
        "5",
        "--prompt",
        "4",
        "--new",
        "8",
        "--repeats",
        "1",
        "--reward-seconds",
        "0.05",
    ]
    assert main(["bench", "tails", *SMALL, *options, "--workers", "2", "--out", str(out)]) == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    # Three after one another of two workers, of which the last response leaves one at least.
    assert row["waited_s"]["after"][0] >= 3 * 0.05
    assert 0 <= row["simulated_s"] < 3 * 0.05


@pytest.mark.parametrize("text", ["", "0\n", "9\n", "x\n"])
def test_a_file_without_lengths(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lengths.txt").write_text(text)
    options = ["--sequences", "2", "--new", "8", "--lengths", str(tmp_path / "lengths.txt")]
    assert main(["bench", "generate", *SMALL, *options]) == 2
    assert "--lengths" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", "30-3"], "argument --prompt: 30-3: write the smaller number first, as 64-1024"),
        (
            ["--lengths", "nowhere.txt"],
            "error: --lengths: nowhere.txt: No such file or directory; give fixed",
        ),
        (["--tp-sums", "peer"], "error: --tp-sums peer: one tensor rank has nothing to sum"),
        (["--tp-sums", "peer", "--layout", "2,1,1"], "--tp-sums peer: kernels need a GPU and Triton"),
    ],
)
def test_spans_and_files_that_are_none(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "generate", *SMALL, *words]) == 2
    assert said in capsys.readouterr().err


def test_early_stop_draws_what_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    options = ["--sequences", "5", "--prompt", "4", "--new", "8", "--repeats", "1", "--modes", "eager"]
    assert main(["bench", "generate", *SMALL, *options, "--lengths", "exponential", "--out", str(out)]) == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    early, whole = row["arms"]["early stop"], row["arms"]["to the end"]
    assert 5 < row["tokens"] < 5 * 8
    assert early["useful_share"] == 1  # on a CPU nothing is decoded late
    assert whole["useful_share"] == pytest.approx(row["tokens"] / (5 * 8))
    for arm in (early, whole):
        assert len(arm["seconds"]) == 1
        assert arm["tokens_per_s"] == pytest.approx(row["tokens"] / arm["median_s"])
    assert row["saved_s"] == pytest.approx(whole["median_s"] - early["median_s"])


def test_steps_go_on_during_a_save_that_holds_what_was_there(tmp_path: Path) -> None:
    out, folder = tmp_path / "rows.jsonl", tmp_path / "saved"
    options = ["--rows", "1", "--length", "4", "--microbatches", "1", "--repeats", "1", "--saves", "1"]
    line = ["bench", "checkpoint", *SMALL, *options, "--folder", str(folder), "--out", str(out)]
    assert main(line) == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    parameters = sum(tensor.size for tensor in replace(published("350m"), num_layers=1).tensors())
    assert 12 * parameters < row["bytes"] < 12 * parameters + 100_000
    assert row["save_s"] > row["call_s"] > 0
    assert row["ratio"] == pytest.approx(row["during_median_s"] / row["alone_median_s"])
    assert not folder.exists()
    folder.mkdir()
    assert main(line) == 2


def test_check_holds_on_a_cpu(capfd: pytest.CaptureFixture) -> None:
    assert main(["bench", "check", "--models", "qwen3", "--device", "cpu"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert sum(line.startswith("ok ") for line in lines) >= 14
    assert not any(line.startswith("FAIL") for line in lines)


def test_a_comparison_can_fail() -> None:
    assert compared("a", "b", 1.0, 1.0)["ok"]
    assert not compared("a", "b", 1.1, 1.0)["ok"]
    assert not compared("a", "b", float("nan"), 1.0)["ok"]


def test_a_failed_comparison_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = [("right", 0.5, 1.0), ("wrong", 1.5, 1.0)]
    monkeypatch.setattr(kernels, "compare", lambda device: iter(found))
    monkeypatch.setattr(check, "save_random", lambda folder, model: None)
    monkeypatch.setattr(check, "_check_model", lambda folder, model, world: iter(()))
    out = tmp_path / "rows.jsonl"
    assert main(["bench", "check", "--device", "cpu", "--models", "llama", "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert [line[:12] for line in said.out.splitlines()[1:]] == ["ok   right  ", "FAIL wrong  "]
    assert "1 comparisons failed, the first: wrong cpu" in said.err
    assert [json.loads(line)["ok"] for line in out.read_text().splitlines()] == [True, False]


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_has_the_name_of_its_command(name: str) -> None:
    bench = getattr(resolve_name(f"puzzle.bench.{BENCHES[name][0]}"), "__self__", None)
    assert name in ("memory", "iterations", "exact") if bench is None else name == bench.command()


def test_wrong_attention_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.packed_attention
    monkeypatch.setattr(kernels, "packed_attention", lambda q, k, v, b, w: right(q, k, v.flip(0), b, w))
    worst = {name: value > limit for name, value, limit in kernels.compare(torch.device("cpu"))}
    assert any(wrong for name, wrong in worst.items() if name.startswith("packed"))
    assert not any(wrong for name, wrong in worst.items() if not name.startswith("packed"))


def test_layouts_are_all_of_a_world() -> None:
    found = {(x.tp, x.pp, x.dp) for x in layouts(4, 3)}
    assert found == {(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)}
    assert {(x.tp, x.pp, x.dp) for x in layouts(1, 4)} == {(1, 1, 1)}


def test_next_tokens_leave_out_ends_and_dummies() -> None:
    rows, targets = next_tokens(pack([[5, 6, 7], [8], [9, 4]], multiple=4))
    assert rows.tolist() == [0, 1, 4]
    assert targets.tolist() == [6, 7, 4]


def test_a_cpu_has_no_peak() -> None:
    assert device.mfu(World(0, 1, torch.device("cpu")), 1e12, 1.0) is None


@pytest.mark.parametrize(
    "words",
    [
        ["bench", "nothing"],
        ["bench", "train", "--layout", "2"],
        ["bench", "exact", "--profile"],
        ["bench", "exact", "--algorithm.microbatch", "2"],
        ["bench", "exact", "--models", "--price", "350m", "--profile", "--device", "cpu"],
        ["bench", "exact", "--ways", "backwards"],
        ["bench", "numerics", "--dtype", "fp32", "--device", "cpu"],
    ],
)
def test_mistakes_are_told_in_a_line(words: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.long
def test_compiled_functions_equal_eager_ones() -> None:
    eager, compiled = Pointwise.eager(), Pointwise.compiled()
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    norm = draw(16).requires_grad_()
    cases = [
        ("add_norm", (draw(6, 16).requires_grad_(), draw(6, 16), norm, 1e-5)),
        (
            "heads",
            (draw(6, 2 * 4 * 8).requires_grad_(), 2, draw(6, 1, 1, 8), draw(6, 1, 1, 8), None, None, 0),
        ),
        ("gated", (draw(6, 32).requires_grad_(), 4)),
    ]
    for name, args in cases:
        ours = getattr(compiled, name)(*args)
        plain = getattr(eager, name)(*args)
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (ours, plain)), strict=True):
            torch.testing.assert_close(a, b)
            weights = draw(*b.shape)
            got, wanted = (
                torch.autograd.grad((x * weights).sum(), args[0], retain_graph=True) for x in (a, b)
            )
            torch.testing.assert_close(got, wanted)
