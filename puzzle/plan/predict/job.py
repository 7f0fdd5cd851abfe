"""What a search lays out, and what it decides about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from puzzle.plan.activations import PARTS
from puzzle.plan.layout import Layout
from puzzle.plan.predict.iteration import Workload
from puzzle.spec.model import ModelSpec

IDEAS = ("switch", "fusion", "split", "recompute", "offload")
"""What a plan may do beside cutting models up: generate in another layout, share pipelines between models,
split backwards, compute forwards again, keep optimizer states on the host."""
Sizes = tuple[int, int, int]
"""tp, pp, dp."""


@dataclass(frozen=True)
class Role:
    """A model of the run. `offload`: its weights are on the host outside of inference; `borrowed`: they are
    another model's."""

    name: str
    spec: ModelSpec
    trained: bool
    offload: bool = False
    borrowed: bool = False


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be laid out on `ranks` devices of `memory` bytes, `per_node` on each machine.

    Attributes:
        roles: all models, the actor first; `trained` and `inferred` name those of the stages in their order.
        work: sequences, lengths and steps; its layouts and options are left to the search.
        layout: how a model is cut into (tp, pp, dp).
        fused, compiled, itemsize: as of `memory.Use`.
        staging: bytes that a switch may hold beside the weights it brings.
        without: of `IDEAS`, what no plan shall have.
        exact: whether the caller will plan the switch: then what a rank has of its weights is taken off.
        invariant: no number depends on layouts.
        keep: what graphs of generation read stays in all stages, whether or not it fits.
        numerics_parts: of its sums that tensor parallelism cuts; None: the largest tp of a plan.
    """

    roles: tuple[Role, ...]
    trained: tuple[str, ...]
    inferred: tuple[str, ...]
    work: Workload
    layout: Callable[[ModelSpec, Sizes], Layout]
    ranks: int
    per_node: int
    memory: int
    itemsize: int
    fused: bool
    compiled: bool
    staging: int
    exact: bool
    without: frozenset[str] = frozenset()
    keep: bool = False
    invariant: bool = False
    numerics_parts: int | None = None

    @property
    def actor(self) -> Role:
        """The model that generates."""
        return self.roles[0]

    def parts(self, *laid: Sizes) -> int | None:
        """Into which a run in these layouts cuts its sums, as `memory.Use` has it."""
        if not self.invariant:
            return None
        return self.numerics_parts or max(tp for tp, _, _ in laid)

    def parts_beside(self, laid: Sizes) -> set[int | None]:
        """All that a run may have of which one layout is `laid`."""
        return {self.parts(laid, (tp, 1, 1)) for tp in PARTS}

    def allows(self, laid: Sizes) -> bool:
        """Whether tensor ranks of a layout have whole parts of sums."""
        parts = self.parts(laid)
        return parts is None or (laid[0] in PARTS and parts % laid[0] == 0)


@dataclass(frozen=True)
class Choice:
    """What a plan decides. `microbatch` in sequences; `decode` None: a micro-batch per stage; `slots`: most
    sequences that a replica generates at a time, None: all of its own."""

    training: Sizes
    generation: Sizes
    microbatch: int
    fuse_training: bool = False
    fuse_inference: bool = False
    split: bool = False
    recompute: bool = False
    offload: bool = False
    decode: int | None = None
    slots: int | None = None

    @property
    def complexity(self) -> int:
        """How many things are not the default."""
        flags = (self.fuse_training, self.fuse_inference, self.split, self.recompute, 2 * self.offload)
        return (
            sum(flags)
            + (self.decode is not None)
            + (self.slots is not None)
            + 2 * (self.training != self.generation)
        )
