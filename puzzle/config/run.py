"""The typed description of one training run: what a YAML file and `--section.key value` may say.

Every section is frozen and refuses unknown keys. Sources and layouts left to defaults are filled in before
validation (`_inherit`). `puzzle.config.load` reads files and command lines into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from puzzle.config.algorithm import COMPARING, AlgorithmConfig
from puzzle.config.base import ROLES, SOURCES, Role, RunConfig
from puzzle.config.renamed import modernised
from puzzle.config.reward import RewardConfig
from puzzle.config.sections import (
    Count,
    DataConfig,
    EvalConfig,
    GenerationConfig,
    IntraConfig,
    LayoutConfig,
    ModelConfig,
    OffloadConfig,
    Sequences,
    SwitchConfig,
    TrainedConfig,
)
from puzzle.files.limits import MOST_SEQUENCES

TRAINED: dict[str, tuple[Role, ...]] = {
    "ppo": ("actor", "critic"),
    "grpo": ("actor",),
    "dr_grpo": ("actor",),
    "rloo": ("actor",),
    "reinforce_pp": ("actor",),
    "reinforce_pp_baseline": ("actor",),
    "remax": ("actor",),
}
"""Which roles an algorithm trains; a critic that is not among them is not there."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "grpo": {
        "kl": {"coef": 0.04, "estimator": "k3", "place": "loss"},
        "reward_clip": None,
        "loss_average": "sequence",
    },
    "dr_grpo": {
        "kl": {"coef": 0.04, "estimator": "k3", "place": "loss"},
        "reward_clip": None,
        "loss_average": "constant",
    },
    "rloo": {
        "kl": {"coef": 0.05, "estimator": "k1", "place": "reward"},
        "reward_clip": None,
        "loss_average": "constant",
    },
    "reinforce_pp": {"kl": {"coef": 0.01, "estimator": "k1", "place": "reward"}, "reward_clip": None},
    "reinforce_pp_baseline": {"kl": {"coef": 0.001, "estimator": "k2", "place": "loss"}, "reward_clip": None},
    "remax": {"kl": {"coef": 0.01, "estimator": "k1", "place": "reward"}, "reward_clip": None},
}
"""Where an algorithm's defaults are not those of the schema."""


def _plain(value: Any) -> Any:
    return value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value


def _switched_on(value: Any) -> bool:
    """Whether a value that is not validated yet, such as a word of a command line, is read as true."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return False


def _laid_over(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, with `defaults` where nothing was."""
    found = {name: _plain(value) for name, value in given.items()}
    for name, value in defaults.items():
        below = found.get(name, {})
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            found[name] = _laid_over(value, below)
        else:
            found.setdefault(name, value)
    return found


def _inherit(data: Any) -> Any:
    """Fill the sources and layouts left to defaults; anything malformed is left for validation to refuse."""
    if not isinstance(data, Mapping):
        return data
    filled = {name: _plain(value) for name, value in data.items()}
    algorithm = filled.get("algorithm", {})
    if isinstance(algorithm, Mapping):
        name = algorithm.get("name", "ppo")
        defaults = DEFAULTS.get(name, {}) if isinstance(name, str) else {}
        if _switched_on(algorithm.get("reference_free")):
            defaults = {key: value for key, value in defaults.items() if key != "kl"}
        if algorithm.get("loss_average") == "microbatch":
            defaults = {**defaults, "balance": False}
        filled["algorithm"] = _laid_over(defaults, algorithm)
        if isinstance(name, str) and "critic" not in TRAINED.get(name, ROLES):
            filled.setdefault("critic", None)
    for role in (*ROLES, "generation"):
        if role == "critic" and filled.get(role, {}) is None:
            continue
        section, actor = filled.get(role, {}), filled.get("actor", {})
        if not isinstance(section, Mapping) or not isinstance(actor, Mapping):
            return data
        section = {name: _plain(value) for name, value in section.items()}
        parent = (actor if role == "generation" else filled).get("layout")
        own = section.get("layout", {})
        if isinstance(parent, Mapping) and isinstance(own, Mapping):
            section["layout"] = {**parent, **own}
        if role in ("critic", "reference") and section.get("model") is None and section.get("init") is None:
            section |= {name: actor[name] for name in ("model", "init") if name in actor}
            if role == "reference" and section.get("layers") is None:
                section["layers"] = actor.get("layers")
        filled[role] = section
    return filled


