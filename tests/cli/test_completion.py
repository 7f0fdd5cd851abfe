"""What a shell offers while a command is typed, by argcomplete's real protocol with processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("argcomplete")
ROOT = Path(__file__).parents[2]


def offered(line: str, folder: Path) -> set[str]:
    """What is offered at the end of a line, as bash asks: on file descriptor 8 of the program."""
    answer = folder / "answer"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_SHELL": "bash",
        "_ARGCOMPLETE_IFS": "\v",
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    program = [sys.executable, str(ROOT / "scripts/bin/puzzle")]
    with answer.open("w") as file:
        script = f'exec 8>&{file.fileno()}; exec "$@"'
        subprocess.run(
            ["bash", "-c", script, "bash", *program], env=environment, cwd=folder, pass_fds=[file.fileno()]
        )
    return set(filter(None, (word.strip() for word in answer.read_text().split("\v"))))


@pytest.mark.parametrize(
    ("line", "some", "none"),
    [
        ("puzzle ", {"train", "generate", "plan", "campaign"}, {"switch"}),
        ("puzzle tr", {"train"}, {"plan"}),
        ("puzzle plan ", {"switch", "fuse", "predict"}, {"train"}),
        ("puzzle plan switch --fr", {"--from"}, {"--to"}),
        ("puzzle plan switch --strategy ", {"planned", "gather-all"}, {"--from"}),
        ("puzzle train --generation.max", {"--generation.max_new_tokens"}, {"--resume"}),
        ("puzzle train --launcher ", {"local", "ray", "slurm"}, set()),
        ("puzzle train --config r", {"run.yaml"}, {"local"}),
    ],
)
def test_what_is_offered(tmp_path: Path, line: str, some: set[str], none: set[str]) -> None:
    (tmp_path / "run.yaml").touch()
    found = offered(line, tmp_path)
    assert some <= found
    assert not none & found
