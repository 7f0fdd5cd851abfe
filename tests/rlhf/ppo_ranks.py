"""PPO through the real trainer on real ranks, watched from inside: run by `test_trainer_reference`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from puzzle.config.resolve import resolve
from puzzle.config.run import TrainConfig
from puzzle.data.endings import Endings
from puzzle.data.prepare import RunData
from puzzle.data.prompts import Prompt, PromptSet, PromptStream
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.reshard.resharder import Resharder
from puzzle.engine.runtime.world import World
from puzzle.engine.train import zero_adamw as optimizer_module
from puzzle.model.weights import boxes
from puzzle.plan.pipeline.actions import Op
from puzzle.rlhf import draw as draw_module
from puzzle.rlhf.algorithms import ppo
from puzzle.rlhf.experience import Experience
from puzzle.rlhf.models import Models, build_models
from puzzle.rlhf.rewards.weighted import function_rewards
from puzzle.rlhf.trainer import Trainer
from puzzle.runlog.record import Record
from puzzle.runlog.records import Iteration, Simulation, Stage, Switch

Boxes = list[tuple[str, tuple[tuple[int, int], ...], Tensor]]
"""(Hugging Face name, intervals, values) of pieces of logical tensors."""


@dataclass(frozen=True)
class Case:
    """A configuration as plain values, prompts, and what ends a response. `break_` leaves a sum out; `apart`
    is by how many nats (a deviation) generation's log-probs are made to differ from training's."""

    config: dict[str, Any]
    prompts: tuple[tuple[int, ...], ...]
    stop_ids: tuple[int, ...] = ()
    break_: str = ""
    apart: float = 0.0


@dataclass
class Watch:
    """What one rank saw. Experiences and metrics (equal on all ranks) from rank 0 alone."""

    experiences: list[Experience] = field(default_factory=list)
    rewards: list[Tensor] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    switches: list[dict[str, Any]] = field(default_factory=list)
    owed: list[bool] = field(default_factory=list)  # whether the actor's last step is not gathered yet
    checked: list[int] = field(default_factory=list)  # in which iterations switched weights were verified
    held: list[int] = field(default_factory=list)  # bytes of a generation layout outside of generation
    stages: list[Mapping[str, Any]] = field(default_factory=list)
    simulations: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    grads: dict[str, list[Boxes]] = field(default_factory=lambda: {"actor": [], "critic": []})
    weights: dict[str, Boxes] = field(default_factory=dict)
    parameter_bytes: dict[str, int] = field(default_factory=dict)


class Recorder:
    """Stands in for the log: keeps the experience of every iteration."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def samples(self, iteration: int, experience: Experience, *_: Any, **__: Any) -> None:
        self.watch.experiences.append(experience)

    def write(self, *records: Record | None) -> None:
        for record in records:
            match record:
                case Iteration():
                    self.watch.metrics.append(dict(record.metrics))
                case Switch():
                    self.watch.switches.append(record.to_json())
                case Simulation():
                    self.watch.simulations.append((record.stage, dict(record.seconds)))
                case Stage():
                    self.watch.stages.append(record.to_json())

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def run(rank: int, world_size: int, cases: Sequence[Case]) -> list[Watch]:
    """Every case in the same processes, with models of its own."""
    world = World(rank, world_size, torch.device("cpu"))
    return [run_case(world, case) for case in cases]