class TrainConfig(RunConfig):
    """One run: rollouts by the actor, and what it learns from them."""

    iterations: Count = Field(100, description="rollouts, each followed by training")
    batch: Sequences = Field(32, description="prompts per iteration")
    actor: TrainedConfig = TrainedConfig()
    critic: TrainedConfig | None = TrainedConfig()
    reference: ModelConfig = ModelConfig()
    reward: RewardConfig = RewardConfig()
    data: DataConfig = DataConfig()
    generation: GenerationConfig = GenerationConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    switch: SwitchConfig = SwitchConfig()
    intra: IntraConfig = IntraConfig()
    offload: OffloadConfig = OffloadConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        return _inherit(modernised(data)[0] if isinstance(data, Mapping) else data)

    @model_validator(mode="after")
    def _sources(self) -> TrainConfig:
        for role in ROLES:
            section = getattr(self, role)
            if section is None:
                continue
            sources = [key for key in SOURCES if getattr(section, key, None) is not None]
            if len(sources) > 1:
                more = "; functions adds several up" if role == "reward" else ""
                raise ValueError(f"{role}: give {' or '.join(sources)}, not both{more}")
            if not sources and not (role == "reward" and self.reward.functions):
                extra = " or reward.function (url, functions)" if role == "reward" else ""
                raise ValueError(f"{role}: no model; give {role}.model, {role}.init{extra}")
        return self

    @model_validator(mode="after")
    def _algorithm(self) -> TrainConfig:
        name = self.algorithm.name
        if (self.critic is not None) != ("critic" in self.trained):
            said = "has no critic; leave the section out" if self.critic is not None else "needs a critic"
            raise ValueError(f"critic: algorithm {name} {said}")
        if name in COMPARING and self.generation.samples < 2:
            raise ValueError(
                f"generation.samples: {name} compares the samples of a prompt; give 2 or more of them"
            )
        overlong, longest = self.algorithm.overlong, self.generation.max_new_tokens
        if overlong is not None and overlong.buffer > longest:
            raise ValueError(
                f"algorithm.overlong.buffer {overlong.buffer} exceeds generation.max_new_tokens {longest}"
            )
        if self.algorithm.dynamic_sampling is not None and self.generation.greedy:
            raise ValueError(
                "algorithm.dynamic_sampling: generation.greedy makes all samples of a prompt alike; leave one"
                " of them out"
            )
        if len(self.trained) == 1 and self.intra.fuse_training is True:
            raise ValueError(f"intra.fuse_training: {name} trains one model; leave it out")
        return self

    @model_validator(mode="after")
    def _prompts(self) -> TrainConfig:
        data = self.data
        if (data.prompts is None) == (data.random_tokens is None):
            raise ValueError("data: give prompts (a file) or random_tokens, one of them")
        if data.random_tokens is not None and data.eval_prompts is not None:
            raise ValueError("data.random_tokens has no text to hold out; give prompts, or no eval_prompts")
        if data.system is not None and not data.chat_template:
            raise ValueError("data.system needs data.chat_template")
        if data.random_tokens is not None and self.reward.parts:
            raise ValueError("data.random_tokens has no text for reward functions; use reward.model or init")
        if data.random_tokens is not None and self.generation.stop:
            raise ValueError("data.random_tokens has no text in which generation.stop could be found")
        if data.prompts is not None and data.tokenizer is None and self.actor.model is None:
            raise ValueError("data.tokenizer: a randomly initialised actor has none; give a folder, or bytes")
        if self.eval.every and data.eval_prompts is None:
            raise ValueError("eval.every needs data.eval_prompts")
        if self.checkpoint.best and not (self.eval.every and self.checkpoint.save):
            raise ValueError("checkpoint.best needs checkpoint.save, eval.every and data.eval_prompts")
        return self

    @model_validator(mode="after")
    def _reference(self) -> TrainConfig:
        algorithm = self.algorithm
        needing = {
            "algorithm.kl_stop": algorithm.kl_stop is not None,
            "algorithm.kl.target": algorithm.kl.target is not None,
            "algorithm.kl.place loss": algorithm.kl.place == "loss",
        }
        wanting = [name for name, given in needing.items() if given]
        if algorithm.reference_free and wanting:
            raise ValueError(f"algorithm.reference_free: there is no KL for {wanting[0]}")
        if algorithm.kl.place == "loss" and algorithm.kl.estimator == "k1":
            raise ValueError(
                "algorithm.kl.place loss needs estimator k2 or k3: k1's gradient is 0 on average"
            )
        if algorithm.reference_free and self.offload.reference:
            raise ValueError("offload.reference: algorithm.reference_free leaves no reference to offload")
        if self.offload.reference and self.shares("reference"):
            raise ValueError(
                "offload.reference: the reference is the actor without adapters (actor.lora), there is no"
                " copy to offload; leave it out"
            )
        if self.offload.reward and not self.reward.has_model:
            raise ValueError("offload.reward: a reward.function has no weights to offload")
        return self

    @model_validator(mode="after")
    def _parts(self) -> TrainConfig:
        if self.recompute and self.intra.split_backward:
            raise ValueError(
                "intra.split_backward keeps the activations that recompute frees; set one of them to false"
            )
        if self.intra.split_backward and all(getattr(self, r).layout.pp == 1 for r in self.trained):
            raise ValueError("intra.split_backward: one stage has nothing to fill; give layout.pp 2 or more")
        if self.switch.source == "zero_shards" and self.actor.layout.dp == 1:
            raise ValueError(
                "switch.source zero_shards: one replica has all rows; give layout.dp 2 or more, or gathered"
            )
        if self.switch.overlap == "prefill" and self.device == "cpu":
            raise ValueError("switch.overlap prefill: a CPU does one thing at a time; use nothing")
        if self.intra.overlap_rollout is True and not (self.reward.workers and self.reward.parts):
            raise ValueError(
                "intra.overlap_rollout: no reward is called for each response; give reward.workers, or auto"
            )
        if self.generation.keep_graphs is True and not self.generation.graphs:
            raise ValueError(
                "generation.keep_graphs: generation.graphs false leaves none to keep; leave one of them out"
            )
        if self.generation.keep_graphs is True and self.device == "cpu":
            raise ValueError("generation.keep_graphs: a CPU has no graphs; use auto")
        if self.generation.tp_sums == "peer" and (self.device == "cpu" or self.numerics != "fast"):
            raise ValueError(
                "generation.tp_sums peer: a GPU sums so, and with numerics fast alone; use collective"
            )
        if self.switch.overlap == "prefill" and self.generation.keep_graphs is True:
            raise ValueError(
                "generation.keep_graphs: a graph cannot await weights layer by layer, as with switch.overlap"
                " prefill; leave one of them out"
            )
        beside = self.switch.source == "zero_shards" or self.switch.overlap == "prefill"
        if beside and self.generation.layout == self.actor.layout:
            raise ValueError(
                "switch.source, switch.overlap: the actor generates as it trains, nothing is filled; give"
                " another generation.layout, or leave them out"
            )
        return self

    @property
    def keeps_graphs(self) -> bool | Literal["auto"]:
        """`generation.keep_graphs`, where there are graphs that can be kept."""
        if not self.generation.graphs or self.switch.overlap == "prefill":
            return False
        return self.generation.keep_graphs

    @model_validator(mode="after")
    def _adapters(self) -> TrainConfig:
        adapted = [role for role in self.trained if getattr(self, role).lora is not None]
        if not adapted:
            return self
        if self.intra.split_backward:
            raise ValueError(
                f"intra.split_backward: {adapted[0]}.lora leaves hardly any gradients of weights to compute"
                " apart; leave one of them out"
            )
        if self.switch.source == "zero_shards" and self.actor.lora is not None:
            raise ValueError(
                "switch.source zero_shards: of actor.lora only adapters are stepped, which every replica"
                " gathers at once; use gathered"
            )
        return self

    @model_validator(mode="after")
    def _sizes(self) -> TrainConfig:
        sequences = self.batch * self.generation.samples
        if sequences > MOST_SEQUENCES:
            raise ValueError(f"batch x generation.samples = {sequences} sequences; at most {MOST_SEQUENCES}")
        if sequences % self.minibatch:
            raise ValueError(
                f"algorithm.minibatch {self.minibatch} does not divide batch x generation.samples ="
                f" {sequences}"
            )
        for name, layout in self.layouts().items():
            if layout.world != self.layout.world:
                sizes = f"tp x pp x dp = {layout.tp} x {layout.pp} x {layout.dp} = {layout.world}"
                raise ValueError(f"{name}.layout: {sizes} but the run has {self.world} processes")
            trained = name in self.trained
            rows, what = (self.minibatch, "algorithm.minibatch") if trained else (sequences, "the batch")
            if layout.dp > rows:
                raise ValueError(
                    f"{name}.layout.dp {layout.dp} exceeds the {rows} sequences of {what}: replicas would go"
                    " without; lower dp"
                )
        return self

    @property
    def trained(self) -> tuple[Role, ...]:
        """Roles with an optimizer."""
        return TRAINED[self.algorithm.name]

    @property
    def minibatch(self) -> int:
        """Sequences per optimizer step, over all replicas."""
        return self.algorithm.minibatch or self.batch * self.generation.samples

    @property
    def split_backward(self) -> bool:
        """Whether pipelines compute gradients of weights where they would idle."""
        return self.intra.split_backward

    def offloads(self, role: str) -> bool:
        """Of optimizer states where a role is trained, else of its weights."""
        return self.offload.optimizer if role in self.trained else getattr(self.offload, role)

    def shares(self, role: str) -> Role | None:
        """The reference is the actor without its adapters, where both are one model in one layout."""
        if role != "reference" or self.actor.lora is None:
            return None
        same = ("model", "init", "layers", "layout")
        return "actor" if all(getattr(self.actor, x) == getattr(self.reference, x) for x in same) else None

    def layouts(self) -> dict[str, LayoutConfig]:
        """Layout per model in use, and `generation`; reward functions and an unused reference have none."""
        named = {role: getattr(self, role).layout for role in ("actor", "generation")}
        if self.critic is not None:
            named["critic"] = self.critic.layout
        if not self.algorithm.reference_free:
            named["reference"] = self.reference.layout
        if self.reward.has_model:
            named["reward"] = self.reward.layout
        return named
