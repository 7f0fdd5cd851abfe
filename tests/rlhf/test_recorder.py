"""What a run writes of itself: numbers of responses against numpy, samples, its origin and its end."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from puzzle.config.resolve import resolve
from puzzle.config.sections import ModelConfig
from puzzle.data.prompts import Prompt
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.rlhf import provenance
from puzzle.rlhf.experience import Experience
from puzzle.rlhf.recorder import Recorder, Resumed, experience_metrics, held_out_metrics, repetition
from puzzle.rlhf.scoring import Scores
from puzzle.runlog import load_runs
from puzzle.runlog.records import Iteration
from tests.rlhf.one_process import configured
from tests.runlog import texts

LENGTHS = (3, 5, 1, 4, 2, 2)


def experience(seed: int = 0, **changes: Any) -> Experience:
    """Three prompts of two samples each; what is padding holds what must not count."""
    rng = np.random.default_rng(seed)
    responses = tuple(tuple(rng.integers(0, 9, n).tolist()) for n in LENGTHS)
    made = Experience(((1, 2), (3,), (4, 5, 6)), (10, 11, 12), responses, 2)

    def padded(shift: float) -> torch.Tensor:
        x_BS = torch.tensor(rng.normal(shift, 0.5, made.mask_BS.shape), dtype=torch.float32)
        return torch.where(made.mask_BS, x_BS, 1e9)

    both = padded(-2.0)
    known = {"logprobs_BS": both, "sampled_logprobs_BS": both, "ref_logprobs_BS": padded(-2.2)}
    return replace(made, **{**known, "sampled_tokens": 40, **changes})


def rows(found: Experience, x_BS: torch.Tensor | None) -> list[np.ndarray]:
    assert x_BS is not None
    return [x_BS[row, : len(r)].double().numpy() for row, r in enumerate(found.responses)]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("seed", range(3))
def test_numbers_of_responses_are_numpy_s(estimator: Any, seed: int) -> None:
    found = experience(seed)
    scores = np.random.default_rng(seed).normal(size=6).astype(np.float32) * 1e30
    own, reference = (np.concatenate(rows(found, x)) for x in (found.logprobs_BS, found.ref_logprobs_BS))
    log_r = reference - own
    kl = {"k1": -log_r, "k2": log_r**2 / 2, "k3": np.exp(log_r) - 1 - log_r}[estimator]
    assert experience_metrics(found, torch.tensor(scores), estimator) == pytest.approx(
        {
            "reward": scores.astype(float).mean(),
            "reward_std": scores.astype(float).std(),
            "response_tokens": 17,
            "response_length": 17 / 6,
            "entropy": -own.mean(),
            "repetition": repetition(found.responses),
            "useful_token_share": 17 / 40,
            "kl": kl.sum() / 17,
            "kl_response": kl.sum() / 6,
        },
        rel=1e-5,
    )


def test_what_is_not_known_is_not_told() -> None:
    """No KL without a reference, no share of surplus tokens where nobody counted them."""
    told = experience_metrics(experience(ref_logprobs_BS=None, sampled_tokens=None), torch.ones(6), "k1")
    assert told.keys().isdisjoint({"kl", "kl_response", "useful_token_share"})


@pytest.mark.parametrize(
    ("responses", "share"),
    [
        ([(1, 2, 3)], 0.0),
        ([(1, 1, 1, 1, 1)], 3 / 4),  # the pair (1, 1) four times
        ([(1, 2, 1, 2, 1)], 2 / 4),
        ([(1, 2), (1, 2)], 0.0),  # of each response for itself
        ([(1, 1, 1), (5,), (1, 2)], 1 / 3),
        ([(5,), (6,)], 0.0),
    ],
)
def test_repeated_pairs_of_tokens(responses: list[tuple[int, ...]], share: float) -> None:
    assert repetition(responses) == pytest.approx(share)


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_half_an_interval_of_held_out_scores(count: int) -> None:
    """By the deviation of a sample: divided by the count less one, then by the root of the count."""
    scores = np.random.default_rng(count).normal(3.0, 2.0, count)
    expected = {"reward": scores.mean()}
    if count > 1:
        expected["reward_ci95"] = 1.96 * np.sqrt(((scores - scores.mean()) ** 2).sum() / (count - 1) / count)
    assert held_out_metrics(torch.tensor(scores)) == pytest.approx(expected)


def recorder(out: Path, resumed: Resumed | None = None, **options: Any) -> Recorder:
    config = configured(**options)
    return Recorder(out, config, World(0, 1, torch.device("cpu")), texts.header(), resumed)


PROMPTS = [Prompt(7 + i, f"id{i}", f"prompt {i}", None, (1,)) for i in range(3)]
SAID = ([p.text for p in PROMPTS for _ in range(2)], [f"said {row}" for row in range(6)])


@pytest.mark.parametrize(("most", "field"), [(0, None), (3, None), (5, "id"), (99, "id")])
@pytest.mark.parametrize("known", [True, False])
def test_samples_say_what_was_asked_answered_and_thought_of_it(
    tmp_path: Path, most: int, field: str | None, known: bool
) -> None:
    """The KL of a response is the sum over its tokens, and there is none without a reference."""
    found = experience() if known else experience(ref_logprobs_BS=None)
    with recorder(
        tmp_path, log={"trace": [], "samples": most, "plots": False}, data={"id_field": field}
    ) as log:
        for held_out in (False, True):
            log.samples(4, found, PROMPTS, SAID, Scores(torch.arange(6.0)), held_out)
        log.samples(5, replace(found, logprobs_BS=None), PROMPTS, SAID, Scores(torch.arange(6.0)))
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    count = min(6, most)
    assert len(lines) == 3 * count
    for number, line in enumerate(lines):
        part, row = divmod(number, count)
        kl = {}
        if known and part < 2:
            own, reference = (rows(found, x)[row] for x in (found.logprobs_BS, found.ref_logprobs_BS))
            kl = {"kl": pytest.approx((own - reference).sum(), rel=1e-4)}
        assert line == {
            "iteration": 5 if part == 2 else 4,
            "prompt": f"prompt {row // 2}",
            "response": f"said {row}",
            "reward": float(row),
            "prompt_id": 7 + row // 2 if field is None else f"id{row // 2}",
            "held_out": part == 1,
            **kl,
        }


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (None, "completed", "why it stopped"),
        (KeyboardInterrupt(), "interrupted", "by a signal"),
        (SystemExit(143), "interrupted", "by a signal"),
        (UserError("no\n room"), "failed", "no room"),
        (ValueError(), "failed", "ValueError"),
    ],
)
def test_a_log_says_how_its_run_ended(
    tmp_path: Path, error: BaseException | None, status: str, text: str
) -> None:
    log = recorder(tmp_path, log={"trace": [], "plots": False})
    log.note = "why it stopped"
    log.__enter__()
    log.__exit__(None if error is None else type(error), error, None)
    last = json.loads((tmp_path / "run.jsonl").read_text().splitlines()[-1])
    assert (last["record"], last["status"], last["text"]) == ("end", status, text)


@pytest.mark.parametrize("plots", [True, False])
def test_curves_are_drawn_at_the_end_where_they_are_wanted(tmp_path: Path, plots: bool) -> None:
    with recorder(tmp_path, log={"trace": [], "plots": plots}) as log:
        log.write(Iteration(0, *texts.stages(1.0, 0.5, 2.0), {"reward": 1.0}), None)
    assert (tmp_path / "plots" / "curves.csv").exists() is plots
    (run,) = load_runs(tmp_path).runs
    assert [one.metrics for one in run.iterations] == [{"reward": 1.0}]


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_numbered_models_are_kept(tmp_path: Path, keep: int) -> None:
    names = ["iteration-2", "iteration-10", "iteration-9", "last", "best", "state-1", "iteration-x"]
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    recorder(tmp_path, checkpoint={"save": True, "keep": keep})._prune()
    gone = ["iteration-2", "iteration-9", "iteration-10"][: max(0, 3 - keep)]
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == set(names) - set(gone)


def test_a_resumed_log_says_what_is_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, world = configured(log={"trace": [], "plots": False}), World(0, 1, torch.device("cpu"))
    told = {f"key{i:02}": i for i in range(15)}
    before = texts.header(config={"iterations": 8, "global_batch_size": 16, **told})
    Recorder(tmp_path, config, world, before).__exit__(None, None, None)
    now = {**before.config, **{key: value + 1 for key, value in told.items()}}
    resumed = Resumed(1, tmp_path / "checkpoints" / "state-1", ("a note",))
    Recorder(tmp_path, config, world, replace(before, config=now), resumed)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "warning: a note"
    changes = ", ".join(f"key{i:02} {i} -> {i + 1}" for i in range(12))
    assert second == f"warning: resumed with other settings: {changes}, 3 more (run.jsonl has them)"
    records = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    (resume,) = [one for one in records if one["record"] == "resume"]
    assert (resume["iteration"], resume["checkpoint"]) == (1, "checkpoints/state-1")


def git(folder: Path, *words: str) -> str:
    name = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    command = ["git", "-C", str(folder), *name, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_header_names_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a plus where tracked files differ from it; none where there is no checkout, or git fails."""
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.git_commit() is None
    git(tmp_path, "init", "-q")
    assert provenance.git_commit() is None  # no commit yet
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    assert len(commit) == 40
    assert provenance.git_commit() == commit
    (tmp_path / "untracked").write_text("two")
    assert provenance.git_commit() == commit
    (tmp_path / "file").write_text("two")
    assert provenance.git_commit() == f"{commit}+"


