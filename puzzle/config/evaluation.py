"""The configuration of `puzzle evaluate`: a model, prompts, how it answers, and what scores the answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from puzzle.config.algorithm import PassesConfig
from puzzle.config.reward import RewardConfig
from puzzle.config.sections import (
    DataConfig,
    GenerationConfig,
    LaunchConfig,
    LayoutConfig,
    ModelConfig,
    Section,
    Seed,
    Sequences,
    with_layouts,
)


class EvaluationConfig(Section):
    """Answers of one model to prompts, scored as `puzzle train` scores them."""

    seed: Seed = Field(0, description="of sampling")
    batch: Sequences = Field(32, description="prompts at a time, of all replicas")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="compute type")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs where torch sees any")
    layout: LayoutConfig = LayoutConfig()
    actor: ModelConfig = ModelConfig()
    reward: RewardConfig = RewardConfig()
    data: DataConfig = DataConfig()
    generation: GenerationConfig = GenerationConfig()
    algorithm: PassesConfig = PassesConfig(microbatch_tokens=16384)
    launch: LaunchConfig = LaunchConfig()

    def resolved(self) -> dict[str, Any]:
        """The complete configuration as plain JSON values."""
        return self.model_dump(mode="json")

    @model_validator(mode="before")
    @classmethod
    def _inherit_layout(cls, data: Any) -> Any:
        """All models have the layout of the run."""
        return with_layouts(data, ("actor", "reward"))

    @model_validator(mode="after")
    def _complete(self) -> EvaluationConfig:
        if (self.actor.model is None) == (self.actor.init is None):
            raise ValueError("actor: give a model folder")
        if self.data.prompts is None:
            raise ValueError("data.prompts is missing: the prompts to answer")
        if self.data.system is not None and not self.data.chat_template:
            raise ValueError("data.system needs data.chat_template")
        if self.data.tokenizer is None and self.actor.model is None:
            raise ValueError("data.tokenizer: a randomly initialised actor has none; give a folder, or bytes")
        if self.launch.max_restarts:
            raise ValueError(
                "launch.max_restarts: an evaluation has no checkpoint to go on from; leave it out"
            )
        for role in ("actor", "reward"):
            if getattr(self, role).layout.world != self.layout.world:
                raise ValueError(f"{role}.layout: the run has {self.layout.world} processes")
        return self
