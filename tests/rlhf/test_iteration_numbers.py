"""The numbers of whole iterations, of the log and of what decides on from them, against numpy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from puzzle.errors import UserError
from puzzle.rlhf import draw, rollout
from puzzle.rlhf.algorithms import policy, ppo
from puzzle.rlhf.experience import Experience
from tests.reference import numpy_ppo
from tests.rlhf.one_process import Log, configured, run, trainer_of

LR = {"optimizer": {"lr": 0.02}}
SCORES: dict[str, list[list[float]]] = {}
"""What `scripted` gives at each call, for training and for held-out prompts."""


def scripted(prompts: list[str], responses: list[str]) -> list[float]:
    """Scores of a plan; held-out prompts are those from 100 on."""
    held_out = int(prompts[0].split()[1]) >= 100
    return SCORES["held_out" if held_out else "train"].pop(0)[: len(responses)]


def rows_of(experience: Experience, x_BS: torch.Tensor | None) -> list[list[float]]:
    assert x_BS is not None
    return [x_BS[row, : len(r)].double().tolist() for row, r in enumerate(experience.responses)]


def kl_of(experience: Experience, estimator: str) -> np.ndarray:
    """Per token, one response after the other."""
    actor = np.concatenate(rows_of(experience, experience.logprobs_BS))
    reference = np.concatenate(rows_of(experience, experience.ref_logprobs_BS))
    log_r = reference - actor
    return {"k1": -log_r, "k2": log_r**2 / 2, "k3": np.exp(log_r) - 1 - log_r}[estimator]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_log_describes_the_responses(estimator: str) -> None:
    ppo_options = {"kl": {"estimator": estimator, "place": "reward"}}
    log = run(trainer_of(configured(actor=LR, iterations=3, ppo=ppo_options, generation={"samples": 2})))
    lengths = {len(response) for e in log.experiences for response in e.responses}
    assert len(lengths) > 1, "responses of several lengths tell what was divided by"
    for experience, metrics in zip(log.experiences, log.metrics, strict=True):
        tokens, responses = sum(map(len, experience.responses)), len(experience)
        assert responses == 8
        kl = kl_of(experience, estimator)
        logprobs = np.concatenate(rows_of(experience, experience.logprobs_BS))
        assert experience.scores_B is not None
        scores = experience.scores_B.double().numpy()
        expected = {
            "kl": kl.sum() / tokens,
            "kl_response": kl.sum() / responses,
            "entropy": -logprobs.sum() / tokens,
            "reward": scores.mean(),
            "reward_std": scores.std(),
            "response_tokens": tokens,
            "response_length": tokens / responses,
        }
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert abs(log.metrics[2]["kl"]) > 1e-4
    assert log.metrics[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_the_log_describes_the_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are means of steps, shares and errors means of all tokens of all steps."""
    calls: dict[str, list[list[Any]]] = {"actor": [], "critic": []}
    for role, place, name in (("actor", policy, "policy_loss"), ("critic", ppo, "value_loss")):
        original = getattr(place, name)

        def watched(*args: Any, role: str = role, original: Any = original, **options: Any) -> Any:
            calls[role].append([x.detach().double().tolist() for x in args[:3]])
            return original(*args, **options)

        monkeypatch.setattr(place, name, watched)
    options = {"epochs": 3, "minibatch": 4, "microbatch": 2, "clip": 0.1, "value_clip": 0.05}
    config = configured(actor=LR, critic=LR, batch=8, iterations=1, ppo=options)
    log = run(trainer_of(config))
    (metrics,) = log.metrics
    assert len(calls["actor"]) == len(calls["critic"]) == 12  # 3 epochs, 2 minibatches, 2 micro-batches
    tokens = 3 * metrics["response_tokens"]
    actor = [numpy_ppo.policy_loss([new], [old], [a], 0.1) for new, old, a in calls["actor"]]
    value = [numpy_ppo.value_loss([new], [old], [r], 0.05) for new, old, r in calls["critic"]]
    plain = [numpy_ppo.value_loss([new], [old], [r], None) for new, old, r in calls["critic"]]
    assert sum(loss.tokens for loss in actor) == sum(loss.tokens for loss in value) == tokens
    expected = {
        "clip_frac": sum(loss.clip_fraction * loss.tokens for loss in actor) / tokens,
        "value_clip_frac": sum(loss.clip_fraction * loss.tokens for loss in value) / tokens,
        "approx_kl": sum(loss.approx_kl * loss.tokens for loss in actor) / tokens,
        "value_error": sum(2 * loss.value * loss.tokens for loss in plain) / tokens,
    }
    for name, losses in (("actor_loss", actor), ("critic_loss", value)):
        steps = [losses[i : i + 2] for i in range(0, 12, 2)]
        means = [sum(x.value * x.tokens for x in step) / sum(x.tokens for x in step) for step in steps]
        expected[name] = sum(means) / len(means)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert 0 < metrics["clip_frac"] < 1
    assert 0 < metrics["value_clip_frac"] < 1


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_the_adapted_coefficient_follows_the_kl_of_responses_and_is_used(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []
    rewards, loss = ppo.token_rewards, policy.policy_loss

    def token_rewards(scores_B: Any, kl_BS: Any, mask_BS: Any, coef: float, clip: Any) -> torch.Tensor:
        assert (kl_BS is None) == (place == "loss")
        if place == "reward":
            used.append(coef)
        return rewards(scores_B, kl_BS, mask_BS, coef, clip)

    def policy_loss(*args: Any, **options: Any) -> policy.PolicySums:
        if place == "loss":
            assert options["ref_logprobs"] is not None
            used.append(options["kl_coef"])
        return loss(*args, **options)

    monkeypatch.setattr(ppo, "token_rewards", token_rewards)
    monkeypatch.setattr(policy, "policy_loss", policy_loss)
    kl = {"coef": 0.3, "target": 0.04, "horizon": 20, "estimator": "k3", "place": place}
    trainer = trainer_of(
        configured(actor=LR, iterations=5, ppo={"kl": kl}, generation={"samples": 2}, batch=3)
    )
    log = run(trainer)
    coef, expected = 0.3, []
    for experience in log.experiences:
        expected.append(coef)
        observed = kl_of(experience, "k3").sum() / 6
        coef = numpy_ppo.adaptive_kl(coef, observed, 0.04, 6, 20)
    assert [metrics["kl_coef"] for metrics in log.metrics] == pytest.approx(expected)
    assert used == pytest.approx(expected)
    assert trainer.kl_coef == pytest.approx(coef)
    steps = np.sign(np.diff([*expected, coef]))
    assert {-1.0, 1.0} <= set(steps), "it went both ways"


def test_a_fixed_coefficient_stays() -> None:
    trainer = trainer_of(configured(actor=LR, iterations=3, ppo={"kl": {"coef": 0.3}}))
    assert [metrics["kl_coef"] for metrics in run(trainer).metrics] == [0.3] * 3


def test_kl_stop_ends_the_run_when_the_kl_of_a_token_exceeds_it() -> None:
    options: dict[str, Any] = {"kl": {"estimator": "k3"}}

    def stopped_at(stop: float | None) -> tuple[Log, int]:
        trainer = trainer_of(configured(actor=LR, iterations=4, ppo={**options, "kl_stop": stop}))
        return run(trainer), trainer.done

    free, done = stopped_at(None)
    kls = [metrics["kl"] for metrics in free.metrics]
    assert done == 4
    assert free.note is None
    assert kls[0] < 1e-6
    largest, second = sorted(kls, reverse=True)[:2]
    # The KL of a response is several times as large: it is not what is compared.
    for limit in (1.01 * largest, (largest + second) / 2, second / 2, 1e-6):
        log, done = stopped_at(limit)
        above = [number for number, kl in enumerate(kls, 1) if kl > limit]
        assert done == len(log.metrics) == (above[0] if above else 4)
        assert (log.note is not None) == bool(above)
        assert log.saved == [("last", done)]


def test_evaluations_draw_the_same_each_time_whatever_the_batch() -> None:
    still = {"optimizer": {"lr": 1e-30}}
    answers = []
    for batch, samples in ((2, 1), (3, 2), (8, 1)):
        config = configured(
            actor=still, critic=still, batch=batch, generation={"samples": samples}, eval={"every": 1}
        )
        log = run(trainer_of(config))
        assert [done for done, _ in log.evaluations] == [0, 1, 2]
        responses = [experience.responses for experience, _ in log.held_out]
        assert responses[0] == responses[1] == responses[2]
        assert [e.prompt_ids for e, _ in log.held_out] == [tuple(range(100, 107))] * 3
        answers.append((responses[0], log.held_out[0][1], log.evaluations[0][1]))
    for responses, scores, metrics in answers[1:]:
        assert responses == answers[0][0]
        assert scores == pytest.approx(answers[0][1], rel=1e-5, abs=1e-6)
        assert metrics == pytest.approx(answers[0][2], rel=1e-5)
    greedy = run(trainer_of(configured(actor=still, critic=still, eval={"every": 1, "greedy": True})))
    assert greedy.held_out[0][0].responses != answers[0][0]
    assert greedy.held_out[0][0].responses == greedy.held_out[1][0].responses


def test_evaluations_have_noise_of_their_own() -> None:
    """Not that of the first iteration, whose responses to the same prompts would be the same."""
    trainer = trainer_of(configured(batch=8, iterations=1, eval={"every": 1}))
    trainer.data = replace(trainer.data, held_out=trainer.data.train.prompts)
    log = run(trainer)
    evaluated = dict(zip(log.held_out[0][0].prompt_ids, log.held_out[0][0].responses, strict=True))
    (drawn,) = log.experiences
    pairs = [(r, evaluated[i]) for i, r in zip(drawn.prompt_ids, drawn.responses, strict=True)]
    assert len(pairs) == 8
    assert sum(a != b for a, b in pairs) > 4


@pytest.mark.parametrize("least", [0, 1, 3, 5])
def test_nothing_ends_a_response_before_its_least_length(least: int) -> None:
    """Where half of all tokens would."""
    config = configured(batch=8, iterations=1, generation={"samples": 4, "min_new_tokens": least})
    log = run(trainer_of(config, stop_ids=range(0, 40, 2)))
    lengths = [len(response) for response in log.experiences[0].responses]
    assert min(lengths) == min(5, least + 1)  # a stop token is one more
    assert max(lengths) == 5
    for response in log.experiences[0].responses:
        assert all(token % 2 for token in response[:-1]), "the first stop token ends it"
        assert len(response) == 5 or not response[-1] % 2


def test_responses_are_drawn_as_configured() -> None:
    options = {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "min_new_tokens": 2, "max_new_tokens": 6}
    found = rollout.sampling_params(configured(generation=options, seed=9), (5, 6))
    for name, value in {**options, "greedy": False, "stop_ids": (5, 6), "seed": 9}.items():
        assert getattr(found, name) == value, name
    assert rollout.sampling_params(configured(generation={"greedy": True}), ()).greedy


@pytest.mark.parametrize(("batch", "samples", "parts"), [(2, 1, [2, 2, 2, 1]), (2, 2, [4, 3]), (8, 1, [7])])
def test_an_evaluation_generates_as_many_at_a_time_as_an_iteration(
    batch: int, samples: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    original = rollout.generate

    def generate(decoder: Any, requests: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(requests))
        return original(decoder, requests, *args, **options)

    monkeypatch.setattr(rollout, "generate", generate)
    config = configured(batch=batch, iterations=1, generation={"samples": samples}, eval={"every": 1})
    run(trainer_of(config))
    assert sizes == [*parts, batch * samples, *parts]


def test_the_best_model_is_the_one_with_the_highest_held_out_reward() -> None:
    rng = np.random.default_rng(0)
    means = [0.5, -1.0, 0.2, 2.1, 1.0, 2.1]  # also better than the one before, and not than the best
    plan = [(rng.normal(size=7) + mean).tolist() for mean in means]
    plan = [[x - np.mean(row) + mean for x in row] for row, mean in zip(plan, means, strict=True)]
    plan[5] = plan[3]  # no better than the best
    SCORES.update(train=[[1.0, 2.0, 3.0, 4.0]] * 5, held_out=[list(row) for row in plan])
    config = configured(
        iterations=5,
        reward={"function": f"{__name__}:scripted"},
        eval={"every": 1},
        checkpoint={"save": True, "best": True},
    )
    trainer = trainer_of(config)
    log = run(trainer)
    assert [done for name, done in log.saved if name == "best"] == [0, 3]
    assert trainer.best == pytest.approx(2.1)
    assert trainer.state()["best"] == pytest.approx(2.1)
    assert [done for name, done in log.saved if name == "last"] == [5]
    for row, (_, metrics) in zip(plan, log.evaluations, strict=True):
        half = 1.96 * np.std(row, ddof=1) / np.sqrt(7)
        assert metrics == pytest.approx({"reward": np.mean(row), "reward_ci95": half}, rel=1e-5)


def test_a_constant_held_out_reward_has_no_interval_and_one_response_none_at_all() -> None:
    SCORES.update(train=[[1.0] * 4] * 5, held_out=[[3e38] * 7] * 5)
    config = configured(iterations=1, reward={"function": f"{__name__}:scripted"}, eval={"every": 1})
    assert run(trainer_of(config)).evaluations[0][1] == pytest.approx({"reward": 3e38, "reward_ci95": 0.0})
    assert run(trainer_of(config, held_out=1)).evaluations[0][1] == pytest.approx({"reward": 3e38})


@pytest.mark.parametrize("norm", [False, True])
def test_reward_norm_divides_by_the_spread_of_all_scores_so_far(norm: bool) -> None:
    plan = [[0.85] * 4, [0.85] * 4, [0.85, 1.0, 3.0, -2.0], [1.0, 1.5, 0.0, 4.0]]
    SCORES.update(train=[list(row) for row in plan], held_out=[])
    config = configured(
        iterations=4,
        reward={"function": f"{__name__}:scripted"},
        ppo={"reward_norm": norm, "reward_clip": None},
    )
    log = run(trainer_of(config))
    for number, experience in enumerate(log.experiences):
        seen = np.array(plan[: number + 1], dtype=np.float32).astype(np.float64)
        spread = seen.std() if norm and number >= 2 else 1.0
        assert experience.scores_B is not None
        assert experience.scores_B.tolist() == pytest.approx([x / spread for x in plan[number]], rel=1e-5)
        assert log.metrics[number]["reward"] == pytest.approx(np.mean(plan[number])), "the log's are raw"
        assert log.metrics[number]["reward_std"] == pytest.approx(np.std(plan[number]), abs=1e-7)


@pytest.mark.parametrize("norm", [False, True])
def test_scores_of_greedy_responses_are_scaled_as_those_of_the_others(norm: bool) -> None:
    """Their difference is the advantage; the spread is that of sampled responses, which are learnt from."""
    greedy = [[0.5, -1.0, 2.0, 0.0], [1.0, 1.0, -3.0, 0.5]]
    plan = [[0.85, 1.0, 3.0, -2.0], [1.0, 1.5, 0.0, 4.0]]
    calls = [list(row) for pair in zip(greedy, plan, strict=True) for row in pair]
    SCORES.update(train=calls, held_out=[])
    options = {
        "name": "remax",
        "kl": {"place": "loss", "estimator": "k2"},
        "reward_norm": norm,
        "reward_clip": None,
    }
    log = run(trainer_of(configured(reward={"function": f"{__name__}:scripted"}, algorithm=options)))
    for number, experience in enumerate(log.experiences):
        spread = np.std(np.concatenate(plan[: number + 1])) if norm else 1.0
        wanted = (np.array(plan[number]) - greedy[number]) / spread
        for row, advantage in zip(rows_of(experience, experience.advantages_BS), wanted, strict=True):
            assert row == pytest.approx([advantage] * len(row), rel=1e-5)


@pytest.mark.parametrize("name", ["remax", "rloo"])
def test_the_likeliest_responses_are_drawn_where_an_algorithm_asks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One to each prompt, after its samples, by the same policy and within the same limits."""
    drawn: list[tuple[bool, int, Experience]] = []
    original = draw.rollout

    def rolled(actor: Any, prompts: Any, samples: int, params: Any, *more: Any) -> Experience:
        found = original(actor, prompts, samples, params, *more)
        assert len(found.responses) == samples * len(prompts)
        drawn.append((params.greedy, samples, found))
        assert (params.max_new_tokens, params.temperature) == (5, 0.7)
        return found

    monkeypatch.setattr(draw, "rollout", rolled)
    generation = {"samples": 2, "temperature": 0.7}
    log = run(trainer_of(configured(algorithm={"name": name}, generation=generation)))
    kinds = [(False, 2), (True, 1)] if name == "remax" else [(False, 2)]
    assert [(greedy, samples) for greedy, samples, _ in drawn] == kinds * 2
    for experience in log.experiences:
        assert (experience.greedy_scores_P is not None) == (name == "remax")


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_learning_rates_of_all_steps_of_a_run(schedule: str, warmup: int) -> None:
    """2 iterations of 3 epochs of 2 minibatches: 12 steps, warmed up over the first, 0 behind the last."""
    optimizer = {"lr": 0.01, "schedule": schedule, "warmup": warmup, "grad_clip": None}
    config = configured(
        actor={"optimizer": optimizer}, batch=4, generation={"samples": 2}, ppo={"epochs": 3, "minibatch": 4}
    )
    trainer = trainer_of(config)
    used: list[float] = []
    assert trainer.models.actor.optimizer is not None
    trainer.models.actor.optimizer.adam.register_step_pre_hook(
        lambda adam, *_: used.append(adam.param_groups[0]["lr"])
    )
    run(trainer)
    rising = [0.01 * (step + 1) / 3 for step in range(warmup)]
    share = np.arange(12 - warmup) / (12 - warmup)
    falling = {"constant": 0 * share + 1, "linear": 1 - share, "cosine": (1 + np.cos(np.pi * share)) / 2}
    assert used == pytest.approx([*rising, *(0.01 * falling[schedule])])


def test_what_is_not_finite_is_named() -> None:
    SCORES.update(train=[[1.0] * 4] * 5, held_out=[])
    trainer = trainer_of(configured(iterations=1, reward={"function": f"{__name__}:scripted"}))
    with torch.no_grad():
        next(trainer.models.by_role["reference"].decoder.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match=r"^reference: a log-prob of response 1 of 4 is not finite; look at"):
        run(trainer)
