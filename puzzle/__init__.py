"""PUZZLE: RLHF with light-weight context switches.

From Python: `puzzle.run` trains, `puzzle.load_run` reads what a run wrote, `puzzle.plan_switch` plans a
change of layout (docs/python.md). They are loaded when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from puzzle.api import RunError, RunFolder, UserError, load_run, plan_switch, run

__version__ = "0.1.0"
__all__ = ["RunError", "RunFolder", "UserError", "__version__", "load_run", "plan_switch", "run"]


def __getattr__(name: str) -> Any:
    """A name of `puzzle.api`, loaded when it is first asked for. UserError where a package is missing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from puzzle import api
    except ModuleNotFoundError as error:
        from puzzle.errors import UserError, absent

        if (line := absent(error)) is None:
            raise
        raise UserError(line) from None
    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
