"""From a configuration to the plan of a run: one frozen value that everything later reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, overload

from puzzle.config.base import ROLES, Role, RunConfig
from puzzle.config.capabilities import BASELINE
from puzzle.config.run import TrainConfig
from puzzle.config.sources import layout_of, spec_of
from puzzle.config.supervised import SupervisedConfig
from puzzle.errors import UserError
from puzzle.plan.cluster import Cluster
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.reshard.plan import check_shares
from puzzle.plan.run import BatchPlan, ModelPlan, SharedPipeline, SwitchRequest
from puzzle.spec.model import ModelSpec

Config = TypeVar("Config", bound=RunConfig)

ITEMSIZE = {"fp32": 4, "bf16": 2}
PASS_TOKENS = 16384
"""Most tokens of a pass where the configuration sets no limit; chosen, not measured."""
PASSES_PER_STAGE = 4
"""Passes of full-length sequences per pipeline stage where nothing is said: bubbles take 1/5 at most."""


@dataclass(frozen=True)
class Plan:
    """A run, resolved: made once, by `resolve`, before any process starts.

    `config` holds the options as they resolve, `given` what of them was given, as JSON values (None: not
    known), from which a resume starts. `models` are those in use, by role, in the order actor,
    critic, reference, reward; `inference` are those that answer without learning, in training's pauses.
    """

    config: RunConfig
    cluster: Cluster
    models: Mapping[Role, ModelPlan]
    training: SharedPipeline
    inference: SharedPipeline
    batch: BatchPlan
    given: Mapping[str, Any] | None = None

    @property
    def main(self) -> ModelPlan:
        """The model that the run is about: of those that are trained the first."""
        return self.trained[0]

    @property
    def trained(self) -> list[ModelPlan]:
        """Models with an optimizer."""
        return [model for model in self.models.values() if model.trained]

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.main.layout.world

    @property
    def itemsize(self) -> int:
        """Bytes of a weight in computations."""
        return ITEMSIZE[self.config.dtype]

    def describe(self) -> dict[str, Any]:
        """The plan as JSON values, as the log's header carries it."""
        return {
            "world": self.world,
            "devices_per_node": self.cluster.devices_per_node,
            "dtype": self.config.dtype,
            "models": {role: model.describe() for role, model in self.models.items()},
            "pipelines": {"training": self.training.describe(), "inference": self.inference.describe()},
            "batch": self.batch.describe(),
        }

    def table(self) -> str:
        """The plan as lines for people."""
        per_node = min(self.cluster.devices_per_node, self.world)
        how = self.config.dtype
        if self.config.parts is not None:
            how += f", invariant numerics of {self.config.parts} parts"
        lines = [f"run plan {self.hash}: {self.world} processes, {per_node} per node, {how}"]
        for role, model in self.models.items():
            lines.append(f"  {role:<11}{model}")
        lines += self._stages()
        trained = " and ".join(model.role for model in self.trained)
        steps = f"{self.config.iterations} iterations, {self.batch.all_steps} optimizer steps of {trained}"
        lines.append(f"  {'steps':<11}{steps}")
        options = self.config.algorithm
        limit = options.microbatch_tokens
        pieces = f"at most {limit} tokens" if limit else f"{options.microbatch} sequences"
        if options.microbatch or limit:
            lines.append(
                f"  {'passes':<11}{pieces}, rows {'by length' if options.balance else 'in their order'}"
            )
        return "\n".join(lines)

    def _stages(self) -> list[str]:
        """Lines about what an iteration does."""
        batch = self.batch
        cut = (
            f"{batch.sequences} examples of at most {batch.response} tokens, one optimizer step an iteration"
        )
        return [f"  {'batch':<11}{cut}"]

    @cached_property
    def hash(self) -> str:
        """Equal on ranks that made the same plan from the same options."""
        values = {"plan": self.describe(), "config": self.config.resolved()}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class RunPlan(Plan):
    """A run that learns from what it generates. `generation` is how the actor generates (its own placement
    where nothing is switched); `switch` is what the switch is planned from, None without one."""

    config: TrainConfig
    generation: Placement
    switch: SwitchRequest | None

    @property
    def actor(self) -> ModelPlan:
        """The model that is aligned."""
        return self.models["actor"]

    @property
    def merges(self) -> bool:
        """Whether the actor generates with adapters added to its weights."""
        return self.config.actor.lora is not None and self.config.actor.lora.merge

    @property
    def generation_spec(self) -> ModelSpec:
        """The actor as it generates: without adapters where they are merged."""
        return self.actor.spec.base if self.merges else self.actor.spec

    def describe(self) -> dict[str, Any]:
        """Also how the actor is switched."""
        return {**super().describe(), "switch": None if self.switch is None else self.switch.describe()}

    def _stages(self) -> list[str]:
        how = "as it trains" if self.switch is None else f"by a {self.switch.strategy} switch"
        lines = [f"  {'generation':<11}tp,pp,dp {self.generation.layout}, {how}"]
        for stage, pipeline in (("training", self.training), ("inference", self.inference)):
            lines.append(f"  {stage:<11}{pipeline}")
        batch = self.batch
        cut = f"{batch.sequences} sequences of at most {batch.prompt} + {batch.response} tokens an iteration"
        lines.append(f"  {'batch':<11}{cut}, {batch.steps} optimizer steps on {batch.minibatch} each")
        return lines


