"""The models of a run, made from its configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from puzzle.config import memory_report as footprint
from puzzle.config.base import RunConfig
from puzzle.config.resolve import Plan, RunPlan
from puzzle.config.sections import ModelConfig, OptimizerConfig
from puzzle.engine.pipeline.model import ModelRuntime, borrower
from puzzle.engine.runtime.world import World
from puzzle.engine.train.offload import HostMemory, Offload, offload_states, offload_weights
from puzzle.engine.train.zero_adamw import AdamWSettings
from puzzle.model import hf
from puzzle.model.weights import initialise
from puzzle.plan.run import ModelPlan
from puzzle.rlhf.policy_generator import PolicyGenerator, build_policy_generator
from puzzle.runlog import records

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROLE_SEEDS: dict[str, int] = {"actor": 1, "critic": 2, "reference": 1, "reward": 3}
"""Added to the run's seed for random weights: the reference starts as the actor does."""


class OffloadPolicy:
    """What a run offloads: optimizer `states`, needed in training, and `weights`, needed in inference."""

    def __init__(self, world: World, states: Sequence[Offload] = (), weights: Sequence[Offload] = ()) -> None:
        self.world, self.states, self.weights = world, states, weights

    def for_generation(self) -> None:
        """Offload everything: the KV cache takes the memory."""
        for part in (*self.weights, *self.states):
            part.leave()

    def for_inference(self) -> None:
        """Prefetch frozen weights, layer by layer."""
        for part in self.weights:
            part.fetch()

    def for_training(self) -> None:
        """Offload frozen weights; prefetch optimizer states, first used by the first optimizer step."""
        for part in self.weights:
            part.leave()
        for part in self.states:
            part.fetch()

    def record(self, iteration: int) -> records.Offload | None:
        """What an iteration offloaded, None where nothing is; call on every rank."""
        if not (self.states or self.weights):
            return None
        times = [part.take_times() for part in (*self.states, *self.weights)]
        waited, copied, moved = (float(sum(column)) for column in zip(*times, strict=True))
        device = self.world.device
        slowest = self.world.max(torch.tensor([waited, copied], dtype=torch.float64, device=device)).tolist()
        total = self.world.sum(torch.tensor(moved, dtype=torch.float64, device=device))
        return records.Offload(iteration, slowest[0], slowest[1], int(total))


@dataclass(frozen=True)
class RunModels:
    """The models in use, by role; `trained` are those with an optimizer, first the one that the run is
    about."""

    by_role: Mapping[str, ModelRuntime]
    trained: Mapping[str, ModelRuntime]
    offload: OffloadPolicy

    @property
    def main(self) -> ModelRuntime:
        """The model that the run is about."""
        return next(iter(self.trained.values()))

    def all(self) -> list[ModelRuntime]:
        """Those in use."""
        return list(self.by_role.values())

    def runtimes(self) -> list[ModelRuntime]:
        """Those in use, in every layout that they have."""
        return self.all()


@dataclass(frozen=True)
class Models(RunModels):
    """Those of a run whose policy, the first of them, generates."""

    generator: PolicyGenerator

    @property
    def actor(self) -> ModelRuntime:
        """The policy."""
        return self.by_role["actor"]

    def runtimes(self) -> list[ModelRuntime]:
        """Also the policy as it generates."""
        return [*self.all(), self.generator.runtime]


def learning_rate(optimizer: OptimizerConfig, total: int) -> Callable[[int], float]:
    """The learning rate of step 0, 1, ...: linear warm-up, then constant, or falling to 0 at step `total`."""

    def at(step: int) -> float:
        if step < optimizer.warmup:
            return optimizer.lr * (step + 1) / optimizer.warmup
        done = (step - optimizer.warmup) / max(1, total - optimizer.warmup)
        if optimizer.schedule == "linear":
            return optimizer.lr * max(0.0, 1.0 - done)
        if optimizer.schedule == "cosine":
            return optimizer.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        return optimizer.lr

    return at


