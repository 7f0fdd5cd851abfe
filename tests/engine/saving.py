"""What ranks do in `test_checkpoint`: train, save, load, and tell what they hold."""

from __future__ import annotations

import os
import resource
import signal
import threading
from pathlib import Path

import torch
from torch import Tensor

from puzzle.engine.checkpoint.checkpoint import Checkpoints
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.pipeline.pipeline import Pipeline, PipelineInput
from puzzle.engine.runtime.world import World
from puzzle.engine.train.zero_adamw import AdamWSettings
from puzzle.errors import UserError
from puzzle.model import hf
from puzzle.model.packing import pack
from puzzle.model.weights import initialise
from puzzle.plan.layout import Layout, Placement

Box = tuple[tuple[int, int], ...]
Held = list[tuple[str, str, str, Box, Tensor]]  # model, tensor, kind, intervals, values
TEXTS = [[5, 9, 200, 3], [7, 7, 31, 99, 120, 3, 18], [250, 1, 2], [11, 12, 13, 14, 15]]


def build(rank: int, folder: str, layout: Layout, dtype: str, seed: int) -> list[ModelRuntime]:
    """An actor and a critic of random weights with optimizers."""
    world = World(rank, layout.world, torch.device("cpu"))
    models = []
    for name, spec in (
        ("actor", hf.read_spec(Path(folder) / "lm")),
        ("critic", hf.read_spec(Path(folder) / "value")),
    ):
        model = ModelRuntime(name, spec, Placement.default(layout), world, getattr(torch, dtype))
        initialise(model.decoder, seed)
        model.attach_optimizer(AdamWSettings(lambda step: 1e-3, eps=1e-4, weight_decay=0.1), bucket=20_000)
        models.append(model)
    return models


def train(model: ModelRuntime, steps: int) -> list[float]:
    """Steps on TEXTS; the losses."""
    rows = list(model.rows(len(TEXTS)))
    batches = [pack([TEXTS[r]], model.placement.layout.tp) for r in rows]

    def loss_fn(index: int, hidden: Tensor) -> Tensor:
        text = TEXTS[rows[index]]
        if model.spec.head == "value":
            return (model.decoder.values(hidden)[: len(text)] - 1.0).square().sum() / 19
        where, targets = torch.arange(len(text) - 1), torch.tensor(text[1:])
        return -model.decoder.token_stats(hidden, where, targets).logprobs.sum() / 15

    losses = []
    for _ in range(steps):
        (output,) = Pipeline([model]).train([PipelineInput(model, batches, loss_fn)])
        own = torch.stack(output.results).sum() if model.owns_results else torch.zeros(())
        losses.append(float(model.world.sum(own.clone())))
    return losses


def held(models: list[ModelRuntime]) -> Held:
    """Every box of weights, masters and moments on this rank, in the orientation of the logical tensor."""
    found: Held = []
    for model in models:
        optimizer = model.optimizer
        assert optimizer is not None
        for storage in model.decoder.storages:
            weight = model.decoder.get_parameter(storage.name).detach()
            for piece in storage.pieces:
                rows = weight[piece.start : piece.stop]
                found.append(
                    (
                        model.name,
                        piece.tensor,
                        "compute",
                        piece.box.intervals,
                        turned(rows, storage.transposed),
                    )
                )
        for i, slot in enumerate(optimizer.slots):
            values = {"weight": optimizer.masters[i]}
            if optimizer.masters[i].numel():
                state = optimizer.adam.state[optimizer.masters[i]]
                assert float(state["step"]) == optimizer.steps
                values |= {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            for piece in slot.local.clip(slot.low, slot.high):
                for kind, whole in values.items():
                    rows = whole[piece.start - slot.low : piece.stop - slot.low]
                    found.append(
                        (
                            model.name,
                            piece.tensor,
                            kind,
                            piece.box.intervals,
                            turned(rows, slot.local.transposed),
                        )
                    )
    return found


def turned(rows: Tensor, transposed: bool) -> Tensor:
    return (rows.t() if transposed else rows).detach().clone()


def save(
    rank: int, folder: str, layout: Layout, dtype: str, steps: int, numbers: list[int]
) -> tuple[Held, list[float]]:
    """Train and save; weights change at once after every save began. What was held at the last save."""
    models = build(rank, folder, layout, dtype, seed=1)
    checkpoints = Checkpoints(Path(folder) / "saved", models, keep=2)
    now: Held = []
    for number in numbers:
        for model in models:
            train(model, steps)
        now = held(models)
        checkpoints.save(number, {"number": number, "score": 0.1})
        if number != numbers[-1]:
            continue
        losses = [loss for model in models for loss in train(model, 2)]
    checkpoints.wait()
    saved = checkpoints.finished()
    assert [s.number for s in saved] == (numbers if rank == 0 else [])
    return now, losses


def load(
    rank: int, folder: str, layout: Layout, dtype: str
) -> tuple[Held, list[float], dict, tuple[str, ...]]:
    """What a new process holds after loading, the losses of two more steps, the state, the notes."""
    models = build(rank, folder, layout, dtype, seed=2)
    restored = Checkpoints(Path(folder) / "saved", models).restore()
    assert restored is not None
    now = held(models)
    return now, [loss for model in models for loss in train(model, 2)], dict(restored.state), restored.notes


def refused(rank: int, folder: str, layout: Layout) -> str:
    """The line that loading gives instead."""
    try:
        Checkpoints(Path(folder) / "saved", build(rank, folder, layout, "float32", 2)).restore()
    except UserError as error:
        return str(error)
    return "loaded"


def without_room(rank: int, folder: str, layout: Layout, number: int, room: int) -> None:
    """Save where rank 1 may write no more than `room` bytes into a file."""
    models = build(rank, folder, layout, "float32", seed=1)
    checkpoints = Checkpoints(Path(folder) / "saved", models)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    checkpoints.save(number, {"number": number})
    checkpoints.wait()


def killed(rank: int, folder: str, layout: Layout, first: int, delay: float) -> None:
    """Save without end from `first` on; SIGKILL of each rank `delay` seconds after the first is complete."""
    models = build(rank, folder, layout, "float32", seed=first)
    checkpoints = Checkpoints(Path(folder) / "saved", models)
    for number in range(first, first + 10_000):
        for model in models:
            assert model.optimizer is not None
            for master in model.optimizer.masters:
                master.fill_(number)
        checkpoints.save(number, {"number": number})
        if number == first:
            checkpoints.wait()
            models[0].world.share(None)
            threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