def test_the_header_tells_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    header = provenance.run_header(
        resolve(configured(log={"trace": [], "cluster": "here"})), {"device": "cpu"}
    )
    assert header.software["torch"] == version("torch")
    assert header.software["transformers"] == version("transformers")
    assert header.hardware["device"] == "cpu"
    assert header.hardware["cores"] >= 1
    assert (header.cluster, header.actor, header.critic) == ("here", "2x16", "2x16")
    assert header.config["global_batch_size"] == 4
    assert header.layouts["training"] == {"tp": 1, "pp": 1, "dp": 1}
    assert header.layouts["critic"] == {"tp": 1, "pp": 1, "dp": 1}
    assert "actor" not in header.layouts


def test_the_header_has_all_that_was_configured_and_planned() -> None:
    names = {"cluster": "here", "variant": "mine", "actor": "a", "critic": "c", "figures": ["figure8"]}
    config = configured(log={**names, "repeat": 3, "provenance": "rehearsal"})
    plan, given = resolve(config), {"batch": 4}
    header = provenance.run_header(replace(plan, given=given), {"device": "cpu", "host": "there"})
    for name, value in {**names, "repeat": 3, "provenance": "rehearsal", "given": given}.items():
        told = getattr(header, name)
        assert (list(told) if name == "figures" else told) == value, name
    assert header.plan == {"hash": plan.hash, **plan.describe()}
    assert header.config == {**plan.config.resolved(), "global_batch_size": 4}
    assert header.hardware["host"] == "there"
    assert set(header.software) >= {"puzzle", "python", *provenance._PACKAGES}
    assert header.started is not None
    assert abs((datetime.fromisoformat(header.started) - datetime.now(UTC)).total_seconds()) < 60
    assert len({provenance.run_header(plan, {}).run_id for _ in range(3)}) == 3


