"""Every command of examples/recipes fits the GPUs that it names: dry runs with the shapes of the models, on
rows in the form of the datasets."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from puzzle.cli import main
from puzzle.cli import train as command
from puzzle.config import memory_report as footprint
from puzzle.config.load import load_config, load_given
from puzzle.config.resolve import resolve
from puzzle.config.run import TrainConfig
from puzzle.config.sources import folder_spec
from puzzle.config.supervised import SUPERVISED
from puzzle.data import hub
from puzzle.data.examples import load_examples
from puzzle.data.prompts import load_prompts
from puzzle.data.tokenizers import load_tokenizer
from puzzle.spec.model import ModelSpec
from tests.data.templates import LLAMA3, tokenizer
from tests.data.test_masks import THINKING
from tests.reference.tiny import save_lm

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "examples/recipes").glob("*.yaml"))
COMMAND = re.compile(r"^#   puzzle (\S+ --config (\S+) --out (\S+).*?)   # (\d) GPUs?$", re.MULTILINE)
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
LLAMA = {
    "model_type": "llama",
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA3_ROPE,
}
# Hidden, feed-forward, layers, query heads, tied embedding; billions of parameters as the models are called.
SHAPES: dict[str, tuple[dict[str, Any], tuple[int, int, int, int, bool], float]] = {
    "Qwen/Qwen3-0.6B": (QWEN3, (1024, 3072, 28, 16, True), 0.596),
    "Qwen/Qwen3-4B": (QWEN3, (2560, 9728, 36, 32, True), 4.02),
    "Qwen/Qwen3-0.6B-Base": (QWEN3, (1024, 3072, 28, 16, True), 0.596),
    "Qwen/Qwen3-4B-Base": (QWEN3, (2560, 9728, 36, 32, True), 4.02),
    "Qwen/Qwen3-8B": (QWEN3, (4096, 12288, 36, 32, False), 8.19),
    "meta-llama/Llama-3.1-8B": (LLAMA, (4096, 14336, 32, 32, False), 8.03),
    "meta-llama/Llama-3.1-8B-Instruct": (LLAMA, (4096, 14336, 32, 32, False), 8.03),
}


def _asked(text: str) -> dict[str, str]:
    return {"content": text, "role": "user"}


def _said(text: str) -> dict[str, str]:
    return {"content": text, "role": "assistant"}


# A row of every dataset, as its files have it.
ROWS: dict[str, dict[str, Any]] = {
    "openai/gsm8k": {"question": "How many?", "answer": "So 2 + 2 = 4\n#### 4"},
    "HuggingFaceH4/ultrafeedback_binarized": {
        "prompt": "the mat?",
        "prompt_id": "9f" * 32,
        "chosen": [_asked("the mat?"), _said("the cat sat")],
        "rejected": [_asked("the mat?"), _said("")],
        "messages": [_asked("the mat?"), _said("the cat sat")],
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    },
}
SPLITS = {
    "openai/gsm8k": ("train", "test"),
    "HuggingFaceH4/ultrafeedback_binarized": (
        *("train_prefs", "train_sft", "train_gen"),
        *("test_prefs", "test_sft", "test_gen"),
    ),
}


def shape(name: str) -> dict[str, Any]:
    """The `config.json` of a model on the Hub."""
    family, (hidden, ffn, layers, heads, tied), _ = SHAPES[name]
    return {
        **family,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders with the rows of each dataset, as the Hub's are saved."""
    library = pytest.importorskip("datasets")
    folders = {name: str(tmp_path_factory.mktemp("rows")) for name in ROWS}
    for name, row in ROWS.items():
        library.Dataset.from_list([row] * 300).save_to_disk(folders[name])
    return folders


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, datasets: dict[str, str]) -> None:
    """In the place of the Hub: folders with a configuration alone, and rows; and what runs of the recipes
    leave for those that go on from them."""

    def model(name: hub.Name, _weights: bool) -> tuple[str, str]:
        return str(written(tmp_path / name.repo.replace("/", "--"), shape(name.repo))), name.pinned("0" * 40)

    def dataset(name: hub.Name) -> tuple[str, str]:
        assert name.split in SPLITS[name.repo]
        return datasets[name.repo], name.pinned("1" * 40)

    monkeypatch.setattr(hub, "_model", model)
    monkeypatch.setattr(hub, "_dataset", dataset)
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    for recipe in RECIPES:
        if (task := commands(recipe)[0][0][0]) != "train":
            head = "value" if task == "reward-model" else "lm"
            left = ModelSpec.from_hf(shape(base(recipe)), head).to_hf()
            written(Path(out_of(recipe)) / "checkpoints/last", left)


