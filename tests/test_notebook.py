"""`puzzle.run` in a notebook's kernel: functions of cells, several processes, errors that a cell shows."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.test_api import CONFIG

pytest.importorskip("ipykernel")
start_new_kernel: Any = pytest.importorskip("jupyter_client.manager").start_new_kernel
ROOT = Path(__file__).resolve().parents[1]
# A function may use what other cells defined, and cells may define it anew.
RUN = """
seen = []
run = puzzle.run(config, "out/two", reward=brief, on_iteration=lambda one: seen.append(one.iteration),
                 overrides={"layout.dp": 2})
print("told", seen, len(run.iterations), run.log.layouts["training"]["dp"])
most = 9.5
again = puzzle.run(config, "out/again", reward=brief, overrides={"iterations": 1})
print("differ by", round(again.iterations["reward"][0] - run.iterations["reward"][0], 6))
"""


@contextmanager
def kernel(folder: Path) -> Generator[Any]:
    """A client of a kernel that stands in `folder`; what Jupyter keeps is kept there, too."""
    own = ("HOME", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **dict.fromkeys(own, str(folder / "home")), "PYTHONPATH": path}
    del environment["PYTEST_CURRENT_TEST"]  # with it a kernel leaves what processes print to the terminal
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(folder), env=environment)
    try:
        yield client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def cell(client: Any, code: str) -> tuple[str, list[str]]:
    """Runs a cell: `ok` or the error it shows, and the lines that it prints on stdout."""
    printed = []

    def hook(message: dict[str, Any]) -> None:
        content = message["content"]
        if message["msg_type"] == "stream" and content["name"] == "stdout":
            printed.append(content["text"])

    reply = client.execute_interactive(code, timeout=120, output_hook=hook)["content"]
    shown = reply["status"] if reply["status"] == "ok" else f"{reply['ename']}: {reply['evalue']}"
    return shown, "".join(printed).splitlines()


def test_a_notebook_runs_follows_and_reads_runs(tmp_path: Path) -> None:
    with kernel(tmp_path) as client:
        assert cell(client, CONFIG) == ("ok", ["started"])
        shown, lines = cell(client, RUN)
        assert shown == "ok"
        assert [line for line in lines if line.startswith(("told", "differ"))] == [
            "told [0, 1, 2] 3 2",
            "differ by 2.0",
        ]
        assert any("3/3" in line for line in lines)  # the lines of the run, as the command prints them
        sends = "lambda responses, g=(x for x in [1]): []"
        shown, _ = cell(client, f'puzzle.run(config, "out/three", reward={sends})')
        assert shown.startswith("UserError: reward.function given: ")
        shown, _ = cell(client, 'puzzle.run(config, "out/two", reward=brief)')
        assert shown.startswith("UserError: --out out/two: already holds a run")
