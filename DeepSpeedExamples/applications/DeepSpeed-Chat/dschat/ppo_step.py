"""One process of a run: generation by transformers or the Hybrid Engine, else as in `puzzle`."""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dschat.options import ZeroOptions
from puzzle.config.resolve import RunPlan, resolve
from puzzle.config.run import TrainConfig
from puzzle.data.prepare import RunData, prepare
from puzzle.data.prompts import Prompt
from puzzle.engine.runtime.stage_timer import StageClock
from puzzle.engine.runtime.world import World
from puzzle.model.packing import pack
from puzzle.rlhf.experience import Experience
from puzzle.rlhf.provenance import run_header
from puzzle.rlhf.recorder import Recorder, describe_rank, experience_metrics
from puzzle.rlhf.rewards.weighted import function_rewards
from puzzle.rlhf.rollout import texts
from puzzle.rlhf.trainer import Trainer
from puzzle.runlog.records import (
    NO_HYBRID_ENGINE,
    STAGES,
    UNFAITHFUL,
    Iteration,
    Note,
    RunHeader,
    Switch,
    Warned,
)

SURPRISE = 0.5
"""Nats per token that rounding does not explain."""
CHANCE = 4.0
"""Standard deviations of a mean that chance does not explain."""


def train(config: TrainConfig, zero: ZeroOptions, out: Path) -> None:
    """One process of a run; all of them call this. Raises UserError for what the user can mend."""
    with World.start(config.device) as world, group_of_one(world):
        plan = resolve(config, max(world.gather(world.per_node)))
        run(plan, zero, out, prepare(config, plan.actor.spec.vocab_size), world)


def process(resolved: dict[str, Any], zero: dict[str, Any], out: str) -> None:
    """One process of a run, from JSON values, which any launcher can bring to any host."""
    train(TrainConfig.model_validate(resolved), ZeroOptions(**zero), Path(out))


@contextmanager
def group_of_one(world: World) -> Generator[None]:
    """DeepSpeed wants a process group for one process, too, which `World` does without."""
    if world.size > 1:
        yield
        return
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def run(plan: RunPlan, zero: ZeroOptions, out: Path, data: RunData, world: World) -> ChatTrainer:
    """All iterations on a world that has been joined; what they leave behind."""
    config = plan.config
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    # DeepSpeed builds operators with ninja, which may be in an environment that is not activated.
    os.environ["PATH"] = os.pathsep.join(
        (str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))
    )
    os.environ.setdefault("LOCAL_RANK", str(world.rank % world.per_node))
    # DeepSpeed calls collectives by names that torch 2.13 gave successors.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    from deepspeed.utils import logger

    from dschat.engines import build, hybrid_obstacle

    logger.setLevel(logging.WARNING)
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    obstacle = hybrid_obstacle(zero, world.device) if zero.enable_hybrid_engine else None
    hybrid = zero.enable_hybrid_engine and obstacle is None
    torch.manual_seed(config.seed + world.rank)
    trainer = ChatTrainer(plan, data, build(plan, zero, world, hybrid), world, function_rewards(config))
    trainer.synced = zero.actor_zero_stage == 3
    with Recorder(out, config, world, header(plan, zero, world, hybrid, obstacle)) as recorder:
        if not hybrid:
            recorder.write(Note("engine", NO_HYBRID_ENGINE))
        if obstacle is not None:
            recorder.write(Warned(f"the Hybrid Engine was asked for but cannot engage: {obstacle}"))
        recorder.ranks(describe_rank(trainer.models, world))
        for iteration in range(config.iterations):
            trainer.iteration(iteration, recorder)
    return trainer


def header(plan: RunPlan, zero: ZeroOptions, world: World, hybrid: bool, obstacle: str | None) -> RunHeader:
    """The header of the log; `config.deepspeed` has ZeRO's settings and the fate of the Hybrid Engine."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    made = run_header(plan, {"device": device, "processes": world.size})
    engaged = {"hybrid_engine_engaged": hybrid, "hybrid_engine_obstacle": obstacle}
    return replace(
        made,
        config={**made.config, "deepspeed": {**asdict(zero), **engaged}},
        software={**made.software, "deepspeed": version("deepspeed")},
    )


class ZeroPipeline:
    """What an iteration asks of the engine's `Pipeline`; models run one after the other."""

    def __init__(self, models: Sequence[Any]) -> None:
        """Whatever the models: each is run by itself."""

    def infer(self, inputs: Sequence[Any], order: object = None) -> list[Any]:
        """Forward passes of every model."""
        return [i.model.infer(i.batches, i.output_fn) for i in inputs]

    def train(self, inputs: Sequence[Any], order: object = None, defer: int = 1) -> list[Any]:
        """An optimizer step of every model."""
        return [i.model.train(i.batches, i.output_fn) for i in inputs]