def test_packages_that_are_not_installed_hide_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_PACKAGES", ("numpy", "absent-one", "torch"))
    software = provenance.run_header(resolve(configured()), {}).software
    assert software.keys() == {"puzzle", "python", "numpy", "torch"}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ({"model": "models/mine"}, "mine"),
        ({"model": "hub/models--org--its-name/snapshots/0123"}, "its-name"),
        ({"model": "hub/models--its-name/snapshots/0123"}, "its-name"),
        ({"init": {"preset": "350m"}}, "350m"),
    ],
)
def test_models_are_called_by_their_folder_or_preset(source: dict[str, Any], name: str) -> None:
    assert provenance._name(ModelConfig.model_validate(source)) == name


def test_curves_of_a_run_that_went_on_take_the_place_of_the_former(tmp_path: Path) -> None:
    for number in range(2):
        resumed = Resumed(number) if number else None
        with recorder(tmp_path, resumed, log={"trace": [], "plots": True}) as log:
            log.write(Iteration(number, *texts.stages(1.0, 0.5, 2.0), {"reward": float(number)}))
    assert "1.0" in (tmp_path / "plots" / "curves.csv").read_text()


def test_other_ranks_write_and_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, world = configured(log={"trace": [], "plots": True}), World(1, 2, torch.device("cpu"))
    resumed = Resumed(1, tmp_path / "checkpoints" / "state-1", ("a note",))
    with Recorder(tmp_path / "out", config, world, texts.header(), resumed) as log:
        log.warn("something")
        log.write(Iteration(0, *texts.stages(1.0, 0.5, 2.0), {"reward": 1.0}))
        log.samples(0, experience(), PROMPTS, SAID, Scores(torch.arange(6.0)))
        log.sync()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
