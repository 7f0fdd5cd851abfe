"""The one exception that means: the user can mend this; and how a command ends."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """One line for people: what is wrong, where, and how to mend it. The command line exits with code 2."""


def describe(error: OSError) -> str:
    """An error of the operating system (full disk, no permission, no such file) in one line."""
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}"


OURS = ("puzzle", "plotting", "dschat", "tests")
# By the name of a module: the tier of env.sh that holds it, and its name for pip where that is another.
TIERS = {
    **dict.fromkeys(("numpy", "pandas", "matplotlib"), "plot"),
    **dict.fromkeys(("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub"), "engine"),
    **dict.fromkeys(("pydantic", "pydantic_core", "pydantic_settings", "yaml", "scipy", "rich"), "engine"),
    **dict.fromkeys(("tensorboard", "gguf", "sentencepiece", "google", "datasets"), "engine"),
    **dict.fromkeys(("vaderSentiment", "ray", "triton"), "engine"),
    "deepspeed": "baseline",
    **dict.fromkeys(("pytest", "hypothesis"), "dev"),
}
PACKAGES = {"yaml": "pyyaml", "google": "protobuf", "pydantic_settings": "pydantic-settings"}


def absent(error: ModuleNotFoundError) -> str | None:
    """What to install, in one line, where `error` is for want of a package; None where a module is ours."""
    module = (error.name or "").partition(".")[0]
    if not module or module in OURS or module in sys.stdlib_module_names:
        return None
    package = PACKAGES.get(module, module)
    how = f"install it: {sys.executable} -m pip install {package}"
    if module in TIERS and "PUZZLE_PYTHON" not in os.environ:
        how = f"it is in the tier {TIERS[module]}: PUZZLE_ENV={TIERS[module]} . ./env.sh, or {how}"
    return f"the package {package} is not installed; {how}"


def exit_code(command: Callable[[], int | None]) -> int:
    """Runs a command. Its own code (None: 0), 2 after a user error, 130 interrupted, 141 no one reads on."""
    try:
        return command() or 0
    except UserError as error:
        message = " ".join(str(error).split())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output left, as in `... | head`; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        lacking = absent(error)
        if lacking is None:
            raise
        message = lacking
    except OSError as error:
        if error.errno is None:
            raise
        message = describe(error)
    print(f"error: {message.encode('utf-8', 'backslashreplace').decode()}", file=sys.stderr)
    return 2
