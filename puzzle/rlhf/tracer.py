"""Iterations that are timed action by action, and what comes of it: traces, simulations, `auto`."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from puzzle.engine.runtime.stage_timer import StageClock
from puzzle.engine.runtime.tracing import Clock, gathered, stage_records
from puzzle.engine.runtime.world import World
from puzzle.plan.simulate.measured import measured_costs
from puzzle.rlhf.fusion import FusedPipeline
from puzzle.rlhf.recorder import Recorder
from puzzle.runlog.records import Simulation, Stage


class Tracer:
    """Times the actions of iterations to be traced, of the second one (the first warms up), and of the first
    in which models newly share a pipeline. Alike on every rank."""

    def __init__(
        self,
        world: World,
        traced: Collection[int],
        iterations: int,
        pipelines: Mapping[str, FusedPipeline],
    ) -> None:
        """`pipelines` by stage; `traced` are the iterations of which a timeline is written."""
        self.world, self.traced, self.iterations, self.pipelines = world, traced, iterations, pipelines
        self._ran = 0
        self._timed = False
        self._to_time = True
        self._known: set[str] = set()

    def start(self, iteration: int) -> None:
        """An iteration begins."""
        self._ran += 1
        warm = self._ran > 1 or iteration == self.iterations - 1
        self._timed = warm and self._to_time
        if self._timed or iteration in self.traced:
            self.world.clock = Clock(self.world.device)

    def read(self, iteration: int, watch: StageClock, recorder: Recorder) -> None:
        """It is over: log what was timed of it."""
        clock, self.world.clock = self.world.clock, None
        if clock is None:
            return
        if self._timed:
            found = stage_records(self.world, clock)
            recorder.write(*(Stage.from_json(one) for one in found if one["name"] not in self._known))
            self._known |= {fields["name"] for fields in found}
            fused = [self._simulate(clock, stage, iteration, recorder) for stage in self.pipelines]
            self._to_time = any(fused)
        if iteration in self.traced:
            rank = self.world.rank
            recorder.trace(iteration, gathered(self.world, [*watch.spans(rank), *clock.spans(rank)]))

    def _simulate(self, clock: Clock, stage: str, iteration: int, recorder: Recorder) -> bool:
        """Log what the costs of this iteration let expect of the stage, and choose where `auto` waits
        for it; whether models share a pipeline from now."""
        pipeline = self.pipelines[stage]
        if not pipeline.can_fuse or (pipeline.num_stages == 1 and not pipeline.undecided):
            return False
        spans = clock.passes(self.world.rank, f"{stage}.")
        placement = next(iter(pipeline.models.values())).placement
        stage_of = {rank: placement.coord_of(rank).p for rank in placement.ranks}
        tied = [name for name, model in pipeline.models.items() if model.spec.tied]
        cost = measured_costs(gathered(self.world, spans), stage_of, tied)
        recorder.write(Simulation(iteration, stage, pipeline.simulated(cost, stage == "training")))
        return pipeline.undecided and pipeline.decide(cost, stage == "training")
