"""Groups of equal scores are replaced by other prompts', on every rank and after a resume alike."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puzzle.config.resolve import resolve
from puzzle.data.prompts import Prompt, PromptSet, PromptStream
from puzzle.rlhf.dynamic_sampling import Drawn, refilled, teaches
from puzzle.rlhf.experience import Experience
from tests.helpers import run_ranks
from tests.rlhf import resumed_ranks
from tests.rlhf.one_process import configured, run, trainer_of
from tests.rlhf.test_algorithm_layouts import RUNS
from tests.rlhf.test_trainer_reference import Bench

SAMPLES = 2


def drawn(prompts: Sequence[Prompt], scores: dict[int, tuple[float, ...]]) -> Drawn:
    """A round of a fake policy: a prompt's responses and log-probs are made of its index alone."""
    responses = [(p.index + 1,) * (1 + (p.index + s) % 4) for p in prompts for s in range(SAMPLES)]
    longest = max(map(len, responses))
    logprobs_BS = torch.tensor([[-float(r[0])] * len(r) + [7.0] * (longest - len(r)) for r in responses])
    scores_B = torch.tensor([x for p in prompts for x in scores[p.index]])
    experience = Experience(
        tuple(p.tokens for p in prompts),
        tuple(p.index for p in prompts),
        tuple(responses),
        SAMPLES,
        scores_B=scores_B,
        logprobs_BS=logprobs_BS,
        sampled_logprobs_BS=logprobs_BS,
        sampled_tokens=sum(map(len, responses)),
    )
    return Drawn(list(prompts), experience, scores_B)


class Counted:
    """A stream, with the batches that were taken of it."""

    def __init__(self, count: int, batch: int, seed: int) -> None:
        prompts = tuple(Prompt(i, str(i), "", None, (i + 1,)) for i in range(count))
        self.stream = PromptStream(PromptSet(prompts), batch, seed, shuffle=True)
        self.batches: list[list[int]] = []

    def next(self) -> list[Prompt]:
        batch = self.stream.next()
        self.batches.append([prompt.index for prompt in batch])
        return batch


