"""`puzzle plan COMMAND`: plans without devices."""

from puzzle.cli import dispatch

PLANS = {
    "switch": "what a change of layout moves, from where to where",
    "fuse": "which models share a pipeline, and what it saves",
}


def run(arguments: list[str]) -> int | None:
    """Run the plan asked for."""
    return dispatch("puzzle plan", PLANS, "puzzle.cli.plan_{}:run".format, arguments)
