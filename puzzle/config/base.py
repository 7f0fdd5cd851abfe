"""What the configuration of every run says, whatever it trains and by what."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from puzzle.config.algorithm import PassesConfig
from puzzle.config.sections import (
    CheckpointConfig,
    Count,
    HeldOutConfig,
    LaunchConfig,
    LayoutConfig,
    LogConfig,
    ModelConfig,
    Section,
    Seed,
    Sequences,
    SourceConfig,
)
from puzzle.plan.activations import PARTS

Role = Literal["actor", "critic", "reference", "reward"]
ROLES: tuple[Role, ...] = get_args(Role)
SOURCES = ("model", "init", "function", "url")


class RunConfig(Section):
    """A run: models on a layout, trained over iterations, evaluated and saved between them."""

    seed: Seed = Field(0, description="of random weights, sampling and the order of the data")
    iterations: Count = Field(100, description="of training")
    batch: Sequences = Field(32, description="rows of the data per iteration")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="compute type; bf16 keeps fp32 master weights")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs where torch sees any")
    numerics: Literal["fast", "invariant"] = Field(
        "fast", description="invariant: the same numbers whatever the layout and the batch, for a price"
    )
    numerics_parts: Count | None = Field(
        None, description="1, 2, 4 or 8, of sums that tensor parallelism cuts; null: the run's largest tp"
    )
    compile: bool = Field(False, description="fuse norms, rotations and gates by torch.compile")
    recompute: bool = Field(False, description="keep layers' inputs alone for backward passes: less memory")
    layout: LayoutConfig = LayoutConfig()
    data: SourceConfig = SourceConfig()
    algorithm: PassesConfig = PassesConfig()
    eval: HeldOutConfig = HeldOutConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    launch: LaunchConfig = LaunchConfig()
    log: LogConfig = LogConfig()

    @field_validator("dtype", mode="before")
    @classmethod
    def _no_fp16(cls, value: Any) -> Any:
        if value in ("fp16", "float16", "half"):
            raise ValueError("fp16 is not supported (it needs loss scaling); use bf16 or fp32")
        return value

    @classmethod
    def task_name(cls) -> str:
        """The command of such a run."""
        return "train"

    @property
    @abstractmethod
    def trained(self) -> tuple[Role, ...]:
        """Roles with an optimizer; first the one that the run is about."""

    @property
    def minibatch(self) -> int:
        """Rows per optimizer step, over all replicas."""
        return self.batch

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.layout.world

    @property
    def split_backward(self) -> bool:
        """Whether pipelines compute gradients of weights where they would idle."""
        return False

    @property
    def main(self) -> ModelConfig:
        """The model that the run is about."""
        return getattr(self, self.trained[0])

    @property
    def parts(self) -> int | None:
        """Of sums that tensor parallelism cuts, if numbers are not to depend on it; None if they may."""
        if self.numerics == "fast":
            return None
        return self.numerics_parts or max(layout.tp for layout in self.layouts().values())

    @model_validator(mode="after")
    def _numerics(self) -> RunConfig:
        if self.parts is None:
            if self.numerics_parts is not None:
                raise ValueError("numerics_parts: only numerics invariant cuts sums; leave it out")
            return self
        if self.compile:
            raise ValueError("numerics invariant: torch.compile rounds as it likes; set compile to false")
        if any(getattr(getattr(self, role), "lora", None) for role in self.trained):
            raise ValueError(
                "numerics invariant: sums of adapters (lora) are not cut into parts; leave lora out, or use"
                " fast"
            )
        if self.numerics_parts not in (None, *PARTS):
            raise ValueError(f"numerics_parts: is {self.numerics_parts}; use 1, 2, 4 or 8, or leave it out")
        for name, layout in self.layouts().items():
            if layout.tp not in PARTS:
                raise ValueError(f"numerics invariant: {name}.layout.tp is {layout.tp}; use 1, 2, 4 or 8")
            if self.parts % layout.tp:
                raise ValueError(
                    f"numerics_parts: {self.parts} is less than {name}.layout.tp {layout.tp}; raise it, or"
                    " leave it out"
                )
        return self

    @property
    def tokenizer(self) -> str | None:
        """The folder of the tokenizer, or `bytes`; None where there is none."""
        return self.data.tokenizer or self.main.model

    def offloads(self, role: str) -> bool:
        """Whether optimizer states of a role, or its weights where it is not trained, lie on the host where
        they are not needed."""
        return False

    def shares(self, role: str) -> Role | None:
        """The role whose frozen weights are also those of `role`; None: it has its own."""
        return None

    def layouts(self) -> dict[str, LayoutConfig]:
        """Layout per model in use."""
        return {role: getattr(self, role).layout for role in self.trained}

    def resolved(self) -> dict[str, Any]:
        """The complete configuration as plain JSON values, for the log."""
        return self.model_dump(mode="json")