class ChatTrainer(Trainer):
    """The iteration of DeepSpeed-Chat; `synced` keeps replicas in step where parameters are sharded."""

    make_pipeline: Any = ZeroPipeline
    synced = False
    _gathered = 0.0

    def iteration(self, iteration: int, recorder: Recorder) -> dict[str, float]:
        """One PPO iteration; its metrics, equal on every rank."""
        prompts = self.data.train.next()
        clock = StageClock(self.world)
        experience = self.rollout(prompts)
        clock.end("generation")
        if not iteration:
            self._compare(experience, recorder)
        experience, scores = self._inference(experience, prompts)
        clock.end("inference")
        step = self._train_step(experience)
        step.run(iteration)
        clock.end("training")
        metrics = experience_metrics(experience, scores.total_B, self.config.algorithm.kl.estimator)
        metrics |= {**scores.metrics(), **step.metrics(), "kl_coef": self.kl_coef}
        self._adapt(metrics, len(experience))
        seconds, total = clock.seconds(STAGES)
        gather = self._gather_seconds()
        self._gathered = 0.0
        seconds["generation"] -= gather
        seconds["switch"] += gather
        recorder.write(Iteration(iteration, seconds, total, metrics, self.scorer.spent()))
        recorder.write(Switch(iteration, gather) if gather > 0 else None)
        recorder.samples(
            iteration, experience, prompts, texts(experience, prompts, self.data.tokenizer), scores
        )
        return metrics

    def _compare(self, experience: Experience, recorder: Recorder) -> None:
        """Warn if generation, which may run on kernels of its own, draws what the model would not."""
        nats, variance, tokens = self.world.sum(self._surprise(experience)).tolist()
        nats /= tokens
        if nats > max(SURPRISE, CHANCE * math.sqrt(variance) / tokens):
            unlikely = f"a token is {nats:.2f} nats less likely than their own would be"
            recorder.write(Warned(f"{UNFAITHFUL}: {unlikely}"))

    @torch.no_grad()
    def _surprise(self, experience: Experience) -> Tensor:
        """By how many nats the tokens of this replica's first response are less likely than the weights' own,
        in sum, the variance of that where the weights' own are drawn, and how many they are: float64 (3,).
        """
        actor, greedy = cast(Any, self.models.actor), self.params.greedy
        row = actor.rows(len(experience))[0]
        sequence, start = experience.sequence(row), len(experience.prompt(row))
        (logits_TV,) = actor.infer([pack([sequence], 1, self.world.device)], lambda _, out: out).results
        log_SV = torch.log_softmax(logits_TV[start - 1 : -1].double() / self.params.temperature, -1)
        drawn_S = torch.tensor(sequence[start:], device=log_SV.device)
        own_S, variance_S = log_SV.amax(-1), torch.zeros_like(log_SV[:, 0])
        if not greedy:
            own_S = (log_SV.exp() * log_SV).sum(-1)
            variance_S = (log_SV.exp() * log_SV.square()).sum(-1) - own_S.square()
        nats_S = own_S - log_SV.gather(1, drawn_S[:, None])[:, 0]
        return torch.stack([nats_S.sum(), variance_S.sum(), nats_S.new_tensor(len(drawn_S))])

    def _gather_seconds(self) -> float:
        """What the Hybrid Engine spent on gathering weights before it generated, once per call.

        Without it, ZeRO-3 gathers every layer for every token: that is part of generating.
        """
        spent = torch.tensor([self._gathered], dtype=torch.float64, device=self.world.device)
        return float(self.world.max(spent))

    def _engine(self) -> Any:
        actor: Any = self.models.actor
        return actor.engine

    @torch.no_grad()
    def rollout(self, prompts: Sequence[Prompt]) -> Experience:
        """Responses to every prompt, the same experience on every rank."""
        actor, samples = self.models.actor, self.config.generation.samples
        count = len(prompts) * samples
        rows = actor.rows(count)
        engine = self._engine()
        engine.eval()
        size = self.config.generation.decode_microbatch or len(rows)
        answers = [
            self._generate(
                engine.module, [prompts[row // samples].tokens for row in rows[start : start + size]]
            )
            for start in range(0, len(rows), size)
        ]
        engine.train()
        tokens = actor.collect(torch.cat(answers), rows, (count, self.params.max_new_tokens)).tolist()
        return Experience(
            tuple(prompt.tokens for prompt in prompts),
            tuple(prompt.index for prompt in prompts),
            tuple(self._ended(row) for row in tokens),
            samples,
        )

    def _ended(self, row: Sequence[int]) -> tuple[int, ...]:
        """A response up to its first token that ends it."""
        stops = set(self.params.stop_ids)
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        return tuple(row[:end])

    def _generate(self, module: Any, prompts: Sequence[Sequence[int]]) -> Tensor:
        """int64 (R, max_new_tokens) by the model's `generate`; what follows a stop token means nothing."""
        from transformers import GenerationConfig

        p, width = self.params, max(map(len, prompts))
        ids_RP = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask_RP = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        drawn = {} if p.greedy else {"temperature": p.temperature, "top_k": p.top_k, "top_p": p.top_p}
        # The model's own defaults would fill what is left out.
        module.generation_config = GenerationConfig(
            do_sample=not p.greedy,
            max_new_tokens=p.max_new_tokens,
            min_new_tokens=p.min_new_tokens if p.stop_ids else None,
            eos_token_id=list(p.stop_ids) or None,
            pad_token_id=0,
            **drawn,
        )
        # The Hybrid Engine's graphs look here for a fixed length, not in the generation's configuration.
        lengths = {"min_new_tokens": p.min_new_tokens, "max_new_tokens": p.max_new_tokens}
        found_RS = module.generate(
            input_ids=ids_RP.to(self.world.device),
            attention_mask=mask_RP.to(self.world.device),
            synced_gpus=self.synced,
            **(lengths if p.min_new_tokens == p.max_new_tokens else {}),
        )
        # The Hybrid Engine's own count of its last call; other engines have none.
        self._gathered += getattr(self._engine(), "_gather_latency", 0.0)
        answers_RS = found_RS[:, width:]
        missing = p.max_new_tokens - answers_RS.shape[1]
        return torch.nn.functional.pad(answers_RS, (0, missing))
