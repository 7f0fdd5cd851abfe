"""Stages of published logs: the slowest rank's time, epochs that go on counting, sums that must fit."""

from pathlib import Path

import pytest

from puzzle.runlog import Run, load_runs
from puzzle.runlog.published.scan import scan
from tests.runlog import texts

PUZZLE = "figure8/orion/llama_7b_350m_opt_2024-04-29T20:35:57+0800.log"
CHAT = "figure12/orion/llama_7b_7b_dschat_2024-01-12T00:29:54+08:00.log"


def run_of(folder: Path, name: str, lines: list[str]) -> Run:
    path = folder / name
    path.parent.mkdir(parents=True)
    path.write_bytes(texts.as_bytes(lines))
    (run,) = load_runs(folder).runs
    return run


@pytest.mark.parametrize("slowest", ["first", "middle", "last"])
def test_the_slowest_rank_re_shards_last(tmp_path: Path, slowest: str) -> None:
    """Of several ranks' times the largest counts, wherever it stands."""
    times = {"first": (0.3, 0.1, 0.2), "middle": (0.1, 0.3, 0.2), "last": (0.2, 0.1, 0.3)}[slowest]
    lines = []
    for step in range(3):
        lines += [texts.reshard_line(seconds + step) for seconds in times]
        lines.append(texts.puzzle_line(step, 9000.0, 2500.0, 1250.0))
    run = run_of(tmp_path, PUZZLE, lines)
    assert run.printed["reshard"] == (0.3, 1.3, 2.3)
    assert [one.stage_seconds["switch"] for one in run.iterations] == [0.3, 1.3, 2.3]
    assert [one.stage_seconds["generation"] for one in run.iterations] == pytest.approx([8.7, 7.7, 6.7])
    assert [(one.iteration, one.seconds) for one in run.switches] == [(0, 0.3), (1, 1.3), (2, 2.3)]


def test_a_switch_is_never_longer_than_the_generation_that_holds_it(tmp_path: Path) -> None:
    lines = [texts.reshard_line(9.5), texts.puzzle_line(0, 9000.0, 2500.0, 1250.0)]
    stages = run_of(tmp_path, PUZZLE, lines).iterations[0].stage_seconds
    assert (stages["generation"], stages["switch"]) == (0.0, 9.0)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("node", ["this", "other"])
def test_the_slowest_rank_trains_last(tmp_path: Path, place: int, node: str) -> None:
    """Ranks of this node print between the lines of an iteration, another node's before the first."""
    mine, theirs = [9.40, 9.41, 9.42], [9.40, 9.41, 9.42]
    (mine if node == "this" else theirs)[place] = 9.45
    lines = [f"Training time: {seconds}" for _ in range(2) for seconds in theirs]
    for step in range(2):
        lines.append("Generation time: 20.0, exp gen time: 27.0")
        lines += [f"Training time: {seconds}" for seconds in mine]
        lines += [texts.step_line(step), texts.engine_line(38.0, 1.5, 18.5, 9.4)]
    run = run_of(tmp_path, CHAT, lines)
    for one in run.iterations:
        assert one.stage_seconds["training"] == 9.45
        assert one.stage_seconds["generation"] == 18.5
        assert one.stage_seconds["inference"] == 7.0
        assert one.stage_seconds["switch"] == 1.5
        assert one.stage_seconds["other"] == pytest.approx(38.0 - 27.0 - 9.45)
        assert sum(one.stage_seconds.values()) == pytest.approx(one.e2e_seconds)
    assert run.printed["training"] == (*theirs, *theirs, *mine, *mine)
    assert run.printed["gather"] == (1.5, 1.5)
    assert run.printed["experience"] == (27.0, 27.0)


def chat_iteration(epoch: int, step: int) -> list[str]:
    line = f"Epoch: {epoch} | Step: {step} | PPO Epoch: 1 | Actor Loss: 0.5 | Critic Loss: 0.25"
    return [
        f"Generation time: {20.0 + epoch + step}, exp gen time: {27.0 + epoch + step}",
        "Training time: 9.4",
        f"{line} | Unsupervised Loss: 0.0",
        texts.engine_line(38.0, 1.5, 18.5, 9.4),
    ]


@pytest.mark.parametrize("first", [0, 1, 5])
@pytest.mark.parametrize("lengths", [(3,), (3, 2), (1, 1, 1), (2, 4, 1)])
def test_epochs_of_a_chat_log_go_on_counting(lengths: tuple[int, ...], first: int) -> None:
    """Steps begin anew with every epoch; iterations do not, however many steps an epoch had, and whichever
    epoch is the first in the log."""
    steps = [(epoch, step) for epoch, count in enumerate(lengths, first) for step in range(count)]
    found = scan(texts.as_bytes([line for at in steps for line in chat_iteration(*at)]))
    assert [block.iteration for block in found.blocks] == list(range(sum(lengths)))
    assert [block.values["generation_time"] for block in found.blocks] == [[20.0 + e + s] for e, s in steps]


def test_epochs_of_a_puzzle_log_go_on_counting(tmp_path: Path) -> None:
    steps = [(0, 237), (0, 238), (1, 0), (1, 1), (3, 5)]
    lines = [
        texts.puzzle_line(0, 9000.0, 2500.0, 1250.0).replace(
            "epoch: 0 | step: 0", f"epoch: {epoch} | step: {step}"
        )
        for epoch, step in steps
    ]
    run = run_of(tmp_path, PUZZLE, lines)
    assert [one.iteration for one in run.iterations] == [237, 238, 239, 240, 3 * 239 + 5]


@pytest.mark.parametrize("left", [-50.0, -0.004, -0.003, -0.002, 0.0, 0.002, 0.003, 0.004, 100.0])
def test_stages_add_up_but_for_rounding(left: float) -> None:
    """Four numbers of three decimals, each rounded: a sum may be off by 2 thousandths of a ms, not by 3."""
    line = texts.puzzle_line(4, 7830.421, 4876.259, 11357.272)
    whole, _, e2e = line.rpartition(": ")
    found = scan(texts.as_bytes([f"{whole}: {float(e2e) + left:.3f}"]))
    noted = [note.seconds for note in found.notes if note.kind == "sum"]
    assert noted == ([] if abs(left) <= 0.002 else [pytest.approx(left / 1e3, abs=1e-9)])
    assert found.blocks[0].values["e2e_time"] == [pytest.approx(float(e2e) + left)]


@pytest.mark.parametrize(("left", "other"), [(0.0, 0.0), (0.01, 0.0), (0.03, 0.00003), (-250.0, -0.25)])
def test_what_stages_leave_over_is_other(tmp_path: Path, left: float, other: float) -> None:
    """A rest within a millionth of the whole is rounding; what is more belongs to no stage."""
    line = texts.puzzle_line(0, 9000.0, 2500.0, 13250.0)
    whole, _, e2e = line.rpartition(": ")
    run = run_of(tmp_path, PUZZLE, [f"{whole}: {float(e2e) + left:.3f}"])
    (one,) = run.iterations
    assert one.stage_seconds["other"] == pytest.approx(other, abs=1e-9)
    assert (one.stage_seconds["other"] == 0.0) is (other == 0.0)
    assert one.e2e_seconds == pytest.approx((24750.0 + left) / 1e3)
