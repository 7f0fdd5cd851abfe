"""A copy of the shell layer in a folder of its own; uv there only writes down what it is asked."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# Waits while the file `hold` exists and fails if the file `fail` does: tests steer it through them.
FAKE_UV = """#!/bin/sh
[ "$1" = --version ] && exit 0
here=$(dirname "$(dirname "$(dirname "$0")")")
echo "$*" >>"$here/uv-calls"
while [ -e "$here/hold" ]; do sleep 0.02; done
[ ! -e "$here/fail" ] || { echo "uv: no such package" >&2; exit 1; }
"""


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@dataclass
class Checkout:
    """`tools` comes first on PATH; `home` is an empty HOME."""

    root: Path
    tools: Path
    home: Path

    def environment(self, **extra: str) -> dict[str, str]:
        # The environment that runs the tests must not answer for the copy.
        rest = [
            entry for entry in os.environ["PATH"].split(":") if not Path(entry).is_relative_to(REPOSITORY)
        ]
        return {"PATH": ":".join([str(self.tools), *rest]), "HOME": str(self.home), **extra}

    def shell(
        self, script: str, shell: str = "bash", cwd: Path | None = None, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a script with `$ENV` naming env.sh, in an environment of its own."""
        environment = self.environment(ENV=str(self.root / "env.sh"), **extra)
        flags = ["-f"] if shell == "zsh" else ["--norc"]
        return subprocess.run(
            [shell, *flags, "-c", script],
            env=environment,
            cwd=cwd or self.home,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def uv_calls(self) -> list[str]:
        calls = self.root / "uv-calls"
        return calls.read_text().splitlines() if calls.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    root = tmp_path / "a checkout"
    (root / "requirements").mkdir(parents=True)
    for name in ("env.sh", "RUNME-a.sh", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, root / name)
    for lock in (REPOSITORY / "requirements").glob("*.txt"):
        shutil.copy(lock, root / "requirements")
    shutil.copytree(REPOSITORY / "scripts", root / "scripts", symlinks=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / ".venv"], check=True)
    write_program(root / ".venv/bin/uv", FAKE_UV)
    tools, home = tmp_path / "tools", tmp_path / "home"
    tools.mkdir()
    home.mkdir()
    # Whether this machine has a GPU must not decide what the tests see.
    write_program(tools / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    return Checkout(root, tools, home)
