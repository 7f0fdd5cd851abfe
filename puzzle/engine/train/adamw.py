"""AdamW as torch or apex computes it, and a step clipped by a norm that only the device knows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzle.errors import UserError


@dataclass
class AdamWSettings:
    """Hyper-parameters; `lr_at(step)` gives the learning rate of optimizer step 0, 1, ..."""

    lr_at: Callable[[int], float]
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float | None = 1.0
    backend: str = "torch"


class _AdamW(torch.optim.AdamW):
    """torch's, without what its wrappers do for torch's compiler: at the first call they import it, in every
    process, which takes as long as importing torch."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # ty: ignore[incompatible-method-override]
        """One step of all groups."""
        inspect.unwrap(torch.optim.AdamW.step)(self, closure)


def make_adam(masters: Sequence[Tensor], settings: AdamWSettings) -> torch.optim.Optimizer:
    """AdamW over the masters: decay on matrices alone, as is usual. UserError where apex is asked for and
    missing."""
    groups = []
    for matrices in (True, False):
        members = [m for m in masters if (m.dim() > 1) is matrices and m.numel()]
        if members:
            groups.append({"params": members, "weight_decay": settings.weight_decay if matrices else 0.0})
    if settings.backend == "apex":
        try:
            from apex.optimizers import FusedAdam  # ty: ignore[import-not-found]
        except ImportError as error:
            raise UserError(f"optimizer.backend apex: {error}; install apex or use torch") from error
        return FusedAdam(groups, lr=0.0, betas=settings.betas, eps=settings.eps, adam_w_mode=True)
    return _AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)


def clipped_step(
    adam: torch.optim.Optimizer, grads: list[Tensor], norm: Tensor, settings: AdamWSettings
) -> None:
    """A step on gradients (`grads`, all that the optimizer has) clipped to a norm of `grad_clip`.

    The host does not wait for the norm: a step on gradients as they are and one that divides them are
    launched, and on the device one of them, or, if the norm is not finite, both find that they are to leave
    everything as it is. Apex can neither divide nor leave out.
    """
    clip = settings.grad_clip
    inside = norm.isfinite() if clip is None else norm <= clip
    if settings.backend == "apex":
        if clip is not None:
            torch._foreach_mul_(grads, torch.where(inside, 1.0, clip / (norm + 1e-6)))
        adam.step()
        return
    ways = [(None, inside)]
    if clip is not None:
        ways.append(((norm + 1e-6) / clip, (norm > clip) & norm.isfinite()))
    for divisor, wanted in ways:
        setattr(adam, "grad_scale", divisor)  # noqa: B010 - as torch.amp.GradScaler hands them over
        setattr(adam, "found_inf", (~wanted).float())  # noqa: B010
        adam.step()
