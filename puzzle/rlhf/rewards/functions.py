"""Rewards that are Python functions, called in this process.

The function and its module are a user's code: whatever they do ends in one line that names them.
"""

import dis
import importlib
import importlib.util
import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from puzzle.errors import UserError
from puzzle.rlhf.patience import Patience, patience, raised_at, user_line
from puzzle.rlhf.rewards.batch import RewardBatch
from puzzle.rlhf.rewards.scores import checked_scores, shown
from puzzle.rlhf.rewards.signature import parameters


class FunctionReward:
    """A Python function of responses that gives one finite number for each."""

    each = False

    def __init__(
        self,
        name: str,
        allowed: Patience = Patience(),  # noqa: B008 - frozen
        function: Callable[..., Any] | None = None,
    ) -> None:
        """Import the function `name`, `module:function` or `path/file.py:function`, also from the working
        directory, or take the one that is given.

        UserError if there is none, or if it is none that returns a list.
        """
        self.name, self.allowed = name, allowed
        self.what = f"reward.function {name}"
        self.function = _load(name) if function is None else function
        place = _check(self.what, self.function)
        self.parameters = parameters(self.what, self.function, place)

    def columns(self, names: Collection[str], source: str) -> list[str]:
        """Which columns of a source it reads; UserError for a parameter that is none."""
        return self.parameters.columns(names, source)

    def score(self, batch: RewardBatch, first: int = 0, of: int = 0) -> list[float]:
        """Scores, one per response; of a batch of `of` (0: this one) these begin at number `first`.

        UserError naming the function when it raises (with its line) or gives nonsense (with the response),
        TookTooLong when it takes longer than is allowed.
        """
        what = self.what
        if of and len(batch) == 1:
            what += f" at response {first + 1} of {of} ({shown(batch.responses[0])})"
        with patience(what, self.allowed), _users_code(what):
            values, named = self.parameters.arguments(batch)
            return checked_scores(self.what, self.function(*values, **named), batch.responses, first, of)

    def close(self) -> None:
        """Nothing is held."""


def _load(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.rpartition(":")
    if not module_name or not attribute:
        raise UserError(f"reward.function {name!r}: expected module:name or path/file.py:name")
    if module_name.endswith(".py"):
        module = _file(name, Path(module_name))
    else:
        module = _module(name, module_name)
    with _users_code(f"reward.function {name}: its import"):
        function = getattr(module, attribute, None)
    if not callable(function) or inspect.isclass(function):
        raise UserError(f"reward.function {name}: {module_name} has no function {attribute}")
    return function


def _module(name: str, module_name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    with _users_code(f"reward.function {name}: its import"):
        try:
            return importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise
            raise UserError(
                f"reward.function {name}: {error}; it is looked for in {here} and among installed packages"
            ) from None


def _file(name: str, path: Path) -> ModuleType:
    """The module in a file, which finds its neighbours as a script does, but last."""
    path = path.absolute()
    if not path.is_file():
        raise UserError(f"reward.function {name}: {path}: no such file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"reward function of {path}", path)
    assert spec is not None, "it ends in .py"
    assert spec.loader is not None, "it ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as dataclasses and pickle need it
    with _users_code(f"reward.function {name}: its import"):
        spec.loader.exec_module(module)
    return module


def _check(what: str, function: Callable[..., Any]) -> str:
    """file:line of a function; UserError for one that returns no list."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    place = user_line([(code, code.co_firstlineno)]) if code is not None else ""
    where = f"{what}{place and f' ({place})'}"
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise UserError(f"{where} is async; make it a plain function that returns a list")
    if inspect.isgeneratorfunction(function):
        raise UserError(f"{where} yields its scores; return a list of them")
    return place


@contextmanager
def _users_code(what: str) -> Generator[None]:
    """Whatever the block raises becomes a UserError that begins with `what` and names the raising line; not
    what a handler of this process's signals raised in it. It leaves open what is printed to."""
    try:
        with _streams_kept(what):
            yield
    except UserError:
        raise
    except BaseException as error:
        frames = raised_at(error.__traceback__)
        if _by_signal(error, frames):
            raise
        code, line = frames[-1]
        place = user_line(frames) or f"{code.co_filename}:{line}"
        if isinstance(error, SyntaxError) and error.filename is not None:
            place = f"{error.filename}:{error.lineno}"
        said = _said(error)
        traceback.clear_frames(error.__traceback__)  # what they hold, such as too many open files, goes now
        raise UserError(f"{what} raised {said} ({place})") from error


@contextmanager
def _streams_kept(what: str) -> Generator[None]:
    """UserError naming `what` if the block closes standard output or error, which are there again for what is
    still to be said: the next file that is opened would get their number, and all that is printed."""
    kept = {number: os.dup(number) for number in (1, 2) if _is_open(number)}
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    try:
        yield
    finally:
        closed = [number for number in kept if not _is_open(number)]
        for number in closed:
            with suppress(OSError):  # who closes everything has closed the copy, too
                os.dup2(kept[number], number)
        for name, stream in streams.items():
            if getattr(stream, "closed", False):
                number = 1 if name == "stdout" else 2
                setattr(sys, name, open(number, "w", errors="backslashreplace", closefd=False))  # noqa: SIM115
                closed.append(number)
        for copy in kept.values():
            with suppress(OSError):
                os.close(copy)
        if closed:
            names = " and ".join({1: "standard output", 2: "standard error"}[n] for n in sorted(set(closed)))
            raise UserError(f"{what} closed {names} of its process; leave it open")


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _by_signal(error: BaseException, frames: Sequence[tuple[CodeType, int]]) -> bool:
    """Whether an exception comes from the handler of a signal, which ran between two lines of the block."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    if any(getattr(handler, "__code__", None) is frames[-1][0] for handler in handlers):
        return True
    if not isinstance(error, KeyboardInterrupt) or signal.default_int_handler not in handlers:
        return False
    # Python's own handler of Ctrl-C leaves no frame; a `raise` in the code is known by its instruction.
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is None or dis.opname[frames[-1][0].co_code[trace.tb_lasti]] != "RAISE_VARARGS"


def _said(error: BaseException, most: int = 300) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - a user's exception
        text = ""
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return said if len(said) <= most else said[: most - 3] + "..."
