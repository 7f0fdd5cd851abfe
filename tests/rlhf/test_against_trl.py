"""Losses and overlong rewards against those of trl, in an environment of its own:

    python3 -m venv /path/to/trl
    /path/to/trl/bin/pip install trl
    PUZZLE_TRL_PYTHON=/path/to/trl/bin/python python -m pytest -s tests/rlhf/test_against_trl.py

Tried with trl 1.16.0. Its `delta` bounds the ratio before the clip: it is the dual clip where it lies above
the clip, as its manual asks for. Its cispo has no bound below, and names the bound above itself.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from puzzle.rlhf.algorithms.average import token_weights
from puzzle.rlhf.algorithms.policy import policy_loss
from puzzle.rlhf.algorithms.surrogate import Responses, Surrogate
from puzzle.rlhf.experience import Experience
from puzzle.rlhf.overlong import overlong_rewards
from tests.rlhf.one_process import configured

PYTHON = os.environ.get("PUZZLE_TRL_PYTHON")
SCRIPT = Path(__file__).parents[1] / "reference" / "trl_losses.py"
LONGEST = 12
AVERAGES = {"grpo": "sequence", "bnpo": "token", "dapo": "token", "dr_grpo": "constant", "cispo": "token"}
"""trl's types of loss, and how they average."""

pytestmark = pytest.mark.skipif(PYTHON is None, reason="PUZZLE_TRL_PYTHON names no Python that has trl")


def options() -> list[dict[str, Any]]:
    """Every type of loss with every level of the ratio, a KL, asymmetric and dual clips."""
    found = []
    for kind in AVERAGES:
        for level in ("token", "sequence"):
            for beta in (0.0, 0.1):
                bounds = [(0.2, 0.28, None), (0.1, 0.1, None)] if level == "token" else [(0.02, 0.04, None)]
                if kind != "cispo":
                    bounds.append((0.1, 0.15, 1.3) if level == "token" else (0.02, 0.04, 1.06))
                for low, high, delta in bounds:
                    top = 1 + high if kind == "cispo" else high
                    found.append(
                        {"loss_type": kind, "level": level, "beta": beta, "low": low, "high": top}
                        | {"delta": delta, "longest": LONGEST}
                    )
    return found


def case(option: dict[str, Any], seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, LONGEST + 1, size=6)
    lengths[0] = LONGEST
    old = rng.normal(size=(6, LONGEST)) - 2
    new = old + 0.25 * rng.normal(size=old.shape)
    reference = old + 0.4 * rng.normal(size=old.shape)
    mask = (np.arange(LONGEST) < lengths[:, None]).astype(int)
    tensors = {"new": new, "old": old, "reference": reference, "mask": mask, "advantages": rng.normal(size=6)}
    return {"options": option} | {name: x.tolist() for name, x in tensors.items()}


def ours(given: dict[str, Any]) -> tuple[float, np.ndarray]:
    """Loss and gradient (B, S) as a run of two micro-batches finds them."""
    o = given["options"]
    cispo = o["loss_type"] == "cispo"
    surrogate = Surrogate(
        1.0 if cispo else o["low"],
        o["high"] - 1 if cispo else o["high"],
        o["delta"],
        o["level"],
        "cispo" if cispo else "clipped",
    )
    lengths = np.array(given["mask"]).sum(1).tolist()
    experience = Experience(((1,),) * 6, tuple(range(6)), tuple((1,) * n for n in lengths))
    minibatch = [[[3, 0, 5, 1], [2, 4]]]
    total, gradient = 0.0, np.zeros((6, LONGEST))
    for part in minibatch[0]:
        packed = {
            name: torch.cat([torch.tensor(given[name][r][: lengths[r]], dtype=torch.float64) for r in part])
            for name in ("new", "old", "reference")
        }
        new = packed["new"].requires_grad_()
        advantages = torch.cat([torch.full((lengths[r],), given["advantages"][r]).double() for r in part])
        average = AVERAGES[o["loss_type"]]
        device = torch.device("cpu")
        weights = token_weights(experience, minibatch, part, average, LONGEST, device)  # ty: ignore[invalid-argument-type]
        sums = policy_loss(
            new,
            packed["old"],
            advantages,
            torch.ones_like(new, dtype=torch.bool),
            surrogate=surrogate,
            responses=Responses.of([lengths[r] for r in part], device),
            weights=weights,
            ref_logprobs=packed["reference"] if o["beta"] else None,
            kl_coef=o["beta"],
            kl_estimator="k3",
        )
        (slopes,) = torch.autograd.grad(sums.loss, new)
        for r, own in zip(part, torch.split(slopes, [lengths[r] for r in part]), strict=True):
            gradient[r, : lengths[r]] = own.numpy()
        total += float(sums.loss.detach())
    return total, gradient


def test_losses_gradients_and_overlong_rewards_are_trls() -> None:
    losses = [case(option, seed) for option in options() for seed in range(4)]
    lengths = list(range(1, 21))
    long: list[dict[str, Any]] = [
        {"longest": 20, "buffer": buffer, "lengths": lengths} for buffer in (1, 7, 20)
    ]
    asked = json.dumps({"losses": losses, "overlong": long})
    assert PYTHON is not None
    # Not through this environment's paths: trl is to find its own.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    answer = subprocess.run(
        [PYTHON, str(SCRIPT)], input=asked, capture_output=True, text=True, check=False, env=environment
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    found = json.loads(answer.stdout)
    worst = {"loss": 0.0, "gradient": 0.0}
    for given, theirs in zip(losses, found["losses"], strict=True):
        value, gradient = ours(given)
        worst["loss"] = max(worst["loss"], abs(value - theirs["loss"]))
        worst["gradient"] = max(worst["gradient"], float(np.abs(gradient - theirs["gradient"]).max()))
        assert value == pytest.approx(theirs["loss"], abs=1e-6), given["options"]
        np.testing.assert_allclose(gradient, theirs["gradient"], rtol=0, atol=1e-6)
    for given, theirs in zip(long, found["overlong"], strict=True):
        responses = tuple((1,) * n for n in given["lengths"])
        experience = Experience(((1,),) * len(responses), tuple(range(len(responses))), responses)
        config = configured(
            generation={"max_new_tokens": 20}, algorithm={"overlong": {"buffer": given["buffer"]}}
        )
        rewards = overlong_rewards(experience, config)
        assert rewards is not None
        np.testing.assert_allclose(rewards.numpy(), theirs, rtol=0, atol=1e-6)
    print(f"{len(losses)} losses: furthest loss {worst['loss']:.1e}, gradient {worst['gradient']:.1e}")
