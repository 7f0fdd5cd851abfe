"""`puzzle plan COMMAND`: plans without devices."""

from puzzle.cli import dispatch

PLANS = {
    "switch": "what a change of layout moves, from where to where",
    "predict": "what an iteration of a configuration takes, stage by stage",
    "search": "the layouts and options with which a configuration runs fastest",
    "compare": "what runs took beside what is predicted for them",
    "calibrate": "constants of the prediction from measured runs",
    "fuse": "which models share a pipeline, and what it saves",
}


def run(arguments: list[str]) -> int | None:
    """Run the plan asked for."""
    return dispatch("puzzle plan", PLANS, "puzzle.cli.plan_{}:run".format, arguments)
