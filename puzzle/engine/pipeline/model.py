"""One model of one process: its stage, its groups, its optimizer. `Pipeline` runs it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from puzzle.engine.pipeline.executor import Executor
from puzzle.engine.runtime.world import World
from puzzle.engine.train.zero_adamw import AdamWSettings, ZeroAdamW
from puzzle.model.decoder import Decoder
from puzzle.model.numerics import Invariant
from puzzle.model.parallel import TensorGroup
from puzzle.plan.layout import Coord, Placement
from puzzle.plan.memory import BUCKET
from puzzle.spec.model import ModelSpec


class ModelRuntime:
    """A model under a placement. All ranks of the placement make the same calls in the same order."""

    def __init__(
        self,
        name: str,
        spec: ModelSpec,
        placement: Placement,
        world: World,
        dtype: torch.dtype = torch.float32,
        recompute: bool = False,
        *,
        parts: int | None = None,
        allocate: bool = True,
    ) -> None:
        """Weights are zero until `model.hf` fills `decoder`; without `allocate` a switcher brings them.
        `parts` as `Decoder` takes them.

        UserError if the layout does not fit.
        """
        placement.layout.check(spec)
        self.name, self.spec, self.placement, self.world = name, spec, placement, world
        self.coord: Coord = placement.coord_of(world.rank)
        tensor_ranks = placement.tp_group(self.coord)
        self.tensor = TensorGroup(world.groups(placement.groups("tp"), "tp"), tensor_ranks)
        device = world.device if allocate else torch.device("meta")
        self.stage = Decoder(spec, placement.layout, self.coord, self.tensor, dtype, device, recompute, parts)
        self.stage.register_forward_hook(lambda *_: world.progress.tick())
        self.executor = Executor(world, placement.pp_group(self.coord), placement.groups("pp"))
        self.optimizer: ZeroAdamW | None = None
        self.split_backward = False
        """Whether gradients of matrices are computed apart, where pipelines of several stages would idle."""

    def attach_optimizer(self, settings: AdamWSettings, bucket: int = BUCKET) -> None:
        """Make the model trainable. Weights must be in place: the fp32 masters are copied from them.

        Frozen storages get neither gradients nor states.
        """
        for storage in self.stage.storages:
            self.stage.get_parameter(storage.name).requires_grad_(storage.trained)
        params = [(s, self.stage.get_parameter(s.name)) for s in self.stage.storages if s.trained]
        placed = (self.name, self.spec, self.placement, self.coord)
        exact = isinstance(self.stage.numerics, Invariant)
        self.optimizer = ZeroAdamW(*placed, params, self.world, settings, bucket, exact)
        self.optimizer.arrive_before(self.stage)

    @property
    def decoder(self) -> Decoder:
        """The stage with all its weights in place; passes run `stage`, whose layers await theirs by turns."""
        if self.optimizer is not None:
            self.optimizer.wait_gather()
        return self.stage

    def freeze(self) -> None:
        """No gradients for this model."""
        self.stage.requires_grad_(False)

    @property
    def owns_results(self) -> bool:
        """Whether this rank speaks for its replica: tensor rank 0 of the last stage."""
        return self.stage.last and self.coord.t == 0

    def rows(self, count: int) -> range:
        """This replica's share of `count` rows of a global batch: contiguous, sizes differ by one at most."""
        return share(count, self.placement.layout.dp, self.coord.d)

    def collect(self, local_RS: Tensor | None, rows: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """Every replica's rows of a global tensor on every rank of the run.

        `local_RS` are this replica's rows `rows` of a tensor of `shape`; the rank that speaks for it counts.
        """
        dtype = torch.float32 if local_RS is None or local_RS.is_floating_point() else torch.int64
        whole = torch.zeros(shape, dtype=dtype, device=self.world.device)
        if local_RS is not None and self.owns_results:
            whole[torch.tensor(rows, dtype=torch.int64, device=whole.device)] = local_RS.to(
                whole.device, dtype
            )
        return self.world.sum(whole)


def borrower(name: str, spec: ModelSpec, owner: ModelRuntime) -> ModelRuntime:
    """A model of `spec` in the placement of `owner`, whose weights, among others, are its own: no copies."""
    stage = owner.stage
    made = ModelRuntime(name, spec, owner.placement, owner.world, stage.dtype, allocate=False)
    for storage in made.stage.storages:
        path, _, leaf = storage.name.rpartition(".")
        made.stage.get_submodule(path).register_parameter(leaf, stage.get_parameter(storage.name))
    made.stage.freq, made.stage.pointwise = stage.freq, stage.pointwise
    return made


def share(count: int, parts: int, index: int) -> range:
    """Contiguous share `index` of `count` rows in `parts`; the first ones take the remainder."""
    size, rest = divmod(count, parts)
    start = index * size + min(index, rest)
    return range(start, start + size + (index < rest))
