"""What a switch between even layouts leaves where it is."""

from __future__ import annotations

from puzzle.plan.layout import Layout


def local_share(source: Layout, destination: Layout) -> float:
    """The part of the destination's weights that its ranks have before the switch, as `plan_switch` chooses
    their roles.

    A rank of the source holds 1 / (tp pp) of the model, and of that the destination gives it what lies in one
    of its 1 / (max(tp) max(pp)) cells; it needs 1 / (tp pp) of the destination. Exact up to norms, which are
    whole on every tensor rank, if of both tp and of both pp one divides the other, all stages are equal and
    replicas do not compete for one source rank.
    """
    cells = max(source.tp, destination.tp) * max(source.pp, destination.pp)
    return destination.tp * destination.pp / cells
