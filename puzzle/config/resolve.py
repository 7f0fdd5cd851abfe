"""From a configuration to the plan of a run: one frozen value that everything later reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from puzzle.config.capabilities import BASELINE
from puzzle.config.run import ROLES, Role, TrainConfig
from puzzle.config.sources import layout_of, spec_of
from puzzle.errors import UserError
from puzzle.plan.cluster import Cluster
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.reshard.plan import check_shares
from puzzle.plan.run import BatchPlan, ModelPlan, SharedPipeline, SwitchRequest

ITEMSIZE = {"fp32": 4, "bf16": 2}
PASS_TOKENS = 16384
"""Most tokens of a pass where the configuration sets no limit; chosen, not measured."""
PASSES_PER_STAGE = 4
"""Passes of full-length sequences per pipeline stage where nothing is said: bubbles take 1/5 at most."""


@dataclass(frozen=True)
class RunPlan:
    """A run, resolved: made once, by `resolve`, before any process starts.

    `config` holds the options as they resolve, `given` what of them was given, as JSON values (None: not
    known), from which a resume starts. `models` are those in use, by role, in the order actor,
    critic, reference, reward; `generation` is how the actor generates (its own placement where nothing is
    switched); `switch` is what the switch is planned from, None without one.
    """

    config: TrainConfig
    cluster: Cluster
    models: Mapping[Role, ModelPlan]
    generation: Placement
    switch: SwitchRequest | None
    training: SharedPipeline
    inference: SharedPipeline
    batch: BatchPlan
    given: Mapping[str, Any] | None = None

    @property
    def actor(self) -> ModelPlan:
        """The model that is aligned."""
        return self.models["actor"]

    @property
    def trained(self) -> list[ModelPlan]:
        """Models with an optimizer."""
        return [model for model in self.models.values() if model.trained]

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.actor.layout.world

    @property
    def itemsize(self) -> int:
        """Bytes of a weight in computations."""
        return ITEMSIZE[self.config.dtype]

    def describe(self) -> dict[str, Any]:
        """The plan as JSON values: what `--dry-run` prints and the log's header carries."""
        return {
            "world": self.world,
            "devices_per_node": self.cluster.devices_per_node,
            "dtype": self.config.dtype,
            "models": {role: model.describe() for role, model in self.models.items()},
            "switch": None if self.switch is None else self.switch.describe(),
            "pipelines": {"training": self.training.describe(), "inference": self.inference.describe()},
            "batch": self.batch.describe(),
        }

    def table(self) -> str:
        """The plan as lines for people."""
        per_node = min(self.cluster.devices_per_node, self.world)
        lines = [f"run plan {self.hash}: {self.world} processes, {per_node} per node, {self.config.dtype}"]
        for role, model in self.models.items():
            size = f"{model.spec.parameters / 1e9:.3f} B parameters, tp,pp,dp {model.layout}"
            lines.append(f"  {role:<11}{size}{', trained' if model.trained else ''}")
        how = "as it trains" if self.switch is None else f"by a {self.switch.strategy} switch"
        lines.append(f"  {'generation':<11}tp,pp,dp {self.generation.layout}, {how}")
        for stage, pipeline in (("training", self.training), ("inference", self.inference)):
            lines.append(f"  {stage:<11}{pipeline}")
        batch = self.batch
        cut = f"{batch.sequences} sequences of at most {batch.prompt} + {batch.response} tokens an iteration"
        lines.append(f"  {'batch':<11}{cut}, {batch.steps} optimizer steps on {batch.minibatch} each")
        limit = self.config.algorithm.microbatch_tokens
        pieces = f"at most {limit} tokens" if limit else f"{self.config.algorithm.microbatch} sequences"
        if self.config.algorithm.microbatch or limit:
            lines.append(f"  {'passes':<11}{pieces}, rows {self._given_out()}")
        return "\n".join(lines)

    def _given_out(self) -> str:
        return "by length" if self.config.algorithm.balance else "in their order"

    @cached_property
    def hash(self) -> str:
        """Equal on ranks that made the same plan from the same options."""
        values = {"plan": self.describe(), "config": self.config.resolved()}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def resolve(
    config: TrainConfig, devices_per_node: int | None = None, given: Mapping[str, Any] | None = None
) -> RunPlan:
    """The plan of the run that `config` describes, of which `given` was given.

    `devices_per_node` is what the launcher knows of its hosts; `switch.gpus_per_node` wins, and without
    either a host has up to eight. UserError for shapes, layouts or lengths that do not go together.
    """
    models = _models(config)
    _check_heads(models)
    _check_tokens(config, models)
    cluster = Cluster(config.switch.gpus_per_node or devices_per_node or min(8, config.world))
    generation = _generation(config, models["actor"])
    config = _limited(config, models)
    plan = RunPlan(
        config,
        cluster,
        models,
        generation,
        _switch(config, models["actor"], generation, cluster),
        SharedPipeline(tuple(m for m in models.values() if m.trained), config.intra.fuse_training),
        SharedPipeline(_inferred(config, models), config.intra.fuse_inference),
        _batch(config),
        given,
    )
    for key, pipeline in (("fuse_training", plan.training), ("fuse_inference", plan.inference)):
        if pipeline.fuse is True and pipeline.obstacle:
            raise UserError(
                f"intra.{key}: {pipeline.obstacle}; give all these models one pp, or set it to auto or false"
            )
    return plan


def _models(config: TrainConfig) -> dict[Role, ModelPlan]:
    made: dict[Role, ModelPlan] = {}
    for role in ROLES:
        if role in config.layouts():
            section = getattr(config, role)
            spec = spec_of(role, section)
            placement = Placement.default(layout_of(role, section.layout, spec))
            made[role] = ModelPlan(role, spec, placement, role in config.trained)
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
    return SwitchRequest(
        actor.spec,
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


def _limited(config: TrainConfig, models: Mapping[Role, ModelPlan]) -> TrainConfig:
    """With a limit for passes where none was given: tokens or, of padded passes, sequences.

    It is the same on every device, so that a plan does not depend on where it is made. The baseline's
    replicas need equally many passes, which a limit of tokens does not give.
    """
    options, batch = config.algorithm, _batch(config)
    given = options.microbatch is not None or options.microbatch_tokens is not None
    if given or config.log.variant == BASELINE:
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
