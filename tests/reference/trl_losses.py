"""Losses and gradients by trl's own GRPOTrainer, for `test_against_trl`: run by a Python that has trl.

Reads cases as JSON from the standard input and writes what trl makes of them to the standard output.
"""

import json
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from trl import GRPOTrainer  # ty: ignore[import-not-found]
from trl.rewards import get_soft_overlong_punishment  # ty: ignore[import-not-found]


def loss(case: dict[str, Any]) -> dict[str, Any]:
    """`_compute_loss` of a trainer that has all but a model: log-probs are given."""
    o = case["options"]
    tensors = {name: torch.tensor(case[name], dtype=torch.float64) for name in ("new", "old", "reference")}
    new = tensors["new"].requires_grad_()
    mask = torch.tensor(case["mask"])
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=o["level"],
        beta=o["beta"],
        args=SimpleNamespace(use_bias_correction_kl=False, delta=o["delta"], steps_per_generation=1),
        loss_type=o["loss_type"],
        epsilon_low=o["low"],
        epsilon_high=o["high"],
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=o["longest"],
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {
        "prompt_ids": torch.zeros(len(new), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(new), 1, dtype=torch.int64),
        "completion_ids": torch.zeros(new.shape, dtype=torch.int64),
        "completion_mask": mask,
        "advantages": torch.tensor(case["advantages"], dtype=torch.float64),
        "old_per_token_logps": tensors["old"],
        "ref_per_token_logps": tensors["reference"],
        "num_items_in_batch": mask.sum(),
    }
    value = GRPOTrainer._compute_loss(trainer, None, inputs)
    (gradient,) = torch.autograd.grad(value, new)
    return {"loss": float(value.detach()), "gradient": gradient.tolist()}


def overlong(case: dict[str, Any]) -> list[float]:
    """trl's soft punishment of responses of these lengths."""
    rewards = get_soft_overlong_punishment(case["longest"], case["buffer"])
    return rewards(completion_ids=[[0] * length for length in case["lengths"]])


if __name__ == "__main__":
    cases = json.load(sys.stdin)
    found = {
        "losses": [loss(c) for c in cases["losses"]],
        "overlong": [overlong(c) for c in cases["overlong"]],
    }
    json.dump(found, sys.stdout)
