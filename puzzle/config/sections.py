"""The sections of a run's configuration; `puzzle.config.run` puts them together."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from puzzle.files.limits import (
    LARGEST,
    MOST,
    MOST_BYTES,
    MOST_LAYERS,
    MOST_NAME,
    MOST_PROCESSES,
    MOST_SEED,
    MOST_SEQUENCES,
    MOST_TOKENS,
    SMALLEST,
)
from puzzle.files.path import expanded
from puzzle.plan.pages import PREFILL_TOKENS
from puzzle.spec.lora import PROJECTIONS


def _no_float32_zero(value: float) -> float:
    if value < SMALLEST:
        raise ValueError(f"expected at least {SMALLEST:g}")
    return value


Name = Annotated[str, Field(min_length=1, max_length=MOST_NAME)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Natural = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]
Processes = Annotated[int, Field(ge=1, le=MOST_PROCESSES)]
Sequences = Annotated[int, Field(ge=1, le=MOST_SEQUENCES)]
Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
Layers = Annotated[int, Field(ge=1, le=MOST_LAYERS)]
Bytes = Annotated[int, Field(ge=1, le=MOST_BYTES)]
Positive = Annotated[float, Field(gt=0, le=LARGEST), AfterValidator(_no_float32_zero)]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


Weight = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]


Location = Annotated[str, AfterValidator(expanded)]
"""A path in a configuration, which no shell has read."""


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, finite numbers, no booleans where a number belongs."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _booleans_are_not_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool and bool not in get_args(annotation):
            raise ValueError("a truth value has no meaning here")
        return value


def _stages(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and len(value) == 1 and value[0] in ("even", "balanced"):
        value = value[0]  # what a comma-separated command-line value of one word becomes
    if value in ("even", "balanced"):
        return value
    if isinstance(value, (list, tuple)) and value and all(type(v) is int and v > 0 for v in value):
        return tuple(value)
    raise ValueError("expected even, balanced or a list of layers per stage such as [8, 8, 7, 7]")


class LayoutConfig(Section):
    """Tensor x pipeline x data parallelism of one model; their product is the number of processes."""

    tp: Processes = Field(1, description="tensor-parallel ranks")
    pp: Processes = Field(1, description="pipeline stages")
    dp: Processes = Field(1, description="data-parallel replicas")
    stages: Annotated[str | tuple[int, ...], BeforeValidator(_stages)] = Field(
        "even", description="layers per stage: even, balanced (counts embedding and head) or a list"
    )

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.tp * self.pp * self.dp

    @model_validator(mode="after")
    def _possible(self) -> LayoutConfig:
        if self.world > MOST_PROCESSES:
            product = f"tp x pp x dp = {self.tp} x {self.pp} x {self.dp} = {self.world}"
            raise ValueError(f"{product} processes; at most {MOST_PROCESSES} are planned for")
        if isinstance(self.stages, tuple) and len(self.stages) != self.pp:
            raise ValueError(f"stages lists {len(self.stages)} stages but pp is {self.pp}")
        return self


def with_layouts(data: Any, roles: Iterable[str]) -> Any:
    """A configuration whose models of `roles` have its layout where they do not give another; what is
    malformed is left for validation to refuse."""
    if not isinstance(data, dict) or not isinstance(data.get("layout", {}), dict):
        return data
    filled = dict(data)
    for role in roles:
        section = filled.get(role, {})
        if isinstance(section, dict) and isinstance(own := section.get("layout", {}), dict):
            filled[role] = {**section, "layout": {**filled.get("layout", {}), **own}}
    return filled


class InitConfig(Section):
    """Shape of a randomly initialised model, by Hugging Face names; a preset fills what is not given."""

    preset: str | None = Field(None, description="a published size: 350m, 7b, 13b, 33b")
    model_type: str | None = Field(None, description="llama (default), mistral, qwen2, qwen3")
    vocab_size: Count | None = Field(None, description="rows of the embedding")
    hidden_size: Count | None = Field(None, description="width of hidden states")
    intermediate_size: Count | None = Field(None, description="width inside the MLP")
    num_hidden_layers: Layers | None = Field(None, description="decoder layers")
    num_attention_heads: Count | None = Field(None, description="query heads")
    num_key_value_heads: Count | None = Field(None, description="default: as many as query heads")
    head_dim: Count | None = Field(None, description="default: hidden_size / num_attention_heads")
    max_position_embeddings: Count | None = Field(None, description="most tokens of a sequence")
    rms_norm_eps: Positive | None = Field(None, description="added to the mean square in norms")
    rope_theta: Positive | None = Field(None, description="base of rotary position embeddings")
    tie_word_embeddings: bool | None = Field(None, description="the LM head is the embedding")

    @model_validator(mode="after")
    def _complete(self) -> InitConfig:
        needed = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        absent = [name for name in needed if getattr(self, name) is None]
        if self.preset is None and absent:
            raise ValueError(f"give preset, or also {', '.join(absent)}")
        return self

    def fields(self) -> dict[str, Any]:
        """The given fields without the preset, as keys of a Hugging Face `config.json`."""
        return self.model_dump(exclude={"preset"}, exclude_none=True)


class OptimizerConfig(Section):
    """AdamW (Loshchilov & Hutter 2019) with a learning-rate schedule in optimizer steps."""

    lr: Positive = Field(1e-5, description="the highest learning rate")
    betas: tuple[BelowOne, BelowOne] = Field((0.9, 0.95), description="decay of the two moments per step")
    eps: Positive = Field(1e-8, description="added to the root of the second moment")
    weight_decay: NonNegative = Field(0.0, description="decoupled; matrices only, no norms, no biases")
    grad_clip: Positive | None = Field(1.0, description="largest global gradient norm; null: no clipping")
    warmup: Natural = Field(0, description="steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="after warm-up; linear and cosine fall to 0 at the last step"
    )
    backend: Literal["torch", "apex"] = Field("torch", description="apex: its FusedAdam, if installed")


class ModelConfig(Section):
    """Where one model comes from and how it is laid out."""

    model: Location | None = Field(
        None, description="Hugging Face model folder, or ORG/NAME on the Hub (docs/hub.md)"
    )
    init: InitConfig | None = Field(None, description="random initialisation instead of a folder")
    layers: Layers | None = Field(None, description="keep only the first N layers")
    layout: LayoutConfig = Field(LayoutConfig(), description="default: the run's layout")


def _targets(value: Any) -> Any:
    """The projections meant: `all`, one name or several, in the order of a layer."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not names:
        raise ValueError("expected all, or names of projections such as [q_proj, v_proj]")
    for name in names:
        if name != "all" and name not in PROJECTIONS:
            near = get_close_matches(str(name), PROJECTIONS, 1)
            hint = f"did you mean {near[0]}?" if near else f"use all, or of {', '.join(PROJECTIONS)}"
            raise ValueError(f"{name!r} is no projection of a layer; {hint}")
    return tuple(name for name in PROJECTIONS if name in names or "all" in names)


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021): a model's own weights are frozen, W acts as W + alpha/rank B A."""

    rank: Count = Field(16, description="rows of A and columns of B")
    alpha: Positive = Field(32.0, description="B A is multiplied by alpha / rank")
    targets: Annotated[tuple[str, ...], BeforeValidator(_targets)] = Field(
        PROJECTIONS, description="projections with adapters, such as q_proj,v_proj; all: every one"
    )
    merge: bool = Field(True, description="generate with adapters added to the weights; false: beside them")


