"""The wheel in a clean environment, with the checkout out of sight: what `pip install` gives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.setup.conftest import REPOSITORY

TRAIN = """
iterations: 2
batch: 4
actor: {init: {vocab_size: 258, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2,
               num_attention_heads: 2, max_position_embeddings: 64}}
reward: {init: {vocab_size: 258, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2,
                num_attention_heads: 2, max_position_embeddings: 64}}
data: {prompts: prompts.jsonl, tokenizer: bytes, max_prompt_tokens: 8}
generation: {max_new_tokens: 4}
"""


@dataclass(frozen=True)
class Installed:
    """An environment that holds the wheel, and sees the libraries of the one that runs the tests."""

    wheel: Path
    python: Path

    def run(self, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
        """A command in `folder`, without the checkout on any path; its program comes from the environment."""
        environment = {
            "PATH": f"{self.python.parent}:/usr/bin:/bin",
            "HOME": str(self.python.parents[1]),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "",
        }
        program = str(self.python.parent / words[0])
        return subprocess.run(
            [program, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    work = tmp_path_factory.mktemp("package")
    source = work / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "experiments.yaml"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("puzzle", "plotting"):
        without = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=without)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    quiet = ["-q", "--no-deps", "--no-index"]
    environment = {**os.environ, "PYTHONPATH": ""}
    made = ["wheel", *quiet, "--no-build-isolation", "--wheel-dir", str(work), str(source)]
    subprocess.run([*pip, *made], env=environment, check=True)
    (wheel,) = work.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", work / "clean"], check=True)
    python = work / "clean/bin/python"
    subprocess.run(
        [*pip, "--python", str(python), "install", *quiet, str(wheel)], env=environment, check=True
    )
    (site,) = (work / "clean").glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return Installed(wheel, python)


def test_the_wheel_holds_one_package_and_what_it_reads(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        table = archive.read("puzzle/campaign/experiments.yaml")
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        told = archive.read(metadata).decode()
    assert {name.split("/")[0] for name in names} == {"puzzle"}
    assert {"puzzle/py.typed", "puzzle/launch/job.sh", "puzzle/plotting/__main__.py"} <= names
    assert table == (REPOSITORY / "experiments.yaml").read_bytes()
    for extra in ("plot", "ray", "deepspeed", "trackers", "verifiers", "dev"):
        assert f"Provides-Extra: {extra}\n" in told
    assert "Project-URL: " in told


def test_an_installed_package_trains(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(TRAIN)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "ask {n}"}}\n' for n in range(4)))
    done = installed.run(tmp_path, "puzzle", "train", "--config", "run.yaml", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        "done: the model is out/checkpoints/last; `puzzle report out` writes a page about the run"
    )
    records = [json.loads(line) for line in (tmp_path / "out/run.jsonl").read_text().splitlines()]
    assert [one["iteration"] for one in records if one["record"] == "iteration"] == [0, 1]
    assert records[-1]["status"] == "completed"
    assert (tmp_path / "out/plots/curves.png").exists()
    short = ["--generation.max_new_tokens", "4"]
    asked = ["--prompts", "prompts.jsonl", "--reward", "puzzle.rlhf.rewards:letter_share"]
    done = installed.run(tmp_path, "puzzle", "evaluate", "out/checkpoints/last", *asked, *short)
    assert done.returncode == 0, done.stderr
    assert "reward" in done.stdout
    done = installed.run(tmp_path, "puzzle", "report", "out")
    assert done.returncode == 0, done.stderr
    assert "<svg" in (tmp_path / "out/report.html").read_text()
    origin = "import puzzle, sys; sys.exit(print(puzzle.__file__))"
    found = installed.run(tmp_path, "python", "-c", origin).stdout.strip()
    assert Path(found).is_relative_to(installed.python.parents[1])


def test_an_installed_package_plans_and_lists_a_campaign(installed: Installed, tmp_path: Path) -> None:
    plan = ["plan", "switch", "--from", "1,2,1", "--to", "2,1,1", "--model", "7b", "--out", "drawn"]
    done = installed.run(tmp_path, "python", "-m", "puzzle", *plan)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "drawn/switch.png").exists()
    shutil.rmtree(tmp_path / "drawn")
    done = installed.run(tmp_path, "puzzle", "campaign", "--scale", "cpu", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "7B/350M opt" in done.stdout
    assert "lacks the DeepSpeed-Chat baseline, which is not part of the installed package" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "extra", "words"),
    [
        ("ray", "ray", ["train", "--config", "run.yaml", "--out", "out", "--launcher", "ray"]),
        ("matplotlib", "plot", ["campaign", "--scale", "cpu"]),
        ("gguf", "formats", ["convert", "run.yaml", "model"]),
    ],
)
def test_a_missing_extra_is_named(
    installed: Installed, tmp_path: Path, module: str, extra: str, words: list[str]
) -> None:
    """One line; in its place a package that does not import."""
    (tmp_path / "run.yaml").write_text(TRAIN)
    script = "import sys; sys.modules[sys.argv[1]] = None\n"
    script += "from puzzle.cli import main; sys.exit(main(sys.argv[2:]))"
    done = installed.run(tmp_path, "python", "-c", script, module, *words)
    assert done.returncode == 2
    assert f"the package {module} is not installed; it is of the extra {extra}: " in done.stderr
    assert f"pip install 'puzzle-rlhf[{extra}]'" in done.stderr
    assert done.stderr.count("\n") == 1
