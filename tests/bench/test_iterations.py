"""Whole runs in other layouts beside the run of one process, and that a difference is seen."""

from __future__ import annotations

from typing import Any

import pytest

from puzzle.bench import iterations
from puzzle.cli import main


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_pairs_use_all_processes_and_change_the_layout(world: int) -> None:
    found = iterations.pairs(world)
    assert all(tp * pp * dp == world for pair in found for tp, pp, dp in pair)
    assert len(set(found)) == len(found)
    assert world == 1 or all(training != generation for training, generation in found if world != 3)
    assert {
        axis for pair in found for layout in pair for axis, n in zip("tpd", layout, strict=True) if n > 1
    } >= (set() if world in (1, 3) else set("tpd"))


def test_another_layout_learns_the_same_and_a_fault_is_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(iterations, "ALGORITHMS", {"grpo": iterations.ALGORITHMS["grpo"]})
    monkeypatch.setattr(iterations, "pairs", lambda world: [((1, world, 1), (world, 1, 1))])
    plain, runs = iterations._run, []

    def kept(values: dict[str, Any]) -> Any:
        runs.append(plain(values) if len(runs) < 2 else runs[len(runs) % 2])
        return runs[-1]

    monkeypatch.setattr(iterations, "_run", kept)
    assert main(["bench", "iterations", "--device", "cpu", "--world", "2", "--share-device"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " -> " in line]
    assert all(line.startswith("ok   grpo 1,2,1 -> 2,1,1") for line in lines)
    assert {line.split()[7] for line in lines} >= {"reward", "actor_loss", "actor_grad_norm"}
    assert len(lines) == 2 * len({line.split()[7] for line in lines})
    runs[1].iterations[1].metrics["actor_loss"] += 0.01
    assert main(["bench", "iterations", "--device", "cpu", "--world", "2"]) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert len(said) == 1
    assert "iteration 1 actor_loss" in said[0]
    del runs[1].iterations[1].metrics["actor_loss"]  # what is missing is a difference too
    assert main(["bench", "iterations", "--device", "cpu", "--world", "2"]) == 1
