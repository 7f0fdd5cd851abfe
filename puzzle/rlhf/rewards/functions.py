"""Rewards that are Python functions of texts. Rewards of models are forwards of the engine.

The function and its module are a user's code: whatever they do ends in one line that names them.
"""

import dis
import importlib
import importlib.util
import inspect
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from puzzle.config.run import TrainConfig
from puzzle.errors import UserError
from puzzle.launch import fork_server
from puzzle.launch.local import SAFE_PATH, environment
from puzzle.rlhf.patience import Patience, end, patience, raised_at, user_line
from puzzle.rlhf.rewards.batch import RewardBatch
from puzzle.rlhf.rewards.scores import checked_scores
from puzzle.rlhf.rewards.signature import Parameters, parameters

OURS = "puzzle."
"""Functions of this project need no process of their own."""


class FunctionReward:
    """A Python function of responses that gives one finite number for each."""

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

    def __call__(self, batch: RewardBatch) -> list[float]:
        """Scores, one per response.

        UserError naming the function when it raises (with its line), gives nonsense (with the response), or
        takes longer than is allowed.
        """
        with patience(self.what, self.allowed), _users_code(self.what):
            values, named = self.parameters.arguments(batch)
            return checked_scores(self.what, self.function(*values, **named), batch.responses)


def reward_patience(config: TrainConfig) -> Patience:
    """How long a call of the reward function may take, and when the run begins to speak of it."""
    return Patience(config.reward.timeout, config.launch.watchdog)


def reward_function(config: TrainConfig, give_up: Callable[[str], None] = end) -> FunctionReward | None:
    """The run's reward function, imported; None where the reward is a model. UserError for what it lacks.

    `give_up` is called with a line when it does not let itself be ended after `reward.timeout`.
    """
    if config.reward.function is None:
        return None
    return FunctionReward(config.reward.function, replace(reward_patience(config), give_up=give_up))


def runs_users_code(config: TrainConfig) -> bool:
    """Whether the run calls a function that is not this project's."""
    return config.reward.function is not None and not config.reward.function.startswith(OURS)


def probe(name: str, allowed: Patience) -> Parameters:
    """What a function takes; raises the UserError that making a FunctionReward would.

    The import of a user's module happens in a process of its own, for it may end its process.
    """
    if name.startswith(OURS):
        return FunctionReward(name).parameters
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    given = os.environ.get(SAFE_PATH)
    process = context.Process(target=_probe, args=(name, send, given), daemon=True)
    with environment(
        {SAFE_PATH: "1"}
    ):  # it is `python -c`, which would find modules in the working folder first
        process.start()
    fork_server.end_at_exit()
    send.close()
    try:
        with patience(f"reward.function {name}: its import", allowed):
            found = receive.recv()
    except EOFError:
        process.join()
        found = f"reward.function {name}: its import ended the process with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    if isinstance(found, str):
        raise UserError(found)
    return found


def _probe(name: str, send: Connection, safe_path: str | None) -> None:
    if safe_path is None:
        os.environ.pop(SAFE_PATH, None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asked ends this process
    try:
        send.send(FunctionReward(name).parameters)
    except UserError as error:
        send.send(str(error))


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
            os.dup2(kept[number], number)
        for name, stream in streams.items():
            if getattr(stream, "closed", False):
                number = 1 if name == "stdout" else 2
                setattr(sys, name, open(number, "w", errors="backslashreplace", closefd=False))  # noqa: SIM115
                closed.append(number)
        for copy in kept.values():
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
