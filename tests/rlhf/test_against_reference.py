"""Rollout arithmetic, losses and gradients against the reference, whatever cuts the minibatch.

The network is transformers' own here; the engine's networks and layouts are compared elsewhere.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from puzzle.engine.pipeline.model import share
from puzzle.rlhf.algorithms import policy, ppo, scale
from puzzle.rlhf.algorithms.surrogate import Surrogate
from puzzle.rlhf.experience import Experience, minibatches
from puzzle.rlhf.microbatches import microbatches
from tests.reference.hf_ppo import ReferencePPO
from tests.reference.records import ReferenceConfig
from tests.reference.tiny import save_lm, save_value

PROMPTS = ((5, 9, 200), (7, 7, 31, 99, 120, 3, 18), (250,), (11, 12))
RESPONSES = ((4, 9, 1), (77, 3), (8,), (1, 2, 3, 4, 5, 6), (9, 9), (250, 8, 12, 13), (30, 31, 32), (7, 0, 7))
OPTIONS = {
    "plain": ReferenceConfig(),
    "whitened": ReferenceConfig(
        whiten=True, temperature=0.8, entropy_coef=0.01, kl_estimator="k3", gamma=0.98
    ),
    "kl in loss": ReferenceConfig(
        kl_place="loss", kl_estimator="k2", value_clip=None, clip=0.1, score_clip=0.5
    ),
    "no reference": ReferenceConfig(reference_free=True),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("tiny")
    return [
        save_lm(root / "actor", seed=0, num_hidden_layers=2),
        save_value(root / "critic", seed=1, num_hidden_layers=2),
        save_lm(root / "reference", seed=2, num_hidden_layers=2),
        save_value(root / "reward", seed=3, num_hidden_layers=2),
    ]


def padded(experience: Experience, rows: list[list[float]]) -> Tensor:
    x_N = torch.tensor([x for row in rows for x in row])
    return experience.put_RS(x_N, range(len(experience)))


def rolled_out(c: ReferenceConfig, truth, experience: Experience) -> Experience:
    """The experience by puzzle's functions from the reference's log-probs, values and scores."""
    logprobs_BS, values_BS = padded(experience, truth.logprobs), padded(experience, truth.values)
    ref_BS = None if truth.ref_logprobs is None else padded(experience, truth.ref_logprobs)
    scores_B, mask_BS = torch.tensor(truth.scores), experience.mask_BS
    kl_BS = None
    if ref_BS is not None and c.kl_place == "reward":
        kl_BS = policy.token_kl(logprobs_BS, ref_BS, c.kl_estimator)  # ty: ignore[invalid-argument-type]
    rewards_BS = ppo.token_rewards(scores_B, kl_BS, mask_BS, c.kl_coef, c.score_clip)
    advantages_BS, returns_BS = ppo.gae(rewards_BS, values_BS, mask_BS, c.gamma, c.lam)
    if c.whiten:
        advantages_BS = scale.whiten(advantages_BS, mask_BS, scale.moments(advantages_BS, mask_BS))
    return dataclasses.replace(
        experience,
        scores_B=scores_B,
        logprobs_BS=logprobs_BS,
        ref_logprobs_BS=ref_BS,
        values_BS=values_BS,
        advantages_BS=advantages_BS,
        returns_BS=returns_BS,
    )


def gradients(reference: ReferencePPO, experience: Experience, rows: list[int], dp: int, size: int):
    """Losses and gradients of a minibatch, cut over `dp` replicas and micro-batches of `size` rows."""
    c, e = reference.config, experience
    assert e.logprobs_BS is not None
    assert e.values_BS is not None
    assert e.advantages_BS is not None
    assert e.returns_BS is not None
    for model, _ in reference.trained.values():
        model.zero_grad()
    tokens, losses = e.tokens(rows), [0.0, 0.0]
    for d in range(dp):
        mine = [rows[i] for i in share(len(rows), dp, d)]
        for part in microbatches(mine, e.lengths(mine), size):
            pairs = [(list(e.prompt(row)), list(e.responses[row])) for row in part]
            both = [reference.answer_logprobs(reference.actor, p, a) for p, a in pairs]
            values_N = torch.cat([reference.answer_values(p, a) for p, a in pairs])
            mask_N = torch.ones_like(values_N, dtype=torch.bool)
            in_loss = e.ref_logprobs_BS if c.kl_place == "loss" else None
            actor = policy.policy_loss(
                torch.cat([logprobs for logprobs, _ in both]),
                e.take_N(e.logprobs_BS, part),
                e.take_N(e.advantages_BS, part),
                mask_N,
                surrogate=Surrogate(c.clip),
                entropy=torch.cat([entropy for _, entropy in both]),
                entropy_coef=c.entropy_coef,
                ref_logprobs=None if in_loss is None else e.take_N(in_loss, part),
                kl_coef=c.kl_coef,
                kl_estimator=c.kl_estimator,  # ty: ignore[invalid-argument-type]
            )
            old_N, returns_N = e.take_N(e.values_BS, part), e.take_N(e.returns_BS, part)
            critic = ppo.value_loss(values_N, old_N, returns_N, mask_N, clip=c.value_clip)
            for index, sums in enumerate((actor, critic)):
                (sums.loss / tokens).backward()
                losses[index] += float(sums.loss.detach()) / tokens
    models = [model for model, _ in reference.trained.values()]
    return losses, [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in models]


def close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((got[name] - tensor).abs().max()) <= 1e-5 * float(tensor.abs().max()), name


@pytest.mark.parametrize("option", OPTIONS)
def test_rollout_and_steps(folders, option):
    config = dataclasses.replace(
        OPTIONS[option], epochs=2, minibatches=lambda iteration, epoch: minibatches(8, 5, 3, iteration, epoch)
    )
    reference = ReferencePPO(*folders, config=config)
    prompts = [list(PROMPTS[row // 2]) for row in range(8)]
    truth = reference.rollout(prompts, [list(response) for response in RESPONSES])
    experience = rolled_out(config, truth, Experience(PROMPTS, (0, 1, 2, 3), RESPONSES, samples=2))
    for name in ("advantages", "returns"):
        expected_BS = padded(experience, getattr(truth, name))
        torch.testing.assert_close(getattr(experience, f"{name}_BS"), expected_BS, rtol=1e-5, atol=1e-5)
    # Before each of the reference's steps, the same weights give the same losses and gradients in any cut.
    for epoch in range(config.epochs):
        for rows in minibatches(8, 5, 3, 0, epoch):
            cuts = [(1, 5), (1, 1), (2, 2), (4, 1)]
            found = [gradients(reference, experience, rows, dp, size) for dp, size in cuts]
            step = one_step(reference, truth, rows)
            for losses, grads in found:
                assert losses == pytest.approx(
                    [step.losses["actor"], step.losses["critic"]], rel=1e-5, abs=1e-6
                )
                close(grads[0], step.grads["actor"])
                close(grads[1], step.grads["critic"])


def one_step(reference: ReferencePPO, truth, rows: list[int]):
    config = reference.config
    reference.config = dataclasses.replace(config, epochs=1, minibatches=lambda iteration, epoch: [rows])
    (step,) = reference.update(truth)
    reference.config = config
    return step
