"""Costs of machines that nobody measured."""

from collections.abc import Iterable

from puzzle.plan.pipeline.actions import COLLECTIVES, COMPUTE, Op, Payload
from puzzle.plan.simulate.cost import CostTable


def uniform(models: Iterable[str], forward: float = 1.0, backward: float = 1.0, **others: float) -> CostTable:
    """Equal stages and equal models; what is not named (transfers, optimizer) is free, but the parts of a
    split backward are unknown."""
    free = {str(what): 0.0 for what in (*COMPUTE, *COLLECTIVES, *Payload)}
    assert others.keys() <= free.keys()
    unsplit = {what: 0.0 for what in free if what not in (Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)}
    costs = {**unsplit, "forward": forward, "backward": backward, **others}
    return CostTable(dict.fromkeys(models, costs))