def written(folder: Path, config: dict[str, Any]) -> Path:
    """A model folder with a configuration alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def commands(recipe: Path) -> list[tuple[list[str], int]]:
    """The commands in a recipe's first lines, and the GPUs that each wants."""
    found = COMMAND.findall(recipe.read_text())
    assert len(found) == recipe.read_text().count("#   puzzle ")
    assert all(ROOT / config == recipe for _, config, _, _ in found)
    return [(shlex.split(words), int(gpus)) for words, _, _, gpus in found]


def out_of(recipe: Path) -> str:
    """The folder that all commands of a recipe write."""
    (out,) = {out for _, _, out, _ in COMMAND.findall(recipe.read_text())}
    return out


def base(recipe: Path) -> str:
    """The model on the Hub that a recipe's model comes from, by the recipes whose runs it goes on from."""
    values = yaml.safe_load(recipe.read_text())
    model = (values.get("actor") or values["reward"])["model"]
    if model in SHAPES:
        return model
    (before,) = [r for r in RECIPES if f"{out_of(r)}/checkpoints/last" == model]
    return base(before)


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
        main_model = config.get("actor") or config["reward"]
        spec = folder_spec("model", Path(main_model["model"]), "lm")
        assert spec.parameters / 1e9 == pytest.approx(SHAPES[base(recipe)][2], rel=0.002)


def test_there_is_a_recipe_of_each_model_and_algorithm() -> None:
    models = {"qwen3-0.6b", "qwen3-4b", "qwen3-8b", "llama-3.1-8b"}
    wanted = {f"{m}-{a}" for m in models for a in ("ppo", "grpo")} | {"llama-3.1-8b-lora-grpo"}
    steps = {f"{m}-{s}" for m in models - {"qwen3-8b"} for s in ("sft", "reward-model", "rlhf")}
    assert {recipe.stem for recipe in RECIPES} == wanted | steps
    gpus = {number for recipe in RECIPES for _, number in commands(recipe)}
    assert gpus == {1, 4, 8}


def test_the_page_s_table_is_that_of_the_dry_runs(shapes: None) -> None:
    """Of each model and number of GPUs, steps 1 and 2 in one column, step 3 in the other."""
    page = (ROOT / "docs/recipe.md").read_text("utf-8")
    for line in re.findall(r"^\| ((?:Qwen3|Llama).*) \|$", page, re.MULTILINE):
        title, *cells = [cell.strip() for cell in line.split("|")]
        found = {("first", g): "" for g in (1, 4, 8)} | {("last", g): "" for g in (1, 4, 8)}
        for step, column in (("sft", "first"), ("reward-model", "first"), ("rlhf", "last")):
            for (task, *options), gpus in commands(ROOT / f"examples/recipes/{title.lower()}-{step}.yaml"):
                file = Path(options[options.index("--config") + 1])
                overrides = options[options.index("--out") + 2 :]
                config, given = load_given(SUPERVISED.get(task, TrainConfig), file, overrides)
                plan = resolve(hub.localised(config, given, weights=False)[0])
                ranks = footprint.estimate(plan, fused=True, limit=footprint.parse_bytes("80GB"))
                shown = f"{max(rank.peak for rank in ranks) / footprint.GIB:.1f}"
                found[column, gpus] = max(found[column, gpus], shown)
        assert cells == list(found.values())
    assert page.count("| Qwen3-") + page.count("| Llama-") == 3


