"""`puzzle plan WHAT`: plans without devices."""

from __future__ import annotations

from importlib import import_module

from puzzle.errors import UserError

# Each module `puzzle.cli.plan_WHAT` has `run(arguments: list[str]) -> int | None`.
PLANS = {
    "switch": "what a change of layout moves, from where to where",
    "fuse": "which models share a pipeline, and what it saves",
}


def run(arguments: list[str]) -> int | None:
    """Dispatch to the plan asked for."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<10} {text}" for name, text in PLANS.items()]
        print(
            "\n".join(["usage: puzzle plan WHAT ...", "", *lines, "", "puzzle plan WHAT --help says more."])
        )
        return 0 if arguments else 2
    if arguments[0] not in PLANS:
        raise UserError(f"plan {arguments[0]}: there are {', '.join(PLANS)}")
    return import_module(f"puzzle.cli.plan_{arguments[0]}").run(arguments[1:])
