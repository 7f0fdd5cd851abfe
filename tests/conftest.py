"""Options and profiles of the whole test suite."""

import os
import shutil
import signal

# Several processes share few cores; set before anything imports torch or numpy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test asks the Hugging Face Hub, whatever network there is; some have a hub of their own.
os.environ["HF_HUB_OFFLINE"] = "1"
if shutil.which("nvidia-smi") is None:
    # Triton reads it when it is first imported, by whatever test comes first: its kernels run on CPUs then.
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import settings

# A shell's background jobs ignore Ctrl-C, and so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("local", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked `long` too")
    parser.addoption("--slurm", action="store_true", help="run the tests under Slurm, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    absent = [name for name in ("long", "slurm") if not config.getoption(f"--{name}")]
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in absent)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
