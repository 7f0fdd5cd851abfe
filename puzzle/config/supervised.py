"""The configurations of supervised training: `puzzle sft`, `puzzle reward-model`, `puzzle dpo`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from puzzle.config.algorithm import PassesConfig
from puzzle.config.base import SOURCES, Role, RunConfig
from puzzle.config.run import TrainConfig
from puzzle.config.sections import (
    Count,
    Location,
    Name,
    Positive,
    Sequences,
    SourceConfig,
    Tokens,
    TrainedConfig,
    with_layouts,
)


class ExamplesConfig(SourceConfig):
    """Examples to learn from, the tokenizer and their limits."""

    examples: Location | None = Field(None, description=".jsonl, .json, .parquet or a Hugging Face dataset")
    eval_examples: Location | None = Field(None, description="held-out examples in the same formats")
    max_tokens: Tokens = Field(1024, description="longest sequence; memory is counted for it")
    prompt_field: Name = Field("prompt", description="name of the prompt's field: text, or turns of a chat")


class DialoguesConfig(ExamplesConfig):
    """Chats, or prompts with responses, and how they are read."""

    messages_field: Name = Field("messages", description="of a whole chat, in rows that have it")
    response_field: Name = Field("response", description="of the response, in rows without a chat")
    learn: Literal["all", "last"] = Field("all", description="which turns of the assistant are learned")


class SFTAlgorithm(PassesConfig):
    """How the actor learns to write what the assistant says."""

    loss_average: Literal["token", "sequence"] = Field(
        "token", description="learned tokens count alike; sequence: examples do"
    )


class SupervisedConfig(RunConfig):
    """One model that learns from examples."""

    rows: ClassVar[int] = 1
    """Sequences of an example."""

    iterations: Count = Field(100, description="optimizer steps; examples / batch of them are an epoch")
    batch: Sequences = Field(32, description="examples per optimizer step")
    data: ExamplesConfig = ExamplesConfig()

    @model_validator(mode="before")
    @classmethod
    def _inherit_layout(cls, data: Any) -> Any:
        """A model without a layout has the run's."""
        return with_layouts(data, cls.roles())

    @classmethod
    @abstractmethod
    def roles(cls) -> tuple[Role, ...]:
        """Those that are trained."""

    @property
    def trained(self) -> tuple[Role, ...]:
        """Roles with an optimizer."""
        return self.roles()

    @classmethod
    def task_name(cls) -> str:
        """The command of such a run."""
        return cls.model_fields["task"].default

    @property
    def longest(self) -> int:
        """Most tokens of an example."""
        return self.rows * self.data.max_tokens

    @model_validator(mode="after")
    def _source(self) -> SupervisedConfig:
        (role,) = self.trained
        sources = [key for key in SOURCES if getattr(self.main, key, None) is not None]
        if len(sources) != 1:
            said = (
                "give model or init, not both" if sources else f"no model; give {role}.model or {role}.init"
            )
            raise ValueError(f"{role}: {said}")
        if self.main.layout.world != self.layout.world:
            raise ValueError(
                f"{role}.layout: {self.main.layout.world} processes but the run has {self.layout.world}"
            )
        if self.main.layout.dp > self.batch:
            raise ValueError(
                f"{role}.layout.dp {self.main.layout.dp} exceeds the {self.batch} examples of a batch:"
                " replicas would go without; lower dp"
            )
        return self

    @model_validator(mode="after")
    def _examples(self) -> SupervisedConfig:
        data = self.data
        if data.examples is None:
            raise ValueError("data.examples is missing: the file to learn from")
        if self.tokenizer is None:
            raise ValueError("data.tokenizer: a randomly initialised model has none; give a folder, or bytes")
        if data.system is not None and not data.chat_template:
            raise ValueError("data.system needs data.chat_template")
        if self.eval.every and data.eval_examples is None:
            raise ValueError("eval.every needs data.eval_examples")
        if self.checkpoint.best and not (self.eval.every and self.checkpoint.save):
            raise ValueError("checkpoint.best needs checkpoint.save, eval.every and data.eval_examples")
        limit = self.algorithm.microbatch_tokens
        if limit is not None and limit < self.longest:
            what = "the two sequences of a pair stay" if self.rows > 1 else "a sequence stays"
            raise ValueError(
                f"algorithm.microbatch_tokens {limit} is less than {self.longest} ({what} in one pass); raise"
                " it, or lower data.max_tokens"
            )
        return self


class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning: the actor learns to say what the assistant says in the examples."""

    task: Literal["sft"] = Field("sft", description="what the log calls the command")
    actor: TrainedConfig = TrainedConfig()
    data: DialoguesConfig = DialoguesConfig()
    algorithm: SFTAlgorithm = SFTAlgorithm()

    @classmethod
    def roles(cls) -> tuple[Role, ...]:
        """The actor alone."""
        return ("actor",)


class PairsConfig(ExamplesConfig):
    """Pairs of answers to a prompt, of which one was preferred, and how they are read."""

    chosen_field: Name = Field("chosen", description="of the preferred answer: text, or turns")
    rejected_field: Name = Field("rejected", description="of the other one")
    margin_field: Name | None = Field(None, description="of by how much more its score should be at least")


class RewardModelConfig(SupervisedConfig):
    """A reward model: its score of a preferred answer learns to exceed that of the other (Bradley and Terry
    1952, as Ouyang et al. 2022, arXiv:2203.02155, section 3.5)."""

    rows: ClassVar[int] = 2

    task: Literal["reward-model"] = Field("reward-model", description="what the log calls the command")
    reward: TrainedConfig = TrainedConfig()
    data: PairsConfig = PairsConfig()

    @classmethod
    def roles(cls) -> tuple[Role, ...]:
        """The reward model alone."""
        return ("reward",)


class DPOAlgorithm(PassesConfig):
    """How strongly preferences move the actor away from where it began."""

    beta: Positive = Field(0.1, description="weight of the implicit KL; less lets the actor go further")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="share of pairs taken to be the wrong way round"
    )


class DPOConfig(SupervisedConfig):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290). The reference is the actor as
    the run found it: its log-probs are computed once, before the first step."""

    rows: ClassVar[int] = 2

    task: Literal["dpo"] = Field("dpo", description="what the log calls the command")
    actor: TrainedConfig = TrainedConfig()
    data: PairsConfig = PairsConfig()
    algorithm: DPOAlgorithm = DPOAlgorithm()

    @classmethod
    def roles(cls) -> tuple[Role, ...]:
        """The actor alone."""
        return ("actor",)


SUPERVISED: dict[str, type[SupervisedConfig]] = {
    "sft": SFTConfig,
    "reward-model": RewardModelConfig,
    "dpo": DPOConfig,
}
"""Schemas by their task."""


def config_of(values: Mapping[str, Any]) -> RunConfig:
    """The configuration of a run from its values as `resolved` gave them."""
    return SUPERVISED.get(values.get("task", ""), TrainConfig).model_validate(values)