class TrainedConfig(ModelConfig):
    """A model with an optimizer. The critic's source defaults to the actor's (with a fresh value head)."""

    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig | None = Field(None, description="train adapters and a value head alone; null: all")


class SourceConfig(Section):
    """How texts are read: the tokenizer, its chat template, limits."""

    tokenizer: Location | None = Field(None, description="folder, or bytes; default: the model's folder")
    chat_template: bool = Field(False, description="render texts as turns of a chat")
    system: str | None = Field(None, description="system turn of each chat without one (chat_template only)")
    too_long: Literal["refuse", "drop"] = Field("refuse", description="what to do with longer rows")
    empty: Literal["refuse", "drop"] = Field(
        "refuse", description="what to do with rows whose prompt, user's turn or answer has no text"
    )
    shuffle: bool = Field(True, description="a new order of rows in every epoch")


class DataConfig(SourceConfig):
    """Prompts, the tokenizer and their limits."""

    prompts: Location | None = Field(
        None, description=".jsonl, .json, .parquet, .txt or a Hugging Face dataset folder"
    )
    eval_prompts: Location | None = Field(None, description="held-out prompts in the same formats")
    random_tokens: Tokens | None = Field(None, description="prompts of N random ids (timing runs), no text")
    field: Name = Field("prompt", description="name of the prompt's field")
    id_field: Name | None = Field(None, description="field of a stable id; default: position in the file")
    max_prompt_tokens: Tokens = Field(256, description="longest prompt; memory is counted for it")