def run_case(world: World, case: Case) -> Watch:
    config = TrainConfig.model_validate(case.config)
    prompts = tuple(Prompt(i, str(i), "", None, tokens) for i, tokens in enumerate(case.prompts))
    stream = PromptStream(PromptSet(prompts), config.batch, config.seed, shuffle=True)
    plan = resolve(config)
    models = build_models(plan, world)
    watch = Watch()
    for model in models.trained.values():
        watch_gradients(model, watch)
    if models.generator.switcher is not None:
        _watch_switches(models.generator.switcher, models.generator.runtime, watch)
    original = _break(models, case.break_)
    plain_rewards = ppo.token_rewards

    def token_rewards(*args: Any) -> Tensor:
        watch.rewards.append(plain_rewards(*args))
        return watch.rewards[-1]

    ppo.token_rewards = token_rewards  # ty: ignore[invalid-assignment]
    plain_rollout = draw_module.rollout
    if case.apart:
        apart = partial(draw_apart, plain_rollout, case.apart)
        draw_module.rollout = apart  # ty: ignore[invalid-assignment]
    try:
        data = RunData(None, Endings(case.stop_ids, case.stop_ids), stream, None)
        trainer = Trainer(plan, data, models, world, function_rewards(plan.config))
        for iteration in range(config.iterations):
            watch.held.append(_bytes(models.generator.runtime))
            trainer.iteration(iteration, Recorder(watch))  # ty: ignore[invalid-argument-type]
            assert models.actor.optimizer is not None
            watch.owed.append(models.actor.optimizer.gather_pending)
            for model in models.trained.values():
                assert model.optimizer is not None
                assert all(b.grads is None and b.shard is None for b in model.optimizer.buckets), "released"
    finally:
        ppo.token_rewards, draw_module.rollout = plain_rewards, plain_rollout
        optimizer_module.reduce_scatter_flat = original
    for model in models.trained.values():
        decoder = model.decoder
        watch.weights[model.name] = [
            (name, box.intervals, values.clone())
            for name, box, values in boxes(decoder, decoder.get_parameter)
        ]
    watch.parameter_bytes = {m.name: sum(p.nbytes for p in m.decoder.parameters()) for m in models.all()}
    if world.rank:
        watch.experiences = watch.rewards = watch.metrics = []
    return watch


def draw_apart(rollout: Any, deviation: float, *args: Any) -> Experience:
    """A rollout whose generation rounds much worse than it does, alike on every rank."""
    experience = rollout(*args)
    sampled_BS = experience.sampled_logprobs_BS
    noise_BS = torch.randn(sampled_BS.shape, generator=torch.Generator().manual_seed(args[4]))
    return replace(experience, sampled_logprobs_BS=sampled_BS + deviation * noise_BS)


def _bytes(model: ModelRuntime) -> int:
    """What its weights take; those on the meta device take nothing."""
    return sum(p.nbytes for p in model.decoder.parameters() if not p.is_meta)


def _watch_switches(switcher: Resharder, runtime: ModelRuntime, watch: Watch) -> None:
    plain = switcher.verify

    def verify() -> None:
        assert _bytes(runtime) > 0
        watch.checked.append(len(watch.owed))
        plain()

    switcher.verify = verify


def watch_gradients(model: ModelRuntime, watch: Watch) -> None:
    """Copy the own rows' gradients of every step when their reduction is over, before clipping."""
    optimizer = model.optimizer
    assert optimizer is not None
    do = optimizer.do

    def watched(op: Op) -> None:
        do(op)
        if op is Op.WAIT_REDUCE:
            found = optimizer.gradients()
            step: Boxes = []
            for slot in optimizer.slots:
                grads = found[slot.local.name]
                for piece in slot.local.clip(slot.low, slot.high):
                    rows = piece.box.intervals[piece.dim]
                    first = piece.start - slot.low
                    values = grads[first : first + rows[1] - rows[0]]
                    values = values.t() if slot.local.transposed else values
                    step.append((piece.tensor, piece.box.intervals, values.clone()))
            watch.grads[model.name].append(step)

    optimizer.do = watched


def _break(models: Models, what: str) -> Any:
    """Leave a gradient sum out, as a bug would; gives what has to be put back."""
    original = optimizer_module.reduce_scatter_flat
    assert what in ("", "sharers", "replicas")
    if what == "sharers":
        assert models.actor.optimizer is not None
        models.actor.optimizer.shared = []
    elif what == "replicas":

        class Done:
            def wait(self) -> None:
                pass

        def own_part(out: Tensor, whole: Tensor, group: Any, async_op: bool) -> Done:
            out.copy_(whole.chunk(torch.distributed.get_world_size(group))[torch.distributed.get_rank(group)])
            return Done()

        optimizer_module.reduce_scatter_flat = own_part
    return original
