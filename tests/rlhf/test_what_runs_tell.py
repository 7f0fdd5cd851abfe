"""What a run tells while it goes on: ranks, what it does, traces, profiles, rows left out; and its ends."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from puzzle.engine.runtime.progress import Progress
from puzzle.errors import UserError
from puzzle.rlhf import recorder as module
from puzzle.rlhf import session
from puzzle.rlhf.recorder import Resumed, device_bytes, moved_bytes
from tests.rlhf.started import MODEL, TASKS, config, laid_out, of, start
from tests.rlhf.test_recorder import recorder

folder = pytest.fixture(laid_out)


@pytest.mark.parametrize("task", TASKS)
def test_ranks_are_told_before_and_after_all_else(folder: Path, task: str) -> None:
    records = start(config(folder, task), folder / "out")
    kinds = [record["record"] for record in records]
    assert (kinds[:2], kinds[-2:]) == (["run", "rank"], ["rank", "end"])
    assert kinds.count("rank") == 2
    roles = {"rl": 4, "sft": 1, "reward-model": 1, "dpo": 1}[task]
    for rank in of(records, "rank"):
        assert (rank["rank"], rank["device"]) == (0, "cpu")
        assert list(rank["coordinates"].values()) == [{"t": 0, "p": 0, "d": 0}] * roles
        # Two layers of width 16 with 24 in the middle; embeddings of 262 rows, and a head of them or of one.
        layers = 2 * (4 * 16 * 16 + 3 * 16 * 24 + 2 * 16) + 16
        heads = {"rl": 2 * 262 * 16 + 2 * 16, "reward-model": 16}.get(task, 262 * 16)
        assert rank["parameter_bytes"] == 4 * (roles * (layers + 262 * 16) + heads)
        assert rank.get("device_bytes") is None
        assert rank.get("peak_bytes") is None


@pytest.mark.parametrize(
    ("task", "own"),
    [
        ("sft", {"tokens"}),
        ("reward-model", {"accuracy", "accuracy_ci95", "score_gap", "score"}),
        ("dpo", {"accuracy", "accuracy_ci95", "score_gap", "chosen_reward", "rejected_reward", "tokens"}),
    ],
)
def test_steps_on_examples_tell_their_loss_speed_and_place(folder: Path, task: str, own: set[str]) -> None:
    """Of five examples, two at a time: the third step has the last one and the first of the next epoch."""
    asked = config(folder, task).model_copy(update={"iterations": 4})
    records, role = start(asked, folder / "out"), "reward" if task == "reward-model" else "actor"
    common = {
        f"{role}_loss",
        f"{role}_grad_norm",
        f"{role}_lr",
        "balance",
        "epoch",
        "tokens_per_device_second",
    }
    for record in of(records, "iteration"):
        assert set(record["metrics"]) == common | own
        assert record["metrics"]["tokens_per_device_second"] > 0
        assert record["metrics"]["balance"] == 1.0
    epochs = [record["metrics"]["epoch"] for record in of(records, "iteration")]
    assert epochs == sorted(epochs)
    assert epochs[0] == 0.0
    assert epochs[-1] == 1.0
    for record in of(records, "evaluation"):
        assert set(record["metrics"]) == {"loss", *own}


def test_the_memory_of_a_device_is_told_in_two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch holds, at most; and what others hold now, never less than nothing."""
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 70)
    for reserved, outside in ((60, 15), (90, 0)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (25, 100))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _, held=reserved: held)
        assert device_bytes(torch.device("cuda")) == {"reserved": 70, "outside": outside}
    assert device_bytes(torch.device("cpu")) is None


def test_messages_of_tensor_groups_are_told_by_model() -> None:
    runtimes = [
        SimpleNamespace(name=name, tensor=SimpleNamespace(moved=moved, size=size))
        for name, moved, size in (("actor", 5, 2), ("critic", 7, 1), ("generation", 0, 4))
    ]
    models: Any = SimpleNamespace(runtimes=lambda: runtimes)
    world: Any = SimpleNamespace(moved={"all_gather": 3})
    found = moved_bytes(models, world)
    assert found == {"all_gather": 3, "tensor_parallel.actor": 5, "tensor_parallel.generation": 0}


