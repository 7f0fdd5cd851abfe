"""Options as users of DeepSpeed-Chat know them, as the project's configuration and ZeRO's settings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from puzzle.config.document import read_yaml
from puzzle.config.load import load_config, merge, parse_overrides
from puzzle.config.resolve import resolve
from puzzle.config.run import TrainConfig
from puzzle.engine.runtime.identity import Identity, launched
from puzzle.errors import UserError
from puzzle.rlhf.requirements import check_files, check_packages

STAGES = (0, 1, 2, 3)
# An option that only has another name here: its key in the configuration, and what it holds.
RENAMED: dict[str, tuple[str, Any]] = {
    "actor_model_name_or_path": ("actor.model", str),
    "critic_model_name_or_path": ("critic.model", str),
    "reference_model_name_or_path": ("reference.model", str),
    "reward_model_name_or_path": ("reward.model", str),
    "data_path": ("data.prompts", str),
    "per_device_training_batch_size": ("algorithm.microbatch", int),
    "max_prompt_seq_len": ("data.max_prompt_tokens", int),
    "max_answer_seq_len": ("generation.max_new_tokens", int),
    "actor_learning_rate": ("actor.optimizer.lr", float),
    "critic_learning_rate": ("critic.optimizer.lr", float),
    "actor_weight_decay": ("actor.optimizer.weight_decay", float),
    "critic_weight_decay": ("critic.optimizer.weight_decay", float),
    "num_warmup_steps": ("actor.optimizer.warmup", int),
    "ppo_epochs": ("algorithm.epochs", int),
    "dtype": ("dtype", str),
    "seed": ("seed", int),
    "iterations": ("iterations", int),
    "loss_average": ("algorithm.loss_average", str),
}


@dataclass(frozen=True)
class ZeroOptions:
    """How DeepSpeed holds and runs the models; fields are named as the options are."""

    actor_zero_stage: int = 0
    critic_zero_stage: int = 0
    offload: bool = False  # optimizer states, and under stage 3 parameters, of actor and critic
    offload_reference_model: bool = False
    actor_gradient_checkpointing: bool = False
    critic_gradient_checkpointing: bool = False
    enable_hybrid_engine: bool = False
    enable_cuda_graph: bool = False  # of the Hybrid Engine's decoding
    inference_tp_size: int = 1
    tp_gather_partition_size: int = 8
    unpin_actor_parameters: bool = False
    release_inference_cache: bool = False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def _parser() -> _Parser:
    parser = _Parser(
        description="PPO on DeepSpeed, as DeepSpeed-Chat runs it.",
        epilog="Every other key of the project's configuration is an option, too: --section.key VALUE.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, help="YAML or JSON file of the project's configuration")
    parser.add_argument("--output_dir", "--out", type=Path, required=True, help="folder of the log")
    parser.add_argument("--num_processes", type=int, help="replicas, when no launcher started this one")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; RANK counts")
    parser.add_argument("--per_device_generation_batch_size", type=int, help="rows of one call of generate")
    parser.add_argument("--generation_batches", type=int, default=1, help="such calls of an iteration")
    for name, (key, kind) in RENAMED.items():
        parser.add_argument(f"--{name}", type=kind, help=f"the same as --{key}")
    for field in fields(ZeroOptions):
        if isinstance(field.default, bool):
            parser.add_argument(f"--{field.name}", action="store_true")
        else:
            choices = STAGES if field.name.endswith("zero_stage") else None
            parser.add_argument(f"--{field.name}", type=int, default=field.default, choices=choices)
    return parser


def parse(arguments: Sequence[str]) -> tuple[TrainConfig, ZeroOptions, Path]:
    """Configuration, ZeRO's settings and the log's folder; UserError for what cannot be run."""
    given, others = _parser().parse_known_args(arguments)
    keys = {key: getattr(given, name) for name, (key, _) in RENAMED.items()}
    keys["critic.optimizer.warmup"] = given.num_warmup_steps
    world = given.num_processes or _processes(given.config, others)
    rows = given.per_device_generation_batch_size
    if rows is not None:
        keys |= {"generation.decode_microbatch": rows, "batch": rows * given.generation_batches * world}
    # DeepSpeed-Chat finds the old log-probs by a pass of the actor; a timed run writes no model.
    keys |= {"log.variant": "dschat", "algorithm.old_logprobs": "recompute", "checkpoint.save": "false"}
    keys |= {"intra.fuse_training": "false", "intra.fuse_inference": "false", "algorithm.balance": "false"}
    keys |= {f"layout.{axis}": size for axis, size in (("tp", 1), ("pp", 1), ("dp", world))}
    words = [word for key, value in keys.items() if value is not None for word in (f"--{key}", str(value))]
    config = load_config(given.config, [*others, *words])
    zero = ZeroOptions(**{field.name: getattr(given, field.name) for field in fields(ZeroOptions)})
    check_packages(config)
    resolve(config)
    check_files(config)
    refuse(config, zero, given.output_dir)
    return config, zero, given.output_dir


def _processes(file: Path | None, others: Sequence[str]) -> int:
    """How many were launched or, of none, how many the configuration lays out."""
    started = (launched() or Identity()).world
    written = merge(read_yaml(file).data if file else {}, parse_overrides(others)).get("layout")
    if started > 1 or not isinstance(written, Mapping):
        return started
    sizes = [written.get(axis, 1) for axis in ("tp", "pp", "dp")]
    return prod(sizes) if all(isinstance(size, int) and size > 0 for size in sizes) else started


def refuse(config: TrainConfig, zero: ZeroOptions, out: Path) -> None:
    """Raise UserError for what replicas in lockstep cannot run."""
    if zero.enable_cuda_graph:
        fixed = config.generation.min_new_tokens == config.generation.max_new_tokens
        if not (zero.enable_hybrid_engine and zero.actor_zero_stage < 3):
            raise UserError("enable_cuda_graph: needs enable_hybrid_engine and an actor_zero_stage below 3")
        if config.data.random_tokens is None or not fixed:
            raise UserError(
                "enable_cuda_graph: graphs know one length of prompts and of answers: needs"
                " data.random_tokens, and generation.min_new_tokens as max_new_tokens"
            )
    if any(layout.tp * layout.pp > 1 for layout in config.layouts().values()):
        raise UserError("layout: ZeRO's processes are replicas; set tp and pp of every model to 1")
    if config.algorithm.microbatch_tokens is not None:
        raise UserError(
            "algorithm.microbatch_tokens: replicas must run equally many passes; give algorithm.microbatch"
        )
    if config.algorithm.dynamic_sampling is not None or config.algorithm.name == "remax":
        raise UserError("algorithm: DeepSpeed-Chat draws once: leave dynamic_sampling and remax out")
    for name, rows in (("batch", config.batch * config.generation.samples), ("minibatch", config.minibatch)):
        if rows % config.world:
            raise UserError(
                f"{name}: {rows} rows do not divide by {config.world} processes; replicas must keep step"
            )
    if config.algorithm.correction.kind != "none":
        raise UserError("algorithm.correction: generate gives no log-probs to correct; leave it out")
    if config.eval.every or config.checkpoint.every:
        raise UserError("eval.every, checkpoint.every: the baseline is run for its log; set both to 0")
    if config.recompute:
        raise UserError("recompute: give --actor_gradient_checkpointing and --critic_gradient_checkpointing")
    if (out / "run.jsonl").exists():
        raise UserError(f"{out}: already holds a run; choose another folder")
