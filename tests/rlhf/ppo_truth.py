"""What the reference makes of a case, and the comparison with what the ranks saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from puzzle.config.run import TrainConfig
from puzzle.model.noise import gumbel, row_keys
from puzzle.rlhf.experience import Experience, minibatches
from tests.reference import numpy_ppo
from tests.reference.hf_ppo import ReferencePPO, weights
from tests.reference.records import ReferenceConfig, Rollout, Step
from tests.reference.same_tokens import TokenAgreement, same_tokens
from tests.rlhf.ppo_ranks import Boxes, Case, Watch


@dataclass
class Truth:
    """The reference's iterations on the tokens of the run (teacher-forced), and how the tokens agree."""

    agreement: TokenAgreement = field(default_factory=TokenAgreement)
    rollouts: list[Rollout] = field(default_factory=list)
    steps: list[list[Step]] = field(default_factory=list)
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def reference_config(config: TrainConfig, stop_ids: Sequence[int]) -> ReferenceConfig:
    c, rows = config.algorithm, config.batch * config.generation.samples
    return ReferenceConfig(
        algorithm=c.name,
        samples=config.generation.samples,
        max_new_tokens=config.generation.max_new_tokens,
        eos_token_id=stop_ids[0] if stop_ids else None,
        temperature=config.generation.temperature,
        kl_coef=c.kl.coef,
        kl_estimator=c.kl.estimator,
        kl_place=c.kl.place,
        reference_free=c.reference_free,
        score_clip=c.reward_clip or float("inf"),
        gamma=c.gamma,
        lam=c.gae_lambda,
        whiten=c.whiten,
        clip=c.clip,
        clip_high=c.clip_high,
        dual_clip=c.dual_clip or float("inf"),
        ratio=c.ratio,
        overlong=None if c.overlong is None else (c.overlong.buffer, c.overlong.penalty),
        policy_loss=c.policy_loss,
        value_clip=c.value_clip,
        entropy_coef=c.entropy,
        epochs=c.epochs,
        minibatches=lambda iteration, epoch: minibatches(
            rows, config.minibatch, config.seed, iteration, epoch
        ),
        loss_average=c.loss_average,
        microbatch=c.microbatch or rows,
        actor_lr=config.actor.optimizer.lr,
        critic_lr=config.actor.optimizer.lr if config.critic is None else config.critic.optimizer.lr,
        eps=config.actor.optimizer.eps,
        max_grad_norm=config.actor.optimizer.grad_clip or float("inf"),
    )


def truth(case: Case, experiences: Sequence[Experience], reward: Any) -> Truth:
    """Run the reference on what the ranks drew; `reward` is a folder or a function of tokens."""
    config = TrainConfig.model_validate(case.config)
    critic = None if config.critic is None else str(config.critic.model)
    folders = (str(config.actor.model), critic, str(config.reference.model))
    reference = ReferencePPO(*folders, reward, reference_config(config, case.stop_ids))
    found = Truth()
    for iteration, experience in enumerate(experiences):
        prompts = [list(experience.prompt(row)) for row in range(len(experience))]
        drawn = [list(response) for response in experience.responses]
        found.agreement += _tokens(reference, config, experience, iteration, prompts, drawn)
        found.rollouts.append(reference.rollout(prompts, drawn, experience.fill * experience.samples))
        _correct(found.rollouts[-1], experience, config)
        found.steps.append(reference.update(found.rollouts[-1], iteration))
    found.weights = {role: weights(model) for role, (model, _) in reference.trained.items()}
    return found


def _correct(rollout: Rollout, experience: Experience, config: TrainConfig) -> None:
    """The weights of the reference's own log-probs over those that the ranks drew by."""
    c = config.algorithm.correction
    if c.kind == "none":
        return
    assert experience.sampled_logprobs_BS is not None
    drawn = [
        experience.take_N(experience.sampled_logprobs_BS, [row]).tolist() for row in range(len(experience))
    ]
    options = (c.kind, c.level, c.cap, c.low, c.high)
    rollout.correction, held = numpy_ppo.correction(rollout.logprobs, drawn, *options)
    assert 0 < held < sum(map(len, drawn)), "a case that corrects some tokens and not all"