def test_a_run_says_what_it_is_doing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of a rank that hangs has it."""
    marks: list[str] = []
    own = Progress.mark

    def mark(self: Progress, doing: str, waits: bool = False) -> None:
        if not marks or marks[-1] != doing:
            marks.append(doing)
        own(self, doing, waits)

    monkeypatch.setattr(Progress, "mark", mark)
    reward = {"function": "puzzle.rlhf.rewards:letter_share", "workers": 0}
    start(config(folder, "rl", reward=reward).model_copy(update={"iterations": 1}), folder / "out")
    inference, held_out = "iteration 0, inference", [f"evaluation after {n} iterations" for n in (0, 1)]
    told = ["loading models", held_out[0], "iteration 0, generation", inference]
    told += [f"{inference}: the reward function", "iteration 0, training", held_out[1], "saving"]
    found = [mark for mark in marks if mark in told or mark == "saving the models"]
    first = [m for i, m in enumerate(found) if m not in found[:i]]
    assert first == [*told, "saving the models"]
    assert f"{held_out[1]}: the reward function" in marks
    marks.clear()
    start(config(folder, "dpo").model_copy(update={"iterations": 1}), folder / "sup")
    supervised = ["loading models", "the reference's log-probs", held_out[0], "iteration 0, training"]
    assert [m for i, m in enumerate(marks) if m in supervised and m not in marks[:i]] == supervised


@pytest.mark.parametrize("task", ["rl", "sft"])
def test_chosen_iterations_are_traced_and_profiled(folder: Path, task: str) -> None:
    log = {"trace": [0, 2], "profile": [1], "plots": False}
    asked = config(folder, task, log=log).model_copy(update={"iterations": 3})
    records, out = start(asked, folder / "out"), folder / "out"
    traces = [f"traces/iteration-{n}.json" for n in (0, 2)]
    profile = "profiles/iteration-1-rank-000.json.gz"
    told = {(record["path"], record["iteration"]) for record in of(records, "trace")}
    assert told == {(traces[0], 0), (traces[1], 2), (profile, 1)}
    there = {str(p.relative_to(out)) for name in ("traces", "profiles") for p in (out / name).iterdir()}
    assert there == {*traces, profile}
    for name in traces:
        assert len(json.loads((out / name).read_text())["traceEvents"]) > 3
    with gzip.open(out / profile) as file:
        assert len(json.load(file)["traceEvents"]) > 10


def test_rows_that_are_too_long_are_counted_once(folder: Path) -> None:
    """Of both files, before the first iteration, and not again where the run goes on."""
    for name, rows in (("prompts", 2), ("held_out", 1)):
        file = folder / f"{name}.jsonl"
        file.write_text(
            file.read_text() + json.dumps({"prompt": "long " * 9}) + "\n" + '{"prompt": "x"}\n' * rows
        )
    asked = config(folder, "rl", data={"too_long": "drop"})
    records = start(asked, folder / "out")
    warned = [record["text"] for record in of(records, "warning")]
    assert len(warned) == 2
    for line, kept in zip(warned, (7, 4), strict=True):
        assert f"1 of {kept + 1} prompts" in line
        assert "data.max_prompt_tokens" in line
    kinds = [record["record"] for record in records]
    assert kinds.index("warning") < kinds.index("evaluation")
    more = start(asked.model_copy(update={"iterations": 3}), folder / "out", True)
    assert sum("prompts" in record["text"] for record in of(more, "warning")) == 2


def test_a_score_that_cannot_be_learnt_from_ends_the_run(folder: Path) -> None:
    def huge(responses: list[str]) -> list[float]:
        return [1e38 if row else 0.0 for row in range(len(responses))]

    asked = config(
        folder,
        "rl",
        reward={"function": "given", "workers": 0},
        algorithm={"reward_clip": None},
        eval={"every": 0},
    )
    with pytest.raises(UserError, match=r"its score 1e.38"):
        start(asked, folder / "out", False, "", None, None, huge)
    records = [json.loads(line) for line in (folder / "out/run.jsonl").read_text().splitlines() if line]
    assert not of(records, "iteration")
    assert records[-1]["status"] == "failed"


@pytest.mark.parametrize("task", ["rl", "sft"])
def test_a_device_without_memory_is_told_of_with_what_needs_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More words.\nand lines")

    monkeypatch.setattr(session, "run_header", fails)
    with pytest.raises(UserError, match=r"^CUDA out of memory on rank 0; ") as error:
        start(config(folder, task), folder / "out")
    assert "\n" not in str(error.value)
    assert "actor" in capsys.readouterr().err


def test_a_run_of_one_iteration_leaves_its_last_checkpoint(folder: Path) -> None:
    asked = config(folder, "rl", reward={"init": MODEL}).model_copy(update={"iterations": 1})
    records = start(asked, folder / "out")
    saved = {(record["path"], record["iteration"]) for record in of(records, "checkpoint")}
    assert saved == {(f"checkpoints/{name}", 1) for name in ("last", "last-critic", "state-1")}


@pytest.mark.parametrize("count", [0, 1, 12, 13, 40])
def test_as_many_changed_settings_are_named_as_fit_a_line(count: int) -> None:
    settings = {f"key{n}": (n, n + 1) for n in range(count)}
    found = module._changes(settings)
    if not count:
        assert found == []
        return
    (line,) = found
    assert line.count(" -> ") == min(count, 12)
    assert (f", {count - 12} more (run.jsonl has them)" in line) == (count > 12)


@pytest.mark.parametrize("size", [57, 58, 59, 200])
def test_long_settings_are_cut(size: int) -> None:
    """At 60 characters with their quotes."""
    text = "x" * size
    shown = f'"{text}"' if size <= 58 else f'"{text[:56]}...'
    assert module._changes({"key": (1, text)}) == [f"resumed with other settings: key 1 -> {shown}"]
    assert len(shown) <= 60


def test_a_run_that_begins_again_says_so(tmp_path: Path) -> None:
    """There was no checkpoint: the record has none."""
    recorder(tmp_path, log={"trace": [], "plots": False}).__exit__(None, None, None)
    with recorder(tmp_path, Resumed(notes=("from the start",)), log={"trace": [], "plots": False}):
        pass
    records = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines() if line]
    (resume,) = of(records, "resume")
    assert (resume["iteration"], resume.get("checkpoint")) == (0, None)
    assert [record["text"] for record in of(records, "warning")] == ["from the start"]
