"""Every command of examples/recipes fits the GPUs that it names: dry runs with the shapes of the models."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest

from puzzle.cli import main
from puzzle.cli import train as command
from puzzle.config.sources import folder_spec
from puzzle.data import hub

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "examples/recipes").glob("*.yaml"))
COMMAND = re.compile(r"^#   puzzle (train --config (\S+) .*?)   # (\d) GPUs?$", re.MULTILINE)
QWEN3 = {
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Hidden, feed-forward, layers, query heads, tied embedding; billions of parameters as the models are called.
SHAPES: dict[str, tuple[dict[str, Any], tuple[int, int, int, int, bool], float]] = {
    "Qwen/Qwen3-0.6B": (QWEN3, (1024, 3072, 28, 16, True), 0.596),
    "Qwen/Qwen3-4B": (QWEN3, (2560, 9728, 36, 32, True), 4.02),
    "Qwen/Qwen3-8B": (QWEN3, (4096, 12288, 36, 32, False), 8.19),
    "meta-llama/Llama-3.1-8B-Instruct": (
        {
            "model_type": "llama",
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA3_ROPE,
        },
        (4096, 14336, 32, 32, False),
        8.03,
    ),
}


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of the Hub: folders with a configuration alone, and a file of prompts."""
    questions = tmp_path / "questions.jsonl"
    row = json.dumps({"question": "How many?", "answer": "So 2 + 2 = 4\n#### 4"})
    questions.write_text(f"{row}\n" * 300)

    def model(name: hub.Name, _weights: bool) -> tuple[str, str]:
        family, (hidden, ffn, layers, heads, tied), _ = SHAPES[name.repo]
        folder = tmp_path / name.repo.replace("/", "--")
        folder.mkdir(exist_ok=True)
        shape = {
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "tie_word_embeddings": tied,
        }
        (folder / "config.json").write_text(json.dumps({**family, **shape}))
        return str(folder), name.pinned("0" * 40)

    monkeypatch.setattr(hub, "_model", model)
    monkeypatch.setattr(hub, "_dataset", lambda name: (str(questions), name.pinned("1" * 40)))
    monkeypatch.chdir(ROOT)


def commands(recipe: Path) -> list[tuple[list[str], int]]:
    """The commands in a recipe's first lines, and the GPUs that each wants."""
    found = COMMAND.findall(recipe.read_text())
    assert all(ROOT / config == recipe for _, config, _ in found)
    return [(shlex.split(words), int(gpus)) for words, _, gpus in found]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_fit_their_gpus(
    recipe: Path, shapes: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole check of each command, and the memory table of what it names."""
    asked = commands(recipe)
    assert asked
    checked = command.check_files
    for number, (words, gpus) in enumerate(asked):
        # Files and the reward are the same in all of them.
        monkeypatch.setattr(command, "check_files", checked if number == 0 else lambda _config: None)
        assert main([*words, "--dry-run=json", "--device-memory", "80GB"]) == 0
        shown = capsys.readouterr()
        config = json.loads(shown.out)
        layout = config["layout"]
        assert layout["tp"] * layout["pp"] * layout["dp"] == gpus
        assert "device memory in GiB" in shown.err
        spec = folder_spec("actor", Path(config["actor"]["model"]), "lm")
        name = next(name for name in SHAPES if name in recipe.read_text())
        assert spec.parameters / 1e9 == pytest.approx(SHAPES[name][2], rel=0.002)


def test_there_is_a_recipe_of_each_model_and_algorithm() -> None:
    models = {"qwen3-0.6b", "qwen3-4b", "qwen3-8b", "llama-3.1-8b"}
    wanted = {f"{m}-{a}" for m in models for a in ("ppo", "grpo")}
    assert {recipe.stem for recipe in RECIPES} == wanted | {"llama-3.1-8b-lora-grpo"}
    gpus = {number for recipe in RECIPES for _, number in commands(recipe)}
    assert gpus == {1, 4, 8}


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("She has 3 + 4 = 7 apples.", "So 7\n#### 7", 1.0),
        ("The answer is $1,234.50", "#### 1234.5", 1.0),
        ("It is -5", "#### 5", 0.0),
        ("7, or maybe 8", "#### 7", 0.0),
        ("no number", "#### 7", 0.0),
        ("1,000,000", "of 12 and 3\n#### 1000000", 1.0),
        ("", "nothing", 0.0),
    ],
)
def test_the_reward_compares_last_numbers(response: str, answer: str, score: float) -> None:
    correct = runpy.run_path(str(ROOT / "examples/recipes/gsm8k.py"))["correct"]
    assert correct(responses=[response, "#### 7"], answer=[answer, "x"]) == [score, 0.0]