def _tokens(
    reference: ReferencePPO,
    config: TrainConfig,
    experience: Experience,
    iteration: int,
    prompts: list[list[int]],
    drawn: list[list[int]],
) -> TokenAgreement:
    greedy, samples = config.generation.greedy, experience.samples

    def noise(row: int, position: int) -> Tensor:
        if greedy:
            return torch.zeros(())
        names = (experience.prompt_ids[row // samples], row % samples, position)
        keys = row_keys(config.seed, iteration, *(torch.tensor([name]) for name in names))
        return gumbel(keys, 0, reference.actor.config.vocab_size)[0]

    expected = reference.greedy(prompts) if greedy else reference.sampled(prompts, noise)

    def perturbed(row: int, position: int) -> Tensor:
        logits = reference.next_logits(prompts[row], expected[row][:position])
        return logits * config.generation.temperature if greedy else logits + noise(row, position)

    return same_tokens(expected, drawn, perturbed)


def compare(case: Case, watches: Sequence[Watch], true: Truth) -> None:
    """Everything the ranks saw against the reference; AssertionError says what differs."""
    config = TrainConfig.model_validate(case.config)
    first = watches[0]
    assert not true.agreement.wrong, true.agreement
    for iteration, experience in enumerate(first.experiences):
        _compare_rollout(
            experience, first.rewards[iteration] if first.rewards else None, true.rollouts[iteration], config
        )
        steps, metrics = true.steps[iteration], first.metrics[iteration]
        for role in true.weights:
            losses = [step.losses[role] for step in steps]
            norms = [step.grad_norms[role] for step in steps]
            near = pytest.approx(sum(losses) / len(losses), rel=1e-4, abs=2e-6)
            assert metrics[f"{role}_loss"] == near, (iteration, role)
            assert metrics[f"{role}_grad_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-4)
    steps = [step for part in true.steps for step in part]
    for role in true.weights:
        for index, step in enumerate(steps):
            found = [piece for watch in watches for piece in watch.grads[role][index]]
            expected = step.grads[role]
            # Later steps start from weights that differ by rounding already.
            share = 1e-5 if index == 0 else 3e-5
            largest = {name: share * float(tensor.abs().max()) for name, tensor in expected.items()}
            cover(found, expected, largest, f"step {index}: {role} gradient")
        found = [piece for watch in watches for piece in watch.weights[role]]
        limits = dict.fromkeys(true.weights[role], 1e-5)
        cover(found, true.weights[role], limits, f"{role} weight")


def _compare_rollout(
    experience: Experience, rewards_BS: Tensor | None, rollout: Rollout, config: TrainConfig
) -> None:
    pairs: dict[str, tuple[Tensor | None, Any]] = {
        "logprobs": (experience.logprobs_BS, rollout.logprobs),
        "values": (experience.values_BS, rollout.values),
        "rewards": (rewards_BS, rollout.rewards),
        "advantages": (experience.advantages_BS, rollout.advantages),
        "returns": (experience.returns_BS, rollout.returns),
    }
    assert (experience.ref_logprobs_BS is None) == (rollout.ref_logprobs is None)
    if rollout.ref_logprobs is not None:
        pairs["ref_logprobs"] = (experience.ref_logprobs_BS, rollout.ref_logprobs)
    for name, (got_BS, expected) in pairs.items():
        assert (got_BS is None) == (expected is None), name
        if got_BS is None:
            continue
        flat = torch.tensor([x for row in expected for x in row])
        got = experience.take_N(got_BS, range(len(experience)))
        torch.testing.assert_close(got, flat, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert experience.scores_B is not None
    torch.testing.assert_close(experience.scores_B, torch.tensor(rollout.scores), rtol=1e-5, atol=1e-5)


def cover(found: Boxes, expected: dict[str, Tensor], limits: dict[str, float], what: str) -> None:
    """Every piece within its limit, and together they cover all that the reference has."""
    covered = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in expected.items()}
    for name, intervals, values in found:
        box = tuple(slice(*interval) for interval in intervals)
        far = float((values - expected[name][box]).abs().max()) if values.numel() else 0.0
        assert far <= limits[name], f"{what} {name} {intervals}: off by {far:.3g}, limit {limits[name]:.3g}"
        covered[name][box] = True
    assert all(bool(c.all()) for c in covered.values()), f"{what}: not everything is there"


def drifted(watches: Sequence[Watch]) -> list[str]:
    """Weights that are not bitwise the same on all ranks that hold them."""
    seen: dict[tuple, Tensor] = {}
    apart = []
    for watch in watches:
        for role, pieces in watch.weights.items():
            for name, intervals, values in pieces:
                if not torch.equal(seen.setdefault((role, name, intervals), values), values):
                    apart.append(f"{role} {name}")
    return apart
