"""`puzzle bench fuse` on two gloo processes: what it reports follows from what it measured."""

import json
import statistics
from pathlib import Path

import pytest

from puzzle.cli import main
from puzzle.plan.cost import CostTable
from puzzle.plan.fused import StreamModel, fused_1f1b, fused_forward
from puzzle.plan.pipelines import forward_only, one_f_one_b
from puzzle.plan.simulate import makespan
from puzzle.plan.timeline import Timeline

TINY = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
CPU = ["--rows", "1", "--length", "8", "--repeats", "2", "--dtype", "fp32", "--device", "cpu"]


def table(row: dict) -> CostTable:
    costs = {m: {k: tuple(v) for k, v in found.items()} for m, found in row["costs"].items()}
    return CostTable(costs)


def test_rows_and_traces_fit_together(tmp_path: Path) -> None:
    for role, hidden in (("actor", 32), ("critic", 16)):
        (tmp_path / role).mkdir()
        (tmp_path / role / "config.json").write_text(json.dumps({**TINY, "hidden_size": hidden}))
    models = ["--actor", str(tmp_path / "actor"), "--critic", str(tmp_path / "critic"), "--layout", "1,2,1"]
    left = ["--out", str(tmp_path / "rows"), "--traces", str(tmp_path), "--traced", "3"]
    assert main(["bench", "fuse", *models, *CPU, "--microbatches", "3", *left]) == 0
    training, inference = (json.loads(line) for line in (tmp_path / "rows").read_text().splitlines())

    cost = table(training)
    counts = [StreamModel("actor", 3), StreamModel("critic", 3)]
    apart = [one_f_one_b(2, 3, m.name, optimizer=True) for m in counts]
    assert training["simulated"]["apart"] == pytest.approx(sum(makespan(s, cost) for s in apart))
    assert training["simulated"]["fused"] == pytest.approx(makespan(fused_1f1b(counts, 2), cost))
    assert training["flushes"] == {"apart": 2, "fused": 1}
    assert training["hashes"]["apart"] == [s.hash for s in apart]
    assert all(norm > 0 for norm in training["grad_norms"].values())

    cost = table(inference)
    names = ("reference", "critic", "reward")
    flushed = sum(makespan(forward_only(2, 3, name), cost) for name in names)
    stream = makespan(fused_forward([StreamModel(name, 3) for name in names], 2), cost)
    assert inference["simulated"] == pytest.approx({"flushed": flushed, "fused": stream})

    for row in (training, inference):
        pairs = [a - b for a, b in zip(row["seconds"][row["base"]], row["seconds"]["fused"], strict=True)]
        assert row["saved_s"] == pytest.approx(statistics.mean(pairs))
        low, high = row["saved_ci95_s"]
        assert high - low == pytest.approx(12.706 * abs(pairs[0] - pairs[1]), rel=1e-3)
        for name, source in (("fused", "measured"), ("fused", "simulated"), (row["base"], "measured")):
            trace = json.loads((tmp_path / f"{row['stage']}-{name}-{source}.json").read_text())
            timeline = Timeline.from_perfetto(trace)
            forwards = [s for s in timeline.spans if s.category == "forward"]
            assert len(forwards) == 2 * 3 * len(row["costs"])
            assert timeline.makespan <= (
                row["simulated"]["fused"] * 1.001 if source == "simulated" else row["seconds"][name][-1]
            )


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--repeats", "1"], "at least 2"), (["--layout", "2"], "write tp,pp,dp"), (["--actor", "8b"], "8b")],
)
def test_mistakes_are_told_in_a_line(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "fuse", "--layout", "1,1,1", "--device", "cpu", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
