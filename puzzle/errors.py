"""The one exception that means: the user can mend this; and how a command ends."""

import contextlib
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Literal

LONGEST_LINE = 1000
"""Characters of an error line; a longer one, which quotes something huge, loses its middle."""
TERMINATED = 128 + signal.SIGTERM


# How torch says it, of a CPU and of a device.
_NO_MEMORY = re.compile(r"can't allocate memory|out of memory")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class UserError(Exception):
    """One line for people: what is wrong, where, and how to mend it. The command line exits with code 2."""


def describe(error: OSError) -> str:
    """An error of the operating system (full disk, no permission, no such file) in one line."""
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}"


OURS = ("puzzle", "dschat", "tests")
# By the name of a module: the tier of env.sh that holds it, and its name for pip where that is another.
TIERS = {
    **dict.fromkeys(("numpy", "pandas", "matplotlib"), "plot"),
    **dict.fromkeys(("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub"), "engine"),
    **dict.fromkeys(
        ("jinja2", "markupsafe", "pydantic", "pydantic_core", "yaml", "scipy", "rich"),
        "engine",
    ),
    **dict.fromkeys(("accelerate", "tensorboard", "gguf", "sentencepiece", "google", "datasets"), "engine"),
    **dict.fromkeys(
        ("vaderSentiment", "ray", "triton", "requests", "urllib3", "dill", "argcomplete"), "engine"
    ),
    "deepspeed": "baseline",
    **dict.fromkeys(("pytest", "hypothesis"), "dev"),
}
PACKAGES = {
    "yaml": "pyyaml",
    "google": "protobuf",
    "math_verify": "math-verify",
    "reasoning_gym": "reasoning-gym",
}
PROJECT = "puzzle-rlhf"
"""What the installed package is called."""
# By the name of a module: the extra of the installed package that holds it.
EXTRAS = {
    **dict.fromkeys(("pandas", "matplotlib"), "plot"),
    **dict.fromkeys(("gguf", "sentencepiece", "google", "datasets", "pyarrow"), "formats"),
    **dict.fromkeys(("requests", "urllib3", "vaderSentiment"), "rewards"),
    **dict.fromkeys(("math_verify", "reasoning_gym"), "verifiers"),
    **dict.fromkeys(("accelerate", "tensorboard"), "trackers"),
    **{name: name for name in ("wandb", "mlflow", "trackio")},
    "argcomplete": "completion",
    "ray": "ray",
    "deepspeed": "deepspeed",
}


def absent(error: ModuleNotFoundError) -> str | None:
    """What to install, in one line, where `error` is for want of a package; None where a module is ours."""
    module = (error.name or "").partition(".")[0]
    if not module or module in OURS or module in sys.stdlib_module_names:
        return None
    return lacking(module)


def lacking(module: str) -> str:
    """What to install, in one line, where a module is missing: a tier of env.sh in a checkout, else an extra
    of the installed package, else the package itself."""
    package, extra = PACKAGES.get(module, module), EXTRAS.get(module)
    checkout = (Path(__file__).resolve().parents[1] / "env.sh").is_file()
    if extra is None or checkout:
        how = f"install it: {sys.executable} -m pip install {package}"
    else:
        how = f"it is of the extra {extra}: {sys.executable} -m pip install '{PROJECT}[{extra}]'"
    if checkout and module in TIERS and "PUZZLE_PYTHON" not in os.environ:
        how = f"it is in the tier {TIERS[module]}: PUZZLE_ENV={TIERS[module]} . ./env.sh, or {how}"
    elif checkout and extra is not None:
        how = f"it is of the extra {extra}; {how}"
    return f"the package {package} is not installed; {how}"


def fetching(path: Path, kind: Literal["model", "dataset"] = "model") -> str:
    """How to get what `path` seems to name on the Hugging Face Hub; nothing for a path that is one."""
    if not _HUB_NAME.fullmatch(str(path)) or path.parent.exists():
        return ""
    option = "" if kind == "model" else " --repo-type dataset"
    what = "that folder" if kind == "model" else "a file of that folder"
    command = f"hf download {path}{option} --local-dir {path.name}"
    return f"; fetch it where there is a network, by {command}, and give {what}"


def out_of_memory(error: BaseException) -> str | None:
    """What to say of an error that means too little memory, on the host or a device; None for others."""
    text = str(error).strip().splitlines()
    if not isinstance(error, MemoryError) and not (
        isinstance(error, RuntimeError) and text and _NO_MEMORY.search(text[0])
    ):
        return None
    return f"not enough memory{f' ({text[0]})' if text else ''}; ask for fewer or smaller things at a time"


def one_line(text: str) -> str:
    """`text` without line ends or what a terminal would obey, and not longer than LONGEST_LINE."""
    line = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
    if len(line) <= LONGEST_LINE:
        return line
    return f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"


def print_anything() -> None:
    """Let stdout and stderr print characters that the terminal's encoding lacks, as backslash escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def terminate_as_exit() -> Generator[None]:
    """SIGTERM (a scheduler's cancel) unwinds like an exception: workers and logs are ended properly."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def leave(number: int, _frame: object) -> None:
    """Handles SIGTERM: as an exception, so that what was begun is ended."""
    sys.exit(128 + number)


def say_signals() -> None:
    """From the first line of a program on, while it still imports: SIGINT and SIGTERM end it in one line."""
    signal.signal(signal.SIGINT, _end)
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, _frame: object) -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print("interrupted" if number == signal.SIGINT else "terminated", file=sys.stderr, flush=True)
    sys.exit(128 + number)


def exit_code(command: Callable[[], int | None]) -> int:
    """Runs a command and says in one line why it failed.

    Gives back its own code (None: 0), 2 after a user error, 130 interrupted, 141 no one reads on, 143 ended
    by SIGTERM.
    """
    print_anything()
    try:
        with terminate_as_exit():
            code = command() or 0
            if sys.stdout is not None:
                sys.stdout.flush()  # what cannot be written is known here, not when the interpreter ends
            return code
    except UserError as error:
        code, message = 2, f"error: {error}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except SystemExit as end:
        if end.code != TERMINATED:
            raise
        code, message = TERMINATED, "terminated"
    except BrokenPipeError:
        code, message = 141, ""
    except ModuleNotFoundError as error:
        if (lacking := absent(error)) is None:
            raise
        code, message = 2, f"error: {lacking}"
    except OSError as error:
        if error.errno is None:
            raise
        code, message = 2, f"error: {describe(error)}"
    except (MemoryError, RuntimeError) as error:
        if (lack := out_of_memory(error)) is None:
            raise
        code, message = 2, f"error: {lack}"
    _drop_output()
    if message and sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(one_line(message), file=sys.stderr, flush=True)
    return code


def _drop_output() -> None:
    """Write what stdout still holds; what nobody reads, or no disk has room for, must not be tried again."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
