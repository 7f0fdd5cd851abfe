"""`puzzle bench iterations`: whole runs on this host's devices beside the same runs as one process on a CPU.

What single comparisons cannot show: rollouts, rewards, switches and training steps of a trainer, where host
and device meet. In float32, with keyed noise, both must draw the same tokens and learn the same.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from puzzle.bench.harness import SHARED, add_memory_check, launch_of
from puzzle.cli import Parser, whole
from puzzle.config.load import build, merge
from puzzle.config.run import TrainConfig
from puzzle.errors import UserError
from puzzle.files.limits import MOST_PROCESSES
from puzzle.launch import local
from puzzle.runlog import Run, load_runs

LIMIT = 1e-4
"""Largest difference of a metric, as a share of it where it is above 1. Attention and sums of other kernels
differ by rounding, which two optimizer steps make larger: by 1e-6 between an H200 and a CPU."""
COMPARED = ("reward", "response_length", "kl", "entropy", "actor_loss", "critic_loss", "actor_grad_norm")
OPTIMIZER = {"lr": 1e-3, "eps": 1e-4}
TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
}
TINY |= {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
TINY |= {"max_position_embeddings": 128}
DEFAULTS: dict[str, Any] = {
    "iterations": 2,
    "batch": 8,
    "dtype": "fp32",
    "actor": {"optimizer": OPTIMIZER},
    "data": {"random_tokens": 16},
    "generation": {"max_new_tokens": 12},
    "algorithm": {"minibatch": 8, "microbatch": 2, "old_logprobs": "recompute"},
    "checkpoint": {"save": False},
    "log": {"samples": 0, "plots": False},
}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {"critic": {"optimizer": OPTIMIZER}},
    "grpo": {"batch": 4, "generation": {"samples": 2}},
}
"""By the algorithm's name, what its configuration has beside the common one."""


def run(arguments: Sequence[str]) -> int:
    """Compare every algorithm in every pair of layouts; 1 if a metric differs by more than `LIMIT`."""
    parser = Parser(
        "puzzle bench iterations", description="Compare whole runs on devices with one CPU process."
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--world", type=whole(1, MOST_PROCESSES), default=1, help="processes, one per device")
    parser.add_argument("--share-device", action="store_true", help=SHARED)
    add_memory_check(parser)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        models = save_models(Path(folder))
        good = True
        for name, own in ALGORITHMS.items():
            roles = {
                role: {"model": path} for role, path in models.items() if role in ("actor", "reward", *own)
            }
            good &= _compare(name, merge(DEFAULTS, {"algorithm": {"name": name}}, own, roles), options)
    return 0 if good else 1


def _compare(name: str, common: dict[str, Any], options: argparse.Namespace) -> bool:
    good = True
    alone = launch_of(options) | {"share_device": False}
    truth = _run(merge(common, {"device": "cpu", "launch": alone}))
    for training, generation in pairs(options.world):
        layouts = {"layout": _sizes(training), "generation": {"layout": _sizes(generation)}}
        found = _run(merge(common, {"device": options.device, "launch": launch_of(options)}, layouts))
        place = f"{name} {','.join(map(str, training))} -> {','.join(map(str, generation))}"
        for iteration, metric, gap in gaps(truth, found):
            ok = gap <= LIMIT
            good &= ok
            line = f"{'ok  ' if ok else 'FAIL'} {place:<34} iteration {iteration} {metric:<18}"
            print(f"{line}{gap:10.2g} (at most {LIMIT:g})", flush=True)
    return good


def save_models(folder: Path) -> dict[str, str]:
    """A model folder per role: weights that a run draws itself depend on the type of its device."""
    found = {}
    kinds = {"actor": AutoModelForCausalLM, "critic": AutoModelForSequenceClassification}
    for seed, (role, kind) in enumerate((kinds | {"reward": AutoModelForSequenceClassification}).items()):
        labels = {} if role == "actor" else {"num_labels": 1, "pad_token_id": 0}
        torch.manual_seed(seed)
        kind.from_config(AutoConfig.for_model(**TINY, **labels), dtype=torch.float32).save_pretrained(
            folder / role
        )
        found[role] = str(folder / role)
    return found


def pairs(world: int) -> list[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """Layouts (tp, pp, dp) of training and generation on `world` processes: each kind of parallelism once."""
    stages = math.gcd(world, int(TINY["num_hidden_layers"]))
    wide = math.gcd(world, int(TINY["num_key_value_heads"]))
    staged, split = (1, stages, world // stages), (wide, 1, world // wide)
    return list(dict.fromkeys([((1, 1, world), split), (staged, (1, 1, world)), (split, staged)]))


def gaps(truth: Run, found: Run) -> Iterator[tuple[int, str, float]]:
    """(iteration, metric, difference as a share of what is larger: the truth or 1)."""
    for right, got in zip(truth.iterations, found.iterations, strict=True):
        for metric in COMPARED:
            if metric in right.metrics:
                value = right.metrics[metric]
                gap = abs(got.metrics.get(metric, math.nan) - value) / max(1.0, abs(value))
                yield right.iteration, metric, gap


def _sizes(layout: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("tp", "pp", "dp"), layout, strict=True))


def _run(values: dict[str, Any]) -> Run:
    config: TrainConfig = build(values, lambda key: "the bench")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        local.run("puzzle.rlhf.trainer:train", (config, out), config.world, out / "ranks")
        (run,) = load_runs(out).runs
    if len(run.iterations) != config.iterations:
        raise UserError(f"bench iterations: {len(run.iterations)} of {config.iterations} iterations logged")
    return run
