"""What ranks do in `test_resumed_layouts`: iterations from a checkpoint on, or from the start; a save."""

from __future__ import annotations

from pathlib import Path

import torch

from puzzle.config.resolve import resolve
from puzzle.config.run import TrainConfig
from puzzle.data.endings import Endings
from puzzle.data.prepare import RunData
from puzzle.data.prompts import Prompt, PromptSet, PromptStream
from puzzle.engine.checkpoint.checkpoint import Checkpoints
from puzzle.engine.runtime.world import World
from puzzle.model.weights import boxes
from puzzle.rlhf.models import build_models
from puzzle.rlhf.rewards.weighted import function_rewards
from puzzle.rlhf.trainer import Trainer
from tests.rlhf.ppo_ranks import Case, Recorder, Watch


def run(rank: int, world_size: int, case: Case, folder: str, save_at: int) -> Watch:
    """All iterations after the newest checkpoint in `folder`; one is written after `save_at` iterations."""
    world = World(rank, world_size, torch.device("cpu"))
    config = TrainConfig.model_validate(case.config)
    prompts = tuple(Prompt(i, str(i), "", None, tokens) for i, tokens in enumerate(case.prompts))
    stream = PromptStream(PromptSet(prompts), config.batch, config.seed, shuffle=True)
    plan = resolve(config)
    models = build_models(plan, world)
    data = RunData(None, Endings(case.stop_ids, case.stop_ids), stream, None)
    trainer = Trainer(plan, data, models, world, function_rewards(plan.config))
    checkpoints = Checkpoints(Path(folder), tuple(models.trained.values()))
    trainer.resume(checkpoints)
    watch = Watch()
    for iteration in range(trainer.done, config.iterations):
        trainer.iteration(iteration, Recorder(watch))  # ty: ignore[invalid-argument-type]
        trainer.done = iteration + 1
        if trainer.done == save_at:
            checkpoints.save(trainer.done, trainer.state())
    checkpoints.wait()
    for model in models.trained.values():
        pieces = boxes(model.decoder, model.decoder.get_parameter)
        watch.weights[model.name] = [(name, box.intervals, values.clone()) for name, box, values in pieces]
    return watch