def build_models(plan: RunPlan, world: World) -> Models:
    """`build_runtimes`, and the policy as it generates."""
    host = _host_memory(plan, world)
    made = build_runtimes(plan, world, host)
    generator = build_policy_generator(plan, world, made.by_role["actor"], host)
    return Models(made.by_role, made.trained, made.offload, generator)


def build_runtimes(plan: Plan, world: World, host: HostMemory | None = None) -> RunModels:
    """Every model in use, with weights and, where it is trained, an optimizer. UserError naming the model.

    A trained model may lack a value head, which then starts at random. What is offloaded goes to `host`.
    """
    config, host = plan.config, host or _host_memory(plan, world)
    made: dict[str, ModelRuntime] = {}
    for role, model in plan.models.items():
        if model.shares is not None:
            made[role] = borrower(role, model.spec, made[model.shares])
            continue
        section, recompute = getattr(config, role), config.recompute and model.trained
        options = {"recompute": recompute, "compiled": config.compile, "parts": config.parts}
        runtime = load_model(model, section, world, config.dtype, config.seed, **options)
        made[role] = runtime
    for role, model in plan.models.items():
        if model.trained:
            made[role].split_backward = config.split_backward
            made[role].attach_optimizer(_adamw(getattr(config, role).optimizer, plan.batch.all_steps))
        else:
            made[role].freeze()
    trained: dict[str, ModelRuntime] = {role: made[role] for role in config.trained}
    return RunModels(made, trained, _offload_policy(config, world, made, host))


def load_model(
    model: ModelPlan,
    source: ModelConfig,
    world: World,
    dtype: str,
    seed: int,
    *,
    recompute: bool = False,
    compiled: bool = False,
    parts: int | None = None,
) -> ModelRuntime:
    """One model, its weights from `source` or drawn from `seed` and its role; `parts` as in `Decoder`."""
    role, folder = model.role, Path(source.model or "")
    new_head = model.trained and model.spec.head == "value"
    if source.model is not None:  # before memory is taken for what config.json alone says
        hf.check_weights(folder, model.spec, new_head=new_head)
    runtime = ModelRuntime(role, model.spec, model.placement, world, DTYPES[dtype], recompute, parts=parts)
    if compiled:
        runtime.decoder.compile_layers()
    seed += ROLE_SEEDS[role]
    if source.model is None:
        initialise(runtime.decoder, seed, world.progress.tick)
    else:
        head_seed = seed if new_head else None
        loaded = hf.load(runtime.decoder, folder, head_seed, world.progress.tick, adapter_seed=seed)
        if world.rank == 0:
            loaded.warn(folder)
    return runtime


def _adamw(options: OptimizerConfig, steps: int) -> AdamWSettings:
    return AdamWSettings(
        learning_rate(options, steps),
        options.betas,
        options.eps,
        options.weight_decay,
        options.grad_clip,
        options.backend,
    )


def _host_memory(plan: Plan, world: World) -> HostMemory:
    """What all that this rank offloads, or keeps there, will need, known before any of it is there: moments
    come last."""
    ahead = 0
    merges = isinstance(plan, RunPlan) and plan.merges
    if merges or any(plan.config.offloads(role) for role in plan.models):
        ahead = footprint.estimate(plan, fused=world.device.type == "cuda")[world.rank].host
    return HostMemory(world.device, ahead, world.progress.tick)


def _offload_policy(
    config: RunConfig, world: World, made: Mapping[str, ModelRuntime], host: HostMemory
) -> OffloadPolicy:
    states, weights = [], []
    for role in filter(config.offloads, made):
        if (optimizer := made[role].optimizer) is not None:
            states.append(offload_states(host, optimizer))
        else:
            weights.append(offload_weights(host, made[role].stage))
    return OffloadPolicy(world, states, weights)