@given(
    st.lists(st.sampled_from([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)]), min_size=4, max_size=14),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_what_a_batch_is_made_of(scores: list[tuple[float, ...]], batch: int, rounds: int, seed: int) -> None:
    """By brute force over the prompts in the order in which the stream deals them."""
    by_index = dict(enumerate(scores))
    stream = Counted(len(scores), batch, seed)
    found = refilled(stream.next, lambda prompts: drawn(prompts, by_index), rounds)
    metrics = found.metrics
    teaching: list[int] = []
    dropped: list[int] = []
    taken = 0
    for number, dealt in enumerate(stream.batches):
        fresh = [i for i in dealt if i not in teaching + dropped]
        assert len(teaching) < batch or not number, "nothing is drawn beyond what is needed"
        taken += bool(fresh) or not number
        teaching += [i for i in fresh if len(set(by_index[i])) > 1]
        dropped += [i for i in fresh if len(set(by_index[i])) == 1]
    assert len(stream.batches) - 1 <= rounds
    assert metrics["sampling_rounds"] == taken - 1
    ended = len(teaching) >= batch or len(stream.batches) - 1 == rounds or taken < len(stream.batches)
    assert ended, "it went on as long as there was need, leave and a new prompt"
    fill = max(0, batch - len(teaching))
    expected = teaching[:batch] + dropped[:fill]
    e = found.experience
    assert list(e.prompt_ids) == [p.index for p in found.prompts] == expected
    assert len(set(expected)) == batch, "no prompt twice: its responses would be the same"
    assert e.fill == fill
    assert metrics["fill_frac"] == fill / batch
    assert metrics["dropped_frac"] == len(dropped) / len(dropped + teaching)
    all_drawn = [sum(by_index[i]) / SAMPLES for i in dropped + teaching]  # those beyond the batch, too
    assert metrics["drawn_reward"] == pytest.approx(sum(all_drawn) / len(all_drawn))
    assert e.logprobs_BS is e.sampled_logprobs_BS
    assert e.logprobs_BS is not None
    assert e.scores_B is not None
    for row, response in enumerate(e.responses):
        index, sample = expected[row // SAMPLES], row % SAMPLES
        assert response == (index + 1,) * (1 + (index + sample) % 4)
        assert e.logprobs_BS[row, : len(response)].tolist() == [-float(index + 1)] * len(response)
        assert float(e.scores_B[row]) == by_index[index][sample]


def test_equal_but_for_rounding_teaches_nothing() -> None:
    for value in (0.0, 1 / 3, -7e5):
        scores_G = torch.full((4,), value)
        assert not teaches(scores_G)
        scores_G[1] = torch.nextafter(scores_G[1], torch.tensor(1e9))
        assert not teaches(scores_G) or value == 0
    assert teaches(torch.tensor([1.0, 1.0, 1.0, 1.001]))


def odd_prompts(prompts: list[str], responses: list[str]) -> list[float]:
    """Responses to every other prompt all score 1, others by what they are."""
    own = [sum(map(int, response.split())) / 100 for response in responses]
    return [1.0 if int(p.split()[1]) % 2 == 0 else x for p, x in zip(prompts, own, strict=True)]


FUNCTION = {"function": "tests.rlhf.test_dynamic_sampling:odd_prompts", "workers": 0}
GRPO: dict[str, Any] = {"name": "grpo", "dynamic_sampling": {"rounds": 1}}


def test_a_function_and_a_reward_model_alike() -> None:
    """Of a model whose scores are all 0 nothing is kept: fill is left, and nothing is learned from it."""
    options: dict[str, Any] = {"generation": {"samples": 2}, "iterations": 2, "algorithm": GRPO}
    log = run(trainer_of(configured(**options, reward=FUNCTION)))
    for experience, metrics in zip(log.experiences, log.metrics, strict=True):
        kept = experience.prompt_ids[: len(experience.prompts) - experience.fill]
        assert all(index % 2 for index in kept)
        assert all(index % 2 == 0 for index in experience.prompt_ids[len(kept) :])
        assert metrics["dropped_frac"] > 0
        assert metrics["actor_grad_norm"] > 0
    config = configured(**options)
    assert "reward" not in resolve(config).inference.roles, "scored once, before inference"
    trainer = trainer_of(config)
    trainer.models.by_role["reward"].decoder.head_weight.data.zero_()
    before = {n: p.clone() for n, p in trainer.models.actor.decoder.named_parameters()}
    log = run(trainer)
    assert [m["fill_frac"] for m in log.metrics] == [1.0, 1.0]
    assert [m["actor_loss"] for m in log.metrics] == [0.0, 0.0]
    for name, parameter in trainer.models.actor.decoder.named_parameters():
        assert torch.equal(parameter, before[name])


def test_evaluation_knows_nothing_of_it() -> None:
    options: dict[str, Any] = {"generation": {"samples": 2}, "iterations": 1, "reward": FUNCTION}
    options["eval"] = {"every": 1}
    plain = run(trainer_of(configured(**options, algorithm={"name": "grpo"})))
    dynamic = run(trainer_of(configured(**options, algorithm=GRPO)))
    assert plain.evaluations[0] == dynamic.evaluations[0]
    assert plain.held_out[0][0].responses == dynamic.held_out[0][0].responses


def test_a_resumed_run_draws_the_same(tmp_path: Path) -> None:
    """Bitwise: the stream stands where the rounds before the checkpoint left it."""
    case = Bench(tmp_path).of({"batch": 4, **RUNS["grpo, DAPO"]}, "llama", (1, 1, 1))
    case.config["iterations"] = 4
    folder = tmp_path / "states"
    (alone,) = run_ranks(resumed_ranks.run, 1, 1, case, str(folder), 2, timeout=600.0)
    (again,) = run_ranks(
        resumed_ranks.run, 1, 1, case, str(shutil.copytree(folder, tmp_path / "again")), 0, timeout=600.0
    )
    assert sum(m["sampling_rounds"] for m in alone.metrics[:2]) > 0
    assert again.metrics == alone.metrics[2:]
    ours, theirs = ([e.responses for e in watch.experiences] for watch in (again, alone))
    assert ours == theirs[2:]


def test_refusals() -> None:
    for name in ("ppo", "reinforce_pp", "remax"):
        with pytest.raises(ValueError, match=f"dynamic_sampling: {name} learns from equal scores, too"):
            configured(algorithm={**GRPO, "name": name}, generation={"samples": 2})
    with pytest.raises(ValueError, match="greedy makes all samples of a prompt alike"):
        configured(algorithm=GRPO, generation={"samples": 2, "greedy": True})
    with pytest.raises(ValueError, match="rounds"):
        configured(algorithm={"name": "grpo", "dynamic_sampling": {"rounds": 0}}, generation={"samples": 2})
