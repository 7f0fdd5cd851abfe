"""What a run consists of, decided before any process starts: models and where they lie, the switch, shared
pipelines, and how a batch is cut. `puzzle.config.resolve` makes these values from a configuration."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from puzzle.plan.cluster import Cluster
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.pipeline.schedules import why_not_fused
from puzzle.plan.reshard.plan import Strategy, SwitchPlan, plan_switch
from puzzle.spec.model import ModelSpec


@dataclass(frozen=True)
class ModelPlan:
    """One model of a run: its shape, and which rank holds which part. `trained`: it has an optimizer.
    `shares`: the role whose frozen weights are also its own."""

    role: str
    spec: ModelSpec
    placement: Placement
    trained: bool
    shares: str | None = None

    @property
    def layout(self) -> Layout:
        """How the model is cut."""
        return self.placement.layout

    def describe(self) -> dict[str, Any]:
        """JSON values for people and logs."""
        spec = self.spec
        shape = {
            "family": spec.family,
            "layers": spec.num_layers,
            "hidden": spec.hidden_size,
            "vocabulary": spec.vocab_size,
            "head": spec.head,
            "parameters": spec.parameters,
        }
        found = {**shape, "layout": _layout(self.layout), "trained": self.trained}
        if spec.lora is not None:
            found["lora"] = {**asdict(spec.lora), "trained_parameters": spec.trained_parameters}
        if self.shares is not None:
            found["shares"] = self.shares
        return found

    def __str__(self) -> str:
        """For people: size, layout, what is learned."""
        count = self.spec.base.parameters
        scale, unit = (1e9, "B") if count >= 1e7 else (1e6, "M")
        size = f"{count / scale:.3f} {unit} parameters, tp,pp,dp {self.layout}"
        if self.shares is not None:
            return f"{size}, the weights of the {self.shares} without its adapters"
        if not self.trained or self.spec.lora is None:
            return size + (", trained" if self.trained else "")
        learned = f"{self.spec.trained_parameters / 1e6:.3f} M parameters"
        return f"{size}, trained by adapters of rank {self.spec.lora.rank}: {learned}"


@dataclass(frozen=True)
class SwitchRequest:
    """Everything that `plan_switch` is called with: equal requests give equal plans.

    `zero`: out of ZeRO shards, the all-gather follows.
    """

    spec: ModelSpec
    source: Placement
    destination: Placement
    cluster: Cluster
    strategy: Strategy
    itemsize: int
    staging_bytes: int
    zero: bool

    @cached_property
    def plan(self) -> SwitchPlan:
        """The planned switch; made once."""
        return self._planned(self.zero)

    @cached_property
    def saved_bytes(self) -> int:
        """Bytes, of all ranks together, that need not have arrived before generation because the plan reads
        ZeRO shards."""
        if not self.zero:
            return 0
        gathered = self._planned(False)
        return sum(self.plan.gather_bytes.values()) + gathered.bytes_received - self.plan.bytes_received

    def _planned(self, zero: bool) -> SwitchPlan:
        return plan_switch(
            self.spec,
            self.source,
            self.destination,
            self.cluster,
            strategy=self.strategy,
            itemsize=self.itemsize,
            staging_bytes=self.staging_bytes,
            zero=zero,
        )

    def describe(self) -> dict[str, Any]:
        """JSON values for people and logs."""
        return {
            "from": _layout(self.source.layout),
            "to": _layout(self.destination.layout),
            "devices_per_node": self.cluster.devices_per_node,
            "strategy": self.strategy,
            "itemsize": self.itemsize,
            "staging_bytes": self.staging_bytes,
            "zero": self.zero,
        }


@dataclass(frozen=True)
class SharedPipeline:
    """Models that run one after another in a stage, and could share one pipeline.

    `fuse` is what was asked for; `obstacle` is why they cannot, None where they can.
    """

    models: tuple[ModelPlan, ...]
    fuse: bool | Literal["auto"]

    @property
    def roles(self) -> tuple[str, ...]:
        """In the order in which they run."""
        return tuple(model.role for model in self.models)

    @property
    def obstacle(self) -> str | None:
        """Why their placements forbid a shared pipeline."""
        return why_not_fused({model.role: model.placement for model in self.models})

    @property
    def may_share(self) -> bool:
        """Whether they may share a pipeline in this run."""
        return bool(self.fuse) and len(self.models) > 1 and self.obstacle is None

    def __str__(self) -> str:
        """For people: who runs, and how."""
        names = ", ".join(self.roles)
        if len(self.models) < 2:
            return names
        if self.fuse is False:
            return f"{names}: one after the other"
        if self.obstacle is not None:
            return f"{names}: one after the other, as {self.obstacle}"
        return f"{names}: {'in one pipeline if that is faster' if self.fuse == 'auto' else 'in one pipeline'}"

    def describe(self) -> dict[str, Any]:
        """JSON values for people and logs."""
        return {"roles": list(self.roles), "fuse": self.fuse, "obstacle": self.obstacle}


@dataclass(frozen=True)
class BatchPlan:
    """How much one iteration runs and how it is cut; counts are of sequences over all replicas unless they
    say otherwise. `prompt` and `response` are the most tokens of a sequence's parts."""

    iterations: int
    prompts: int
    samples: int
    minibatch: int
    epochs: int
    prompt: int
    response: int

    @property
    def sequences(self) -> int:
        """Of one iteration."""
        return self.prompts * self.samples

    @property
    def steps(self) -> int:
        """Optimizer steps of one iteration."""
        return self.epochs * (self.sequences // self.minibatch)

    @property
    def all_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.iterations * self.steps

    def describe(self) -> dict[str, Any]:
        """JSON values for people and logs."""
        return {
            "iterations": self.iterations,
            "prompts": self.prompts,
            "samples": self.samples,
            "sequences": self.sequences,
            "minibatch": self.minibatch,
            "optimizer_steps": self.steps,
            "most_tokens": self.prompt + self.response,
        }


def _layout(layout: Layout) -> dict[str, Any]:
    return {
        "tp": layout.tp,
        "pp": layout.pp,
        "dp": layout.dp,
        "stage_layers": list(layout.stage_layers),
    }
