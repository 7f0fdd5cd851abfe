"""One PPO iteration in one process, written plainly on transformers and torch.optim: the truth for the
engine in every layout.

It shares no code with puzzle. Sequences are handled one by one without padding (only `greedy` left-pads, as
transformers does), everything is fp32 on the CPU, and the arithmetic between forward passes is float64
(`numpy_ppo`).

Conventions, for prompt p of P tokens and answer a of R >= 1 tokens (the end-of-text token included when it
was drawn): answer token k has log-prob, entropy and value at position P + k - 1 of the sequence p + a, the
state before it was written; logits are divided by the temperature; the reward model's score is its head's
output at the last answer token.

Use:
result = run_reference(actor, critic, reference, reward, prompts, ReferenceConfig(...))              #
greedy answers
result = run_reference(..., responses=[answers of iteration 0, answers of iteration 1, ...])         #
teacher-forced or `ReferencePPO` for single stages: greedy, sampled, rollout, update, next_logits.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from tests.reference import numpy_ppo
from tests.reference.records import ReferenceConfig, ReferenceResult, Rollout, Step, Tokens

RewardFunction = Callable[[Tokens, Tokens], list[float]]


def _load_lm(folder: Path | str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def _load_value(folder: Path | str) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def token_values(model: PreTrainedModel, sequence: Sequence[int]) -> Tensor:
    """(S,) output of a one-label head after every token."""
    ids = torch.tensor([list(sequence)])
    return model.get_submodule("score")(model.base_model(input_ids=ids).last_hidden_state)[0, :, 0]


class ReferencePPO:
    """The four models and two optimizers; stages can be called one by one."""

    def __init__(
        self,
        actor: Path | str,
        critic: Path | str | None,
        reference: Path | str,
        reward: Path | str | RewardFunction,
        config: ReferenceConfig,
    ) -> None:
        self.config = config
        self.actor, self.reference = _load_lm(actor), _load_lm(reference)
        self.critic = None if critic is None else _load_value(critic)
        self.reward: RewardFunction = (
            self._model_reward(reward) if isinstance(reward, (str, Path)) else reward
        )
        self.trained = {"actor": (self.actor, self._optimizer(self.actor, config.actor_lr))}
        if self.critic is not None:
            self.trained["critic"] = (self.critic, self._optimizer(self.critic, config.critic_lr))

    def _optimizer(self, model: PreTrainedModel, lr: float) -> torch.optim.Optimizer:
        c = self.config
        return torch.optim.AdamW(
            model.parameters(), lr=lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay, foreach=False
        )

    def _model_reward(self, folder: Path | str) -> RewardFunction:
        """The reward head's output at the last answer token."""
        model = _load_value(folder)
        return lambda prompts, responses: [
            float(token_values(model, p + a)[-1]) for p, a in zip(prompts, responses, strict=True)
        ]

    # Generation

    @torch.no_grad()
    def greedy(self, prompts: Tokens) -> Tokens:
        """Answers by transformers' own generate on one left-padded batch."""
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        eos = self.config.eos_token_id
        output = cast(Any, self.actor).generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=self.config.max_new_tokens,
            eos_token_id=eos,
            pad_token_id=0,
        )
        answers = []
        for row in output[:, width:].tolist():
            stop = row.index(eos) + 1 if eos in row else len(row)
            answers.append(row[:stop])
        return answers

    @torch.no_grad()
    def next_logits(self, prompt: list[int], answer: list[int]) -> Tensor:
        """(V,) logits / temperature of the token after prompt + answer."""
        return self.actor(torch.tensor([prompt + answer])).logits[0, -1] / self.config.temperature

    def sampled(self, prompts: Tokens, noise: Callable[[int, int], Tensor]) -> Tokens:
        """Answers by argmax(logits / temperature + noise(row, position)), position counting answer tokens."""
        answers = []
        for row, prompt in enumerate(prompts):
            answer: list[int] = []
            while len(answer) < self.config.max_new_tokens:
                answer.append(int((self.next_logits(prompt, answer) + noise(row, len(answer))).argmax()))
                if answer[-1] == self.config.eos_token_id:
                    break
            answers.append(answer)
        return answers

    # Inference

    def answer_logprobs(
        self, model: PreTrainedModel, prompt: list[int], answer: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies (R,) of the answer's tokens at the temperature."""
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        everything = torch.log_softmax(logits / self.config.temperature, dim=-1)
        entropy = -(everything.exp() * everything).sum(dim=-1)
        return everything[torch.arange(len(answer)), torch.tensor(answer)], entropy

    def answer_values(self, prompt: list[int], answer: list[int]) -> Tensor:
        """(R,) critic values of the states before each answer token."""
        assert self.critic is not None
        return token_values(self.critic, prompt + answer)[len(prompt) - 1 : -1]

    @torch.no_grad()
    def rollout(self, prompts: Tokens, responses: Tokens, fill: int = 0) -> Rollout:
        """Log-probs, values, rewards, advantages and returns of given answers; the last `fill` rows count
        nowhere."""
        c, counted = self.config, len(responses) - fill
        pairs = list(zip(prompts, responses, strict=True))
        logprobs = [self.answer_logprobs(self.actor, p, a)[0].tolist() for p, a in pairs]
        ref_logprobs = None
        if not c.reference_free:
            ref_logprobs = [self.answer_logprobs(self.reference, p, a)[0].tolist() for p, a in pairs]
        scores = self.shaped(prompts, responses)
        if c.algorithm in ("reinforce_pp", "reinforce_pp_baseline", "remax"):
            greedy = None
            if c.algorithm == "remax":
                once = prompts[:: c.samples]
                greedy = self.shaped(once, self.greedy(once))
            spread = numpy_ppo.reinforce_advantages(
                logprobs,
                ref_logprobs if c.kl_place == "reward" else None,
                scores,
                algorithm=c.algorithm,
                samples=c.samples,
                beta=c.kl_coef,
                limit=c.score_clip,
                estimator=c.kl_estimator,
                gamma=c.gamma,
                greedy=greedy,
                counted=counted,
            )
            return Rollout(
                prompts, responses, scores, logprobs, ref_logprobs, None, None, spread, None, counted
            )
        if c.algorithm != "ppo":
            limited = [min(max(score, -c.score_clip), c.score_clip) for score in scores]
            if c.kl_place == "reward" and ref_logprobs is not None:
                for row, (new, old) in enumerate(zip(logprobs, ref_logprobs, strict=True)):
                    kl = [numpy_ppo.kl_estimate(a, b, c.kl_estimator) for a, b in zip(new, old, strict=True)]
                    limited[row] -= c.kl_coef * sum(kl)
            per_row = numpy_ppo.group_advantages(limited, c.samples, c.algorithm)
            per_row[counted:] = [0.0] * fill
            spread = [[value] * len(row) for value, row in zip(per_row, responses, strict=True)]
            return Rollout(
                prompts, responses, scores, logprobs, ref_logprobs, None, None, spread, None, counted
            )
        values = [self.answer_values(p, a).tolist() for p, a in pairs]
        penalised = ref_logprobs if c.kl_place == "reward" else None
        rewards = numpy_ppo.rewards(logprobs, penalised, scores, c.kl_coef, c.score_clip, c.kl_estimator)
        both = [numpy_ppo.gae(r, v, c.gamma, c.lam) for r, v in zip(rewards, values, strict=True)]
        advantages, returns = [a for a, _ in both], [r for _, r in both]
        if c.whiten:
            advantages = numpy_ppo.whiten(advantages)
        return Rollout(
            prompts, responses, scores, logprobs, ref_logprobs, values, rewards, advantages, returns, counted
        )

    def shaped(self, prompts: Tokens, responses: Tokens) -> list[float]:
        """Scores, less what overlong answers cost."""
        scores, c = self.reward(prompts, responses), self.config
        if c.overlong is None:
            return scores
        lengths = [len(response) for response in responses]
        costs = [numpy_ppo.overlong(length, c.max_new_tokens, *c.overlong) for length in lengths]
        return [score + cost for score, cost in zip(scores, costs, strict=True)]

    # Training

    def _actor_row_loss(self, rollout: Rollout, row: int) -> Tensor:
        """Sum of the policy loss over one row's answer tokens."""
        c = self.config
        new, entropy = self.answer_logprobs(self.actor, rollout.prompts[row], rollout.responses[row])
        advantage = torch.tensor(rollout.advantages[row])
        losses = self._surrogate(new, torch.tensor(rollout.logprobs[row]), advantage)
        if rollout.correction is not None:
            losses = losses * torch.tensor(rollout.correction[row])
        loss = losses.sum() - c.entropy_coef * entropy.sum()
        if c.kl_place == "loss" and rollout.ref_logprobs is not None:
            gap = torch.tensor(rollout.ref_logprobs[row]) - new
            kl = {"k1": -gap, "k2": 0.5 * gap**2, "k3": torch.exp(gap) - 1 - gap}[c.kl_estimator]
            loss = loss + c.kl_coef * kl.sum()
        return loss

    def _surrogate(self, new: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
        """(R,) what is minimised of one row. A ratio by sequence is GSPO's own where the row's advantages
        are all equal, else GSPO-token's."""
        c = self.config
        high = c.clip if c.clip_high is None else c.clip_high
        ratio = torch.exp(new - old)
        if c.ratio == "sequence":
            ratio = torch.exp((new - old).sum() / len(new)).expand(len(new))
            if not bool((advantage == advantage[0]).all()):
                ratio = ratio.detach() * torch.exp(new) / torch.exp(new).detach()
        held = torch.clamp(ratio, 1 - c.clip, 1 + high)
        if c.policy_loss == "cispo":
            return -held.detach() * advantage * new
        objective = torch.min(advantage * ratio, advantage * held)
        worst = torch.max(objective, c.dual_clip * advantage)
        return -torch.where(advantage < 0, worst, objective)

    def _critic_row_loss(self, rollout: Rollout, row: int) -> Tensor:
        """Sum of the value loss over one row's answer tokens."""
        clip = self.config.value_clip
        assert rollout.values is not None
        assert rollout.returns is not None
        value = self.answer_values(rollout.prompts[row], rollout.responses[row])
        old, target = torch.tensor(rollout.values[row]), torch.tensor(rollout.returns[row])
        errors = [(value - target) ** 2]
        if clip is not None:
            errors.append((old + torch.clamp(value - old, -clip, clip) - target) ** 2)
        return 0.5 * torch.stack(errors).max(dim=0).values.sum()

    def _row_weights(self, rollout: Rollout, rows: list[int]) -> list[float]:
        """What each row's sum is multiplied with, so that the rows of a minibatch add up to its loss."""
        here = [row < rollout.counted for row in rows]
        lengths = [len(rollout.responses[row]) * counts for row, counts in zip(rows, here, strict=True)]
        if not any(here):
            return [0.0] * len(rows)
        if self.config.loss_average == "token":
            divisors = [sum(lengths)] * len(rows)
        elif self.config.loss_average == "sequence":
            divisors = [length * sum(here) for length in lengths]
        elif self.config.loss_average == "constant":
            divisors = [self.config.max_new_tokens * sum(here)] * len(rows)
        else:
            size = self.config.microbatch
            groups = [lengths[i : i + size] for i in range(0, len(rows), size)]
            passes = sum(any(group) for group in groups)
            divisors = [sum(group) * passes for group in groups for _ in group]
        return [1 / d if counts else 0.0 for d, counts in zip(divisors, here, strict=True)]

    def _step(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        row_loss: Callable[[Rollout, int], Tensor],
        rollout: Rollout,
        rows: list[int],
    ) -> tuple[float, dict[str, Tensor], float]:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for row, weight in zip(rows, self._row_weights(rollout, rows), strict=True):
            loss = row_loss(rollout, row) * weight
            loss.backward()
            total += float(loss.detach())
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        norm = float(sum(g.double().square().sum() for g in grads.values())) ** 0.5
        for parameter in model.parameters():
            if parameter.grad is not None and norm > self.config.max_grad_norm:
                parameter.grad.mul_(self.config.max_grad_norm / norm)
        optimizer.step()
        return total, grads, norm

    def update(self, rollout: Rollout, iteration: int = 0) -> list[Step]:
        """All optimizer steps of one iteration: `epochs` passes over the minibatches."""
        steps = []
        for epoch in range(self.config.epochs):
            order = [list(range(len(rollout.prompts)))]
            if self.config.minibatches is not None:
                order = self.config.minibatches(iteration, epoch)
            for rows in order:
                step = Step(rows, {}, {}, {})
                for role, (model, optimizer) in self.trained.items():
                    row_loss = self._actor_row_loss if role == "actor" else self._critic_row_loss
                    found = self._step(model, optimizer, row_loss, rollout, rows)
                    step.losses[role], step.grads[role], step.grad_norms[role] = found
                steps.append(step)
        return steps


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of all parameters by Hugging Face name; a tied matrix appears once."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def run_reference(
    actor: Path | str,
    critic: Path | str,
    reference: Path | str,
    reward: Path | str | RewardFunction,
    prompts: Tokens,
    config: ReferenceConfig,
    responses: Sequence[Tokens] | None = None,
    iterations: int = 1,
) -> ReferenceResult:
    """Run PPO on the same prompts for `iterations` iterations, or one per entry of `responses` when answers
    are given.
    """
    ppo = ReferencePPO(actor, critic, reference, reward, config)
    rollouts: list[Rollout] = []
    steps: list[Step] = []
    for iteration in range(iterations if responses is None else len(responses)):
        answers = ppo.greedy(prompts) if responses is None else responses[iteration]
        rollouts.append(ppo.rollout(prompts, answers))
        steps += ppo.update(rollouts[-1], iteration)
    assert ppo.critic is not None
    return ReferenceResult(rollouts, steps, weights(ppo.actor), weights(ppo.critic))
