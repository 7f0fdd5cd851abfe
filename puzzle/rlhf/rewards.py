"""Rewards that are Python functions of texts. Rewards of models are forwards of the engine.

The function and its module are a user's code: whatever they do ends in one line that names them.
"""

import dis
import importlib
import inspect
import math
import multiprocessing
import numbers
import os
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from types import CodeType
from typing import Any

from puzzle.config.run import TrainConfig
from puzzle.errors import UserError
from puzzle.launch import fork_server
from puzzle.launch.local import SAFE_PATH, environment
from puzzle.rlhf.patience import Patience, end, patience, raised_at, user_line

OURS = "puzzle."
"""Functions of this project need no process of their own."""
LARGEST = (2 - 2**-23) * 2.0**127
"""Of float32, in which scores go on."""


class FunctionReward:
    """`module:name`, called with lists of prompts and responses; gives one finite number per response."""

    def __init__(self, name: str, allowed: Patience = Patience()) -> None:  # noqa: B008 - frozen
        """Import the function, also from the working directory.

        UserError if there is none, or if it cannot be called with two lists.
        """
        self.name, self.allowed = name, allowed
        self.function = _load(name)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Scores, one per response.

        UserError naming the function when it raises (with its line), gives nonsense (with the response), or
        takes longer than is allowed.
        """
        what = f"reward.function {self.name}"
        with patience(what, self.allowed), _users_code(what):
            given = self.function(list(prompts), list(responses))
            return self._numbers(given, responses)

    def _numbers(self, given: Any, responses: Sequence[str]) -> list[float]:
        scores = given
        if not isinstance(given, (list, tuple)) and callable(getattr(given, "tolist", None)):
            scores = given.tolist()  # an array or a tensor
        if not isinstance(scores, (list, tuple)):
            raise UserError(
                f"reward.function {self.name} gave {_shown(given)}; return a list of one number per response"
            )
        if len(scores) != len(responses):
            raise UserError(
                f"reward.function {self.name} gave {len(scores)} scores for {len(responses)} responses"
            )
        return [self._number(scores[row], row, responses) for row in range(len(responses))]

    def _number(self, score: Any, row: int, responses: Sequence[str]) -> float:
        number = _as_float(score)
        if abs(number) <= LARGEST:
            return number
        why = "" if not math.isfinite(number) else f"; float32 ends at {LARGEST:.2g}, scale or clip it"
        raise UserError(
            f"reward.function {self.name} gave {_shown(score)} for the response {_shown(responses[row])}"
            f" ({row + 1} of {len(responses)}){why}"
        )


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


def probe(name: str, allowed: Patience) -> None:
    """Raises the UserError that making a FunctionReward would.

    The import of a user's module happens in a process of its own, for it may end its process.
    """
    if name.startswith(OURS):
        FunctionReward(name)
        return
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
    if found is not None:
        raise UserError(found)


def _probe(name: str, send: Connection, safe_path: str | None) -> None:
    if safe_path is None:
        os.environ.pop(SAFE_PATH, None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asked ends this process
    try:
        FunctionReward(name)
    except UserError as error:
        send.send(str(error))
    else:
        send.send(None)


def _load(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UserError(f"reward.function {name!r}: expected module:name")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    with _users_code(f"reward.function {name}: its import"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise
            raise UserError(
                f"reward.function {name}: {error}; it is looked for in {here} and among installed packages"
            ) from None
        function = getattr(module, attribute, None)
    if not callable(function) or inspect.isclass(function):
        raise UserError(f"reward.function {name}: {module_name} has no function {attribute}")
    _check_signature(name, function)
    return function


def _check_signature(name: str, function: Callable[..., Any]) -> None:
    code = getattr(inspect.unwrap(function), "__code__", None)
    place = user_line([(code, code.co_firstlineno)]) if code is not None else ""
    where = f"reward.function {name}{f' ({place})' if place else ''}"
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise UserError(f"{where} is async; make it a plain function that returns a list")
    if inspect.isgeneratorfunction(function):
        raise UserError(f"{where} yields its scores; return a list of them")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # some functions written in C have none
    try:
        signature.bind([], [])
    except TypeError as error:
        raise UserError(
            f"{where} takes {signature}, but is called with two lists, (prompts, responses): {error}"
        ) from None


@contextmanager
def _users_code(what: str) -> Generator[None]:
    """Whatever the block raises becomes a UserError that begins with `what` and names the raising line; not
    what a handler of this process's signals raised in it."""
    try:
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


def _as_float(score: Any) -> float:
    """NaN for what is no real number; texts are none, whatever they spell."""
    if isinstance(score, (str, bytes, bytearray)):
        return math.nan
    if isinstance(score, numbers.Complex) and not isinstance(score, numbers.Real):
        return math.nan
    try:
        return float(score)
    except Exception:  # noqa: BLE001 - a user's object: the caller shows it
        return math.nan


def _shown(value: Any, most: int = 40) -> str:
    """What a user's value looks like, in few characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 - integers of thousands of digits, objects of users
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= most else text[: most - 3] + "..."


def _said(error: BaseException, most: int = 300) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - a user's exception
        text = ""
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return said if len(said) <= most else said[: most - 3] + "..."


def letter_share(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Share of a response that is ASCII letters or spaces; what a model of bytes learns."""
    counts = [sum(c == " " or (c.isascii() and c.isalpha()) for c in response) for response in responses]
    return [count / max(1, len(response)) for count, response in zip(counts, responses, strict=True)]


def vader_sentiment(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Sentiment of each response alone, from -1 to 1: VADER's compound score (Hutto & Gilbert 2014)."""
    return [_analyzer().polarity_scores(response)["compound"] for response in responses]


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError("vader_sentiment needs the package vaderSentiment") from None
    return SentimentIntensityAnalyzer()