@pytest.mark.parametrize("recipe", [r for r in RECIPES if "rlhf" in r.stem], ids=lambda recipe: recipe.stem)
def test_the_three_steps_go_on_from_each_other(recipe: Path) -> None:
    """PPO starts from the model of step 1 and is scored by that of step 2, which started there, too."""
    config = load_config(recipe)
    sft, reward = (recipe.with_name(recipe.name.replace("rlhf", s)) for s in ("sft", "reward-model"))
    assert config.actor.model == f"{out_of(sft)}/checkpoints/last"
    assert config.critic is not None
    assert config.reward.model == config.critic.model == f"{out_of(reward)}/checkpoints/last"
    assert yaml.safe_load(reward.read_text())["reward"]["model"] == config.actor.model


@pytest.mark.parametrize("name", ["qwen3-4b", "llama-3.1-8b"])
def test_the_three_steps_read_their_dataset(name: str, datasets: dict[str, str]) -> None:
    """With templates like those of the models: Qwen3's writes an empty thought into the last turn."""
    qwen = name.startswith("qwen3")
    own = tokenizer(THINKING if qwen else LLAMA3, marked=False)
    rows = Path(datasets["HuggingFaceH4/ultrafeedback_binarized"])
    thought, end = ("<think>\n\n</think>\n\n", "<|im_end|>") if qwen else ("", "<|eot|>")
    for task, answers in (("sft", ["the cat sat"]), ("reward-model", ["the cat sat", ""])):
        file = ROOT / f"examples/recipes/{name}-{task}.yaml"
        examples = load_examples(rows, load_given(SUPERVISED[task], file)[0].data, own)
        assert (len(examples.examples), len(examples.left)) == (300, 0)
        learned = [
            [own.decode(tokens.tokens[a:b]) for a, b in tokens.spans]
            for tokens in examples.examples[0].sequences
        ]
        assert learned == [[f"{thought}{answer}{end}"] for answer in answers]
    prompts = load_prompts(rows, load_config(ROOT / f"examples/recipes/{name}-rlhf.yaml").data, own)
    opened = (
        "<|im_start|>user\nthe mat?<|im_end|>\n<|im_start|>assistant\n"
        if qwen
        else "<|begin|><|start_header|>user<|end_header|>\n\nthe mat?<|eot|>"
        "<|start_header|>assistant<|end_header|>\n\n"
    )
    assert {own.decode(prompt.tokens) for prompt in prompts.prompts} == {opened}


@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen3-0.6b", "llama-3.1-8b"])
def test_the_three_steps_run_one_after_the_other(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, datasets: dict[str, str]
) -> None:
    """By their commands, with a tiny model in the place of the Hub's."""
    made, own = tmp_path / "model", tokenizer(THINKING, marked=False)
    save_lm(made, "qwen3", vocab_size=512, max_position_embeddings=4096, tie_word_embeddings=True)
    own.save_pretrained(made)
    monkeypatch.setattr(hub, "_model", lambda name, _weights: (str(made), name.pinned("0" * 40)))
    monkeypatch.setattr(hub, "_dataset", lambda name: (datasets[name.repo], name.pinned("1" * 40)))
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    small = "--device cpu --dtype fp32 --iterations 1 --batch 4 --layout.tp 1 --layout.dp 1 --eval.every 0"
    short = "--algorithm.minibatch 4 --generation.max_new_tokens 4 --checkpoint.best false"
    for step in ("sft", "reward-model", "rlhf"):
        words = commands(ROOT / f"examples/recipes/{name}-{step}.yaml")[0][0]
        assert main([*words, *small.split(), *(short.split() if step == "rlhf" else ())]) == 0
    left = Path(f"runs/{name}-rlhf/checkpoints/last")
    assert load_tokenizer(str(left)).chat_template == own.chat_template
    assert (left / "model.safetensors").exists()


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
