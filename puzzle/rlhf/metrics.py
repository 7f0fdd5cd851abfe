"""Numbers of an iteration that say how learning and the machine are doing (docs/log-schema.md tells them)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from puzzle.config.resolve import RunPlan
from puzzle.data.endings import Endings
from puzzle.data.prompts import Prompt
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.runtime.world import World
from puzzle.plan.run import ModelPlan
from puzzle.rlhf.experience import Experience
from puzzle.rlhf.rollout import is_finished
from puzzle.spec.flops import peak_flops, response_flops, train_flops


def response_metrics(
    experience: Experience,
    scores_B: Tensor,
    prompts: Sequence[Prompt],
    endings: Endings,
    longest: int,
) -> dict[str, float]:
    """Extremes of lengths and of scores (B,); the share of responses that were cut at `longest` tokens."""
    lengths = [len(response) for response in experience.responses]
    cut = [
        not is_finished(prompts[row // experience.samples], response, endings, longest)
        for row, response in enumerate(experience.responses)
    ]
    return {
        "reward_min": float(scores_B.min()),
        "reward_max": float(scores_B.max()),
        "response_length_min": float(min(lengths)),
        "response_length_max": float(max(lengths)),
        "truncated_frac": sum(cut) / len(cut),
    }


def learning_metrics(experience: Experience) -> dict[str, float]:
    """Of the tokens that are learnt from: mean, spread and extremes of advantages; of values their mean, that
    of returns, and the share of the returns' variance that they explain, 1 - Var(returns - values) /
    Var(returns), which is left out where returns do not vary."""
    found: dict[str, float] = {}
    if (x_BS := experience.advantages_BS) is not None:
        x = _counted(experience, x_BS)
        names = ("advantage_mean", "advantage_std", "advantage_min", "advantage_max")
        found |= _read(names, x.mean(), x.std(correction=0), x.min(), x.max())
    if experience.values_BS is not None and experience.returns_BS is not None:
        values, returns = (_counted(experience, x) for x in (experience.values_BS, experience.returns_BS))
        unexplained, whole = (returns - values).var(correction=0), returns.var(correction=0)
        names = ("value_mean", "return_mean", "unexplained", "whole")
        found |= _read(names, values.mean(), returns.mean(), unexplained, whole)
        left, variance = found.pop("unexplained"), found.pop("whole")
        if variance > 0:
            found["explained_variance"] = 1.0 - left / variance
    return found


def _read(names: Sequence[str], *numbers: Tensor) -> dict[str, float]:
    """Scalars of the device by name, brought to the host at once."""
    return dict(zip(names, torch.stack(numbers).tolist(), strict=True))


def _counted(experience: Experience, x_BS: Tensor) -> Tensor:
    """float64 (N,): the entries of tokens that are learnt from; a zero where there are none."""
    taken = x_BS[experience.counted_BS.to(x_BS.device)].double()
    return taken if len(taken) else taken.new_zeros(1)


def learning_rates(models: Mapping[str, ModelRuntime]) -> dict[str, float]:
    """The learning rate of each trained model's last optimizer step."""
    found = {}
    for role, model in models.items():
        assert model.optimizer is not None
        found[f"{role}_lr"] = model.optimizer.settings.lr_at(max(0, model.optimizer.steps - 1))
    return found


def speed_metrics(
    plan: RunPlan,
    experience: Experience,
    seconds: Mapping[str, float],
    total: float,
    device_flops: float | None,
) -> dict[str, float]:
    """Tokens per second and device: of prompts and responses over the iteration of `total` seconds, and of
    responses over generation. With `device_flops`, what a device does at most in a second, also the share of
    all devices' that each stage of `seconds` uses, by the operations of the batch that is learnt from."""
    devices = plan.config.world
    rows = range(len(experience))
    lengths = experience.lengths(rows)
    found = {"tokens_per_device_second": sum(lengths) / total / devices}
    if seconds["generation"] > 0:
        found["generated_per_device_second"] = experience.tokens(rows) / seconds["generation"] / devices
    if device_flops is None:
        return found
    for stage, flops in stage_flops(plan, experience).items():
        if flops and seconds[stage] > 0:
            found[f"mfu_{stage}"] = flops / seconds[stage] / devices / device_flops
    return found


def device_flops(device: torch.device) -> float | None:
    """What the device does at most in a second, dense bf16 operations; None where that is not known."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def stage_flops(plan: RunPlan, experience: Experience) -> dict[str, int]:
    """What the models have to compute of the responses, by stage: once in generation, once by every model of
    inference, forwards and backwards in every epoch of training. Heads count at response tokens."""
    rows = range(len(experience))
    lengths, tokens = experience.lengths(rows), experience.tokens(rows)

    def forward(model: ModelPlan) -> int:
        return response_flops(model.spec, lengths, tokens)

    epochs = plan.config.algorithm.epochs
    return {
        "generation": forward(plan.actor),
        "inference": sum(map(forward, plan.inference.models)),
        "training": epochs * sum(train_flops(m.spec, lengths, tokens) for m in plan.training.models),
    }


def memory_metrics(world: World, peaks: Mapping[str, int]) -> dict[str, float]:
    """Most bytes of tensors on any device during the iteration; nothing on CPUs, which do not count them.
    `peaks` are this rank's, by stage; call on every rank."""
    if not peaks:
        return {}
    most = torch.tensor(max(peaks.values()), dtype=torch.float64, device=world.device)
    return {"peak_bytes": float(world.max(most))}