class GenerationConfig(Section):
    """Sampling of responses."""

    min_new_tokens: Natural = Field(0, description="nothing ends a response before it has so many")
    max_new_tokens: Tokens = Field(128, description="a response is cut here")
    temperature: Positive = Field(1.0, description="logits are divided by it, in training too")
    top_k: Natural = Field(0, description="0: no limit")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="smallest set of tokens of this probability"
    )
    greedy: bool = Field(False, description="the likeliest token, nothing is drawn")
    samples: Sequences = Field(1, description="responses per prompt")
    stop: tuple[str, ...] = Field((), description="texts that end a response, and are no part of its text")
    prefill_microbatch: Sequences | None = Field(None, description="sequences per prefill micro-batch")
    prefill_tokens: Tokens = Field(
        PREFILL_TOKENS, description="most tokens of a prefill pass; longer prompts are cached in parts"
    )
    decode_microbatch: Sequences | None = Field(None, description="sequences per decode micro-batch")
    max_sequences: Sequences | None = Field(
        None, description="of a replica at a time; the others wait (as many as memory holds)"
    )
    graphs: bool = Field(True, description="replay decode passes as CUDA graphs (not on a CPU)")
    keep_graphs: bool | Literal["auto"] = Field(
        "auto",
        description="graphs, cache and switched weights stay for all iterations; auto: where that fits beside"
        " training",
    )
    tp_sums: Literal["collective", "peer", "auto"] = Field(
        "collective",
        description="sums over tensor ranks in decode passes; peer: one kernel reads peers' memory, adds and"
        " norms; auto: where devices allow it (docs/generation.md)",
    )
    early_stop: bool = Field(True, description="false: decode ended responses to the end, and drop that")
    layout: LayoutConfig = Field(LayoutConfig(), description="default: the actor's layout")

    @model_validator(mode="after")
    def _room(self) -> GenerationConfig:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} exceeds max_new_tokens {self.max_new_tokens}"
            )
        if "" in self.stop:
            raise ValueError("stop: an empty text would end every response; leave it out")
        return self


class SwitchConfig(Section):
    """Inter-stage switching: how the actor's weights get to `generation.layout` and back, if it differs."""

    strategy: Literal["planned", "fixed-order", "gather-all"] = Field(
        "planned", description="planned: fewest bytes; the others are baselines (docs/switching.md)"
    )
    source: Literal["gathered", "zero_shards"] = Field(
        "gathered", description="zero_shards: what each replica has stepped; the all-gather follows"
    )
    overlap: Literal["nothing", "prefill"] = Field(
        "nothing", description="prefill: its layers await their weights one by one (not on a CPU)"
    )
    transport: Literal["auto", "peer", "messages"] = Field(
        "auto", description="peer: copies out of peers' memory (auto: where devices allow it)"
    )
    staging_bytes: Bytes = Field(256 << 20, description="most memory for packing messages, per device")
    verify: bool = Field(False, description="compare checksums of every tensor after each switch")
    gpus_per_node: Count | None = Field(None, description="default: as the launcher says")
    nest: bool = Field(False, description="stages of generation begin and end where the actor's do")


