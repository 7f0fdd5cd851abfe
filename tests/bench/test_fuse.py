"""`puzzle bench fuse` on two gloo processes: what it reports follows from what it measured."""

import json
import statistics
from pathlib import Path

import pytest

from puzzle.cli import main
from puzzle.plan.pipeline import schedules
from puzzle.plan.pipeline.schedules import PipelineModel
from puzzle.plan.simulate.cost import CostTable
from puzzle.plan.simulate.simulate import makespan
from puzzle.plan.simulate.timeline import Timeline
from tests.bench.test_switch import TINY
from tests.plan.single import forward_only, one_f_one_b

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
    assert main(["bench", "fuse", *models, *CPU, "--microbatches", "3", "--split", *left]) == 0
    training, inference = (json.loads(line) for line in (tmp_path / "rows").read_text().splitlines())

    cost = table(training)
    counts = [PipelineModel("actor", 3), PipelineModel("critic", 3)]
    apart = [one_f_one_b(2, 3, m.name, optimizer=True) for m in counts]
    assert training["simulated"]["apart"] == pytest.approx(sum(makespan(s, cost) for s in apart))
    assert training["simulated"]["fused"] == pytest.approx(makespan(schedules.one_f_one_b(counts, 2), cost))
    split = makespan(schedules.one_f_one_b(counts, 2, split=True), cost)
    assert training["simulated"]["fused split"] == pytest.approx(split)
    split = sum(makespan(one_f_one_b(2, 3, m.name, optimizer=True, split=True), cost) for m in counts)
    assert training["simulated"]["apart split"] == pytest.approx(split)
    assert training["flushes"] == {"apart": 2, "fused": 1, "apart split": 2, "fused split": 1}
    assert training["hashes"]["apart"] == [s.hash for s in apart]
    assert all(len(norms) == 12 and min(norms) > 0 for norms in training["grad_norms"].values())

    cost = table(inference)
    names = ("reference", "critic", "reward")
    flushed = sum(makespan(forward_only(2, 3, name), cost) for name in names)
    stream = makespan(schedules.forward_only([PipelineModel(name, 3) for name in names], 2), cost)
    assert inference["simulated"] == pytest.approx({"flushed": flushed, "fused": stream})

    for row in (training, inference):
        ways = {"fused", "apart split", "fused split"} if row is training else {"fused"}
        assert row["compared"].keys() == ways
        for name, compared in row["compared"].items():
            pairs = [a - b for a, b in zip(row["seconds"][row["base"]], row["seconds"][name], strict=True)]
            assert compared["saved_s"] == pytest.approx(statistics.mean(pairs))
            low, high = compared["saved_ci95_s"]
            assert high - low == pytest.approx(12.706 * abs(pairs[0] - pairs[1]), rel=1e-3)
        shown = [(name, source) for name in ways for source in ("measured", "simulated")]
        for name, source in (*shown, (row["base"], "measured")):
            file = f"{row['stage']}-{name.replace(' ', '-')}-{source}.json"
            trace = json.loads((tmp_path / file).read_text())
            timeline = Timeline.from_perfetto(trace)
            forwards = [s for s in timeline.spans if s.category == "forward"]
            assert len(forwards) == 2 * 3 * len(row["costs"])
            assert timeline.makespan <= (
                row["simulated"][name] * 1.001 if source == "simulated" else row["seconds"][name][-1]
            )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--repeats", "1"], "at least 2"),
        (["--layout", "2"], "write tp,pp,dp"),
        (["--actor", "8b"], "8b"),
        (["--split"], "one stage has nothing to fill"),
    ],
)
def test_mistakes_are_told_in_a_line(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "fuse", "--layout", "1,1,1", "--device", "cpu", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
