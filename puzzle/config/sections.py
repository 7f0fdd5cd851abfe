"""The sections of a run's configuration; `puzzle.config.run` puts them together."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

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

    model: Location | None = Field(None, description="Hugging Face model folder")
    init: InitConfig | None = Field(None, description="random initialisation instead of a folder")
    layers: Layers | None = Field(None, description="keep only the first N layers")
    layout: LayoutConfig = Field(LayoutConfig(), description="default: the run's layout")


class TrainedConfig(ModelConfig):
    """A model with an optimizer. The critic's source defaults to the actor's (with a fresh value head)."""

    optimizer: OptimizerConfig = OptimizerConfig()


class RewardPart(Section):
    """One of several rewards, of which `weight` times its score counts."""

    function: str | None = Field(None, description="as reward.function")
    url: str | None = Field(None, description="as reward.url")
    weight: Weight = Field(1.0, description="may be negative")
    name: Name | None = Field(None, description="in the log; default: the function's, or the server's host")

    @model_validator(mode="after")
    def _one(self) -> RewardPart:
        if (self.function is None) == (self.url is None):
            raise ValueError("each of functions has function or url, one of them")
        if self.url is not None:
            _check_url(self.url)
        return self

    @property
    def label(self) -> str:
        """What the log calls it."""
        if self.name is not None:
            return self.name
        if self.url is not None:
            return urlsplit(self.url).netloc[:MOST_NAME]
        return str(self.function).rpartition(":")[2][:MOST_NAME]


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ValueError("url: expected http://HOST[:PORT]/PATH or https://...")
    if parts.username or parts.password:
        raise ValueError("url: the log would show its password; put a token in a variable, see token_env")


MODEL_PART = "model"
"""What the log calls the score of the reward model where functions are added to it."""


class RewardConfig(ModelConfig):
    """The reward: a model with a score head, a Python function, a server, or a weighted sum of them
    (docs/rewards.md)."""

    function: str | None = Field(
        None, description="module:name, path/file.py:name, or given: the callable that Python hands over"
    )
    url: str | None = Field(None, description="of a server that scores: http://... or https://...")
    functions: tuple[RewardPart, ...] = Field(
        (), description="several of them, which are added, also to a model's score"
    )
    weight: Weight = Field(1.0, description="of the model's score")
    workers: Natural | None = Field(
        None,
        description="processes (requests at a time) that score one response per call; null: one call with the"
        " whole batch, in a process of its own; 0: the same in the trainer's process",
    )
    timeout: Positive | None = Field(
        3600.0, description="seconds in which a batch must be scored; null: no limit"
    )
    response_timeout: Positive | None = Field(
        None, description="seconds for one response, with workers; null: no limit"
    )
    timeout_score: Weight | None = Field(
        None, description="what a response scores that took too long; null: that ends the run"
    )
    token_env: Name | None = Field(
        None, description="variable of the environment that holds the bearer token for url"
    )
    retries: Natural = Field(3, description="so often is a request repeated that found no answer")

    @model_validator(mode="after")
    def _parts_fit(self) -> RewardConfig:
        if self.url is not None:
            _check_url(self.url)
        if self.functions and (self.function is not None or self.url is not None):
            raise ValueError("give function or url (one reward), or functions (several), not both")
        names = [part.label for part in self.parts] + ([MODEL_PART] if self.functions else [])
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"functions: two are called {name!r}; give each a name")
        if self.weight != 1 and not self.has_model:
            raise ValueError("weight: is that of a model's score; give each of functions its own")
        if not self.workers:
            for key in ("response_timeout", "timeout_score"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key}: without workers a call has the whole batch; give workers")
        elif self.timeout_score is not None and self.response_timeout is None:
            raise ValueError("timeout_score: nothing takes too long without response_timeout")
        if self.token_env is not None and all(part.url is None for part in self.parts):
            raise ValueError("token_env: there is no url to send the token to")
        return self

    @property
    def parts(self) -> tuple[RewardPart, ...]:
        """All that is no model."""
        if self.function is None and self.url is None:
            return self.functions
        return (RewardPart(function=self.function, url=self.url),)

    @property
    def has_model(self) -> bool:
        """Whether a model scores."""
        return self.model is not None or self.init is not None


class DataConfig(Section):
    """Prompts, the tokenizer and their limits."""

    prompts: Location | None = Field(
        None, description=".jsonl, .json, .parquet, .txt or a Hugging Face dataset folder"
    )
    eval_prompts: Location | None = Field(None, description="held-out prompts in the same formats")
    random_tokens: Tokens | None = Field(None, description="prompts of N random ids (timing runs), no text")
    field: Name = Field("prompt", description="name of the prompt's field")
    id_field: Name | None = Field(None, description="field of a stable id; default: position in the file")
    tokenizer: Location | None = Field(None, description="folder, or bytes; default: the actor's folder")
    chat_template: bool = Field(False, description="render prompts as user turns of a chat")
    system: str | None = Field(
        None, description="system turn of each prompt without one (chat_template only)"
    )
    max_prompt_tokens: Tokens = Field(256, description="longest prompt; memory is counted for it")
    too_long: Literal["refuse", "drop"] = Field("refuse", description="what to do with longer prompts")
    shuffle: bool = Field(True, description="a new order of prompts in every epoch")


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
    decode_microbatch: Sequences | None = Field(None, description="sequences per decode micro-batch")
    graphs: bool = Field(True, description="replay decode passes as CUDA graphs (not on a CPU)")
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
    split_backward: bool = Field(
        False, description="pipelines compute gradients of weights where they would idle"
    )


class OffloadConfig(Section):
    """What lies in pinned host memory between the stages that use it (docs/memory.md)."""

    optimizer: bool = Field(False, description="moments and fp32 masters, outside of training")
    reference: bool = Field(False, description="the reference's weights, outside of inference")
    reward: bool = Field(False, description="the reward model's weights, outside of inference")


class EvalConfig(Section):
    """Held-out evaluation with the run's own sampling."""

    every: Natural = Field(0, description="iterations between evaluations; 0: none")
    greedy: bool = Field(False, description="the likeliest tokens instead of drawn ones")


class CheckpointConfig(Section):
    """Under OUT/checkpoints: state-N to resume from, and the actor as Hugging Face folders."""

    every: Natural = Field(0, description="iterations between checkpoints; 0: only the last model")
    save: bool = Field(True, description="false: none at all (timing runs)")
    keep: Count = Field(2, description="how many of each kind stay")
    asynchronous: bool = Field(True, description="write state-N while training goes on")
    best: bool = Field(False, description="keep the one with the best held-out reward as well")


class LaunchConfig(Section):
    """How a run that cannot go on ends (docs/failures.md)."""

    watchdog: Positive = Field(60.0, description="seconds after which a run that hangs is ended")
    max_restarts: Natural = Field(0, description="resume so often by itself after processes died")


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
    tensorboard: bool = Field(True, description="files for TensorBoard under OUT/tensorboard")
    plots: bool = Field(True, description="curves under OUT/plots at the end")
    trace: tuple[Natural, ...] = Field((), description="iterations of which a timeline is written")
    profile: tuple[Natural, ...] = Field((), description="iterations that torch's profiler records, per rank")
