"""Supervised runs through the real trainer on real ranks, watched from inside: run by `test_supervised`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from puzzle.config.resolve import resolve
from puzzle.config.supervised import SupervisedConfig, config_of
from puzzle.data.endings import Endings
from puzzle.data.examples import Example, ExampleSet
from puzzle.data.prepare import ExampleData
from puzzle.data.tokenizers import byte_tokenizer
from puzzle.engine.checkpoint.checkpoint import Checkpoints
from puzzle.engine.runtime.world import World
from puzzle.model import hf
from puzzle.model.weights import boxes
from puzzle.rlhf.models import build_runtimes
from puzzle.rlhf.supervised.trainer import SupervisedTrainer
from tests.rlhf.ppo_ranks import Boxes, Recorder, Watch, watch_gradients


@dataclass(frozen=True)
class Case:
    """A configuration as plain values, examples to learn from in their order, held-out ones. With `folder`,
    a checkpoint is written there after `save_at` iterations, and what it holds is gone on from. `begin`: the
    model of that folder begins the first step, whatever the run began with."""

    config: dict[str, Any]
    examples: tuple[Example, ...]
    held_out: tuple[Example, ...] = ()
    folder: str = ""
    save_at: int = 0
    begin: str = ""


@dataclass
class Seen:
    """What one rank saw: metrics of iterations, gradients and weights of its own rows."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    evaluated: dict[str, float] | None = None
    grads: list[Boxes] = field(default_factory=list)
    weights: Boxes = field(default_factory=list)


def run(rank: int, world_size: int, cases: Sequence[Case]) -> list[Seen]:
    """Every case in the same processes, with models of its own."""
    world = World(rank, world_size, torch.device("cpu"))
    return [run_case(world, case) for case in cases]


def run_case(world: World, case: Case) -> Seen:
    config = config_of(case.config)
    assert isinstance(config, SupervisedConfig)
    plan = resolve(config)
    models = build_runtimes(plan, world)
    stream = ExampleSet(case.examples).stream(config.batch, config.seed, config.data.shuffle)
    held_out = ExampleSet(case.held_out) if case.held_out else None
    data = ExampleData(byte_tokenizer(), Endings(), stream, held_out)
    trainer = SupervisedTrainer(plan, data, models, world)
    name, watch, seen = models.main.name, Watch(), Seen()
    watch.grads = {name: []}
    watch_gradients(models.main, watch)
    recorder: Any = Recorder(watch)
    checkpoints = Checkpoints(Path(case.folder), (models.main,)) if case.folder else None
    if checkpoints is not None:
        trainer.resume(checkpoints)
    if case.begin:
        hf.load(models.main.decoder, Path(case.begin))
    seen.evaluated = trainer.held_out(0, recorder)
    for iteration in range(trainer.done, config.iterations):
        seen.metrics.append(trainer.iteration(iteration, recorder))
        trainer.done = iteration + 1
        if checkpoints is not None and trainer.done == case.save_at:
            checkpoints.save(trainer.done, trainer.state())
    if checkpoints is not None:
        checkpoints.wait()
    decoder = models.main.decoder
    pieces = boxes(decoder, decoder.get_parameter)
    seen.weights = [(n, box.intervals, values.detach().clone()) for n, box, values in pieces]
    seen.grads = watch.grads[name]
    return seen
