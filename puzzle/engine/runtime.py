"""One model of one process: its stage, its groups, its optimizer, and the passes that callers ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzle.engine.optimizer import BUCKET, AdamWSettings, ZeroAdamW
from puzzle.engine.runner import Runner
from puzzle.engine.stage import Finish, StageRun
from puzzle.engine.world import World
from puzzle.model.decoder import Decoder
from puzzle.model.packing import PackedBatch
from puzzle.model.parallel import TensorGroup
from puzzle.plan.check import check
from puzzle.plan.layout import Coord, Placement
from puzzle.plan.pipelines import forward_only, one_f_one_b
from puzzle.plan.schedule import Schedule
from puzzle.spec.model import ModelSpec


@dataclass(frozen=True)
class StageResult:
    """What a pass of batches gave: the schedule that ran, results per micro-batch (last stage alone).

    Without batches no schedule runs.
    """

    schedule: Schedule | None
    results: list[Tensor]


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
        allocate: bool = True,
    ) -> None:
        """Weights are zero until `model.hf` fills `decoder`; without `allocate` a switcher brings them.

        UserError if the layout does not fit.
        """
        placement.layout.check(spec)
        self.name, self.spec, self.placement, self.world = name, spec, placement, world
        self.coord: Coord = placement.coord_of(world.rank)
        tensor_ranks = placement.tp_group(self.coord)
        self.tensor = TensorGroup(world.groups(placement.groups("tp"), "tp"), tensor_ranks)
        device = world.device if allocate else torch.device("meta")
        self.stage = Decoder(spec, placement.layout, self.coord, self.tensor, dtype, device, recompute)
        self.stage.register_forward_hook(lambda *_: world.pulse.tick())
        self.runner = Runner(world, placement.pp_group(self.coord), placement.groups("pp"))
        self.optimizer: ZeroAdamW | None = None
        self.split_backward = False
        """Whether gradients of matrices are computed apart, where pipelines of several stages would idle."""
        self._schedules: dict[tuple[bool, bool, int], Schedule] = {}

    def attach_optimizer(self, settings: AdamWSettings, bucket: int = BUCKET) -> None:
        """Make the model trainable. Weights must be in place: the fp32 masters are copied from them."""
        params = [(s, self.stage.get_parameter(s.name)) for s in self.stage.storages]
        self.optimizer = ZeroAdamW(
            self.name, self.spec, self.placement, self.coord, params, self.world, settings, bucket
        )
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

    def infer(self, batches: Sequence[PackedBatch], finish: Finish) -> StageResult:
        """Forward passes without gradients; `finish` results on every rank of the last stage."""
        if not batches:
            return StageResult(None, [])
        schedule = self._schedule(False, len(batches))
        return self._run(schedule, StageRun(self.stage, batches, finish))

    def train(self, batches: Sequence[PackedBatch], finish: Finish) -> StageResult:
        """Forward and backward passes under 1F1B, then an optimizer step.

        `finish` gives losses whose sum over micro-batches and replicas is the minibatch's loss.
        """
        schedule = self._schedule(True, len(batches))
        return self._run(schedule, StageRun(self.stage, batches, finish, self.optimizer))

    def _schedule(self, train: bool, microbatches: int) -> Schedule:
        """1F1B or forwards alone; checked when it is made, kept for the next time."""
        key = (train, self.split_backward, microbatches)
        if key not in self._schedules:
            stages = self.placement.layout.pp
            if train:
                tied = self.spec.tied and stages > 1
                made = one_f_one_b(
                    stages, microbatches, self.name, optimizer=True, tied=tied, split=self.split_backward
                )
            else:
                made = forward_only(stages, microbatches, self.name)
            if broken := check(made):
                raise RuntimeError(f"{made.name} of {self.name}: {'; '.join(broken)}")
            self._schedules[key] = made
        return self._schedules[key]

    def _run(self, schedule: Schedule, stage: StageRun) -> StageResult:
        self.runner.run(schedule, {self.name: stage})
        return StageResult(schedule, [r for r in stage.results if r is not None])

    def collect(self, local_RS: Tensor | None, rows: range, shape: tuple[int, ...]) -> Tensor:
        """Every replica's rows of a global tensor on every rank of the run.

        `local_RS` are this replica's rows `rows` of a tensor of `shape`; the rank that speaks for it counts.
        """
        dtype = torch.float32 if local_RS is None or local_RS.is_floating_point() else torch.int64
        whole = torch.zeros(shape, dtype=dtype, device=self.world.device)
        if local_RS is not None and self.owns_results:
            whole[rows.start : rows.stop] = local_RS.to(dtype)
        return self.world.sum(whole)


def share(count: int, parts: int, index: int) -> range:
    """Contiguous share `index` of `count` rows in `parts`; the first ones take the remainder."""
    size, rest = divmod(count, parts)
    start = index * size + min(index, rest)
    return range(start, start + size + (index < rest))