@overload
def resolve(
    config: TrainConfig, devices_per_node: int | None = None, given: Mapping[str, Any] | None = None
) -> RunPlan: ...


@overload
def resolve(
    config: RunConfig, devices_per_node: int | None = None, given: Mapping[str, Any] | None = None
) -> Plan: ...


def resolve(
    config: RunConfig, devices_per_node: int | None = None, given: Mapping[str, Any] | None = None
) -> Plan:
    """The plan of the run that `config` describes, of which `given` was given.

    `devices_per_node` is what the launcher knows of its hosts; `switch.gpus_per_node` wins, and without
    either a host has up to eight. UserError for shapes, layouts or lengths that do not go together.
    """
    models = _models(config)
    _check_heads(models)
    if isinstance(config, SupervisedConfig):
        return _supervised(config, models, Cluster(devices_per_node or min(8, config.world)), given)
    assert isinstance(config, TrainConfig), "the other kind of run"
    _check_tokens(config, models)
    cluster = Cluster(config.switch.gpus_per_node or devices_per_node or min(8, config.world))
    generation = _generation(config, models["actor"])
    if config.log.variant != BASELINE:  # its replicas need equally many passes: no limit of tokens
        config = _limited(config, models, _batch(config))
    plan = RunPlan(
        config=config,
        cluster=cluster,
        models=models,
        training=SharedPipeline(tuple(m for m in models.values() if m.trained), config.intra.fuse_training),
        inference=SharedPipeline(_inferred(config, models), config.intra.fuse_inference),
        batch=_batch(config),
        given=given,
        generation=generation,
        switch=_switch(config, models["actor"], generation, cluster),
    )
    for key, pipeline in (("fuse_training", plan.training), ("fuse_inference", plan.inference)):
        if pipeline.fuse is True and pipeline.obstacle:
            raise UserError(
                f"intra.{key}: {pipeline.obstacle}; give all these models one pp, or set it to auto or false"
            )
    return plan


def _supervised(
    config: SupervisedConfig,
    models: Mapping[Role, ModelPlan],
    cluster: Cluster,
    given: Mapping[str, Any] | None,
) -> Plan:
    """The plan of a run that learns from examples, of which each is a row of the batch."""
    for role, model in models.items():
        if config.data.max_tokens > model.spec.max_positions:
            raise UserError(
                f"{role}: data.max_tokens {config.data.max_tokens} exceeds its {model.spec.max_positions}"
                " positions; lower data.max_tokens"
            )
    batch = BatchPlan(config.iterations, config.batch, 1, config.batch, 1, 0, config.longest)
    limited = _limited(config, models, batch)
    trained = tuple(models.values())
    return Plan(
        limited, cluster, models, SharedPipeline(trained, False), SharedPipeline((), False), batch, given
    )


def _models(config: RunConfig) -> dict[Role, ModelPlan]:
    made: dict[Role, ModelPlan] = {}
    for role in ROLES:
        if role in config.layouts():
            section = getattr(config, role)
            spec = spec_of(role, section)
            placement = Placement.default(layout_of(role, section.layout, spec))
            shares = config.shares(role)
            made[role] = ModelPlan(role, spec, placement, role in config.trained, shares)
    return made