Fuse = bool | Literal["auto"]
"""auto: if a simulation with costs measured in the second iteration says that it pays, from the third on."""


class IntraConfig(Section):
    """Intra-stage switching: models with affinity share one pipeline. `auto` measures before it decides."""

    fuse_training: Fuse = Field(False, description="the trained models in one schedule: true, auto")
    fuse_inference: Fuse = Field(
        False, description="reference, critic and reward in one inference schedule: true, auto"
    )
    overlap_rollout: Fuse = Field(
        "auto",
        description="rewards that are called for each response begin while others are decoded; auto: where"
        " there are any",
    )
    split_backward: bool = Field(
        False, description="pipelines compute gradients of weights where they would idle"
    )


class OffloadConfig(Section):
    """What lies in pinned host memory between the stages that use it (docs/memory.md)."""

    optimizer: bool = Field(False, description="moments and fp32 masters, outside of training")
    reference: bool = Field(False, description="the reference's weights, outside of inference")
    reward: bool = Field(False, description="the reward model's weights, outside of inference")


class HeldOutConfig(Section):
    """Held-out evaluation."""

    every: Natural = Field(0, description="iterations between evaluations; 0: none")


class EvalConfig(HeldOutConfig):
    """Held-out evaluation with the run's own sampling."""

    greedy: bool = Field(False, description="the likeliest tokens instead of drawn ones")


class CheckpointConfig(Section):
    """Under OUT/checkpoints: state-N to resume from, and the actor as Hugging Face folders."""

    every: Natural = Field(0, description="iterations between checkpoints; 0: only the last model")
    save: bool = Field(True, description="false: none at all (timing runs)")
    keep: Count = Field(2, description="how many of each kind stay")
    asynchronous: bool = Field(True, description="write state-N while training goes on")
    best: bool = Field(False, description="keep the one with the best held-out reward as well")


class LaunchConfig(Section):
    """Processes: what they run on, and how a run that cannot go on ends (docs/failures.md)."""

    watchdog: Positive = Field(60.0, description="seconds after which a run that hangs is ended")
    max_restarts: Natural = Field(0, description="resume so often by itself after processes died")
    share_device: bool = Field(
        False, description="processes share GPUs that are too few: slow, for checks of layouts"
    )
    skip_memory_check: bool = Field(
        False, description="begin with a warning where memory is counted as too little"
    )


class LogConfig(Section):
    """What the log says about the run, and what is written beside it."""

    figures: tuple[str, ...] = Field((), description="figures that draw this run, such as figure8")
    cluster: Name = Field("local", description="what figures call the machine")
    variant: Name = Field("puzzle", description="what figures call the system, such as opt or base")
    actor: Name | None = Field(None, description="name in figures; default: preset or folder name")
    critic: Name | None = Field(None, description="name in figures; default: as of the actor")
    repeat: Natural = Field(0, description="tells repeats of one experiment apart")
    provenance: Literal["measured", "rehearsal"] = Field(
        "measured", description="rehearsal: a toy that proves plumbing, not speed"
    )
    samples: Natural = Field(64, description="samples written per iteration")
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        (), description="what else gets the numbers (docs/trackers.md)"
    )
    project: Name = Field("puzzle", description="what trackers call a group of runs")
    plots: bool = Field(True, description="curves under OUT/plots at the end")
    trace: tuple[Natural, ...] = Field((), description="iterations of which a timeline is written")
    profile: tuple[Natural, ...] = Field((), description="iterations that torch's profiler records, per rank")