def _generation(config: TrainConfig, actor: ModelPlan) -> Placement:
    layout = layout_of("generation", config.generation.layout, actor.spec)
    if config.switch.nest:
        layout = Layout.nested(layout.tp, layout.pp, layout.dp, actor.layout)
    return actor.placement if layout == actor.layout else Placement.default(layout)


def _switch(
    config: TrainConfig, actor: ModelPlan, generation: Placement, cluster: Cluster
) -> SwitchRequest | None:
    if generation == actor.placement:
        return None
    options = config.switch
    if options.source == "zero_shards":
        check_shares("switch.source: zero_shards", actor.layout.dp, generation.layout.world)
    lora = config.actor.lora
    return SwitchRequest(
        actor.spec.base if lora is not None and lora.merge else actor.spec,
        actor.placement,
        generation,
        cluster,
        options.strategy,
        ITEMSIZE[config.dtype],
        options.staging_bytes,
        options.source == "zero_shards",
    )


def _inferred(config: TrainConfig, models: Mapping[Role, ModelPlan]) -> tuple[ModelPlan, ...]:
    order: list[Role] = ["reference", "critic", "reward"]
    if config.algorithm.dynamic_sampling is not None:
        order.remove("reward")  # it scores between rounds of generation, by itself
    if config.algorithm.old_logprobs == "recompute":
        order.insert(0, "actor")
    return tuple(models[role] for role in order if role in models)


def _limited(config: Config, models: Mapping[Role, ModelPlan], batch: BatchPlan) -> Config:
    """With a limit for passes where none was given: tokens or, of padded passes, sequences.

    It is the same on every device, so that a plan does not depend on where it is made.
    """
    options = config.algorithm
    if options.microbatch is not None or options.microbatch_tokens is not None:
        return config
    longest = batch.prompt + batch.response
    limits = [PASS_TOKENS]
    for model in models.values():
        if model.trained and model.layout.pp > 1:
            rows = -(-batch.minibatch // model.layout.dp)
            limits.append(rows * longest // (PASSES_PER_STAGE * model.layout.pp))
    tokens = max(longest, min(limits))
    changed = {"microbatch_tokens": tokens} if options.packing else {"microbatch": tokens // longest}
    return config.model_copy(update={"algorithm": options.model_copy(update=changed)})


def _batch(config: TrainConfig) -> BatchPlan:
    prompt = config.data.random_tokens or config.data.max_prompt_tokens
    response, samples = config.generation.max_new_tokens, config.generation.samples
    return BatchPlan(
        config.iterations, config.batch, samples, config.minibatch, config.algorithm.epochs, prompt, response
    )


def _check_heads(models: Mapping[Role, ModelPlan]) -> None:
    for role, model in models.items():
        if model.spec.head == "value" and model.spec.num_labels != 1:
            raise UserError(
                f"{role}: its head has {model.spec.num_labels} labels, a score is 1; set num_labels to 1"
            )


def _check_tokens(config: TrainConfig, models: Mapping[Role, ModelPlan]) -> None:
    """Models that read the actor's token ids must know them, and positions for the longest sequence."""
    retokenised = {"reward"} if config.reward.model and config.data.prompts else set()
    batch, actor = _batch(config), models["actor"].spec
    for role in sorted(models.keys() - retokenised):
        spec = models[role].spec
        # Folders may be padded to other sizes (`rlhf.vocabulary`); the baseline draws without regard to that.
        padded = getattr(config, role).model is not None and config.log.variant != BASELINE
        if spec.vocab_size != actor.vocab_size and not padded:
            sizes = f"{spec.vocab_size} tokens, the actor's {actor.vocab_size}"
            raise UserError(f"{role}: its vocabulary has {sizes}; both must read the same tokens")
    key = "data.random_tokens" if config.data.random_tokens else "data.max_prompt_tokens"
    for role in sorted(models.keys() - retokenised):
        positions = models[role].spec.max_positions
        if batch.prompt + batch.response > positions:
            raise UserError(
                f"{role}: {batch.prompt} prompt and {batch.response} new tokens exceed its "
                f"{positions} positions; lower generation.max_new_tokens or {key}"
            )
