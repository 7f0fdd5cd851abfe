"""Models whose embeddings are padded to different sizes: as if all had the fewest rows."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from puzzle.cli import main
from puzzle.data.tokenizers import byte_tokenizer
from puzzle.errors import UserError
from puzzle.rlhf import vocabulary
from tests.reference.tiny import save_lm, save_value

SMALL, LARGE = 262, 300
SIZES: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
}


def cut(source: Path, target: Path, rows: int) -> None:
    """The model with the first `rows` of its vocabulary."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][:rows].clone()
    save_file(tensors, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"vocab_size": rows}
    (target / "config.json").write_text(json.dumps(config))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Actors and critics of both sizes. The actor's rows from SMALL on win every draw where they count."""
    save_lm(tmp_path / "actor-large", vocab_size=LARGE, **SIZES)
    weights = load_file(tmp_path / "actor-large/model.safetensors")
    weights["lm_head.weight"][SMALL:] *= 50
    save_file(weights, tmp_path / "actor-large/model.safetensors")
    save_value(tmp_path / "critic-large", vocab_size=LARGE, **SIZES)
    for name in ("actor", "critic"):
        byte_tokenizer().save_pretrained(tmp_path / f"{name}-large")
        cut(tmp_path / f"{name}-large", tmp_path / f"{name}-small", SMALL)
    (tmp_path / "prompts.txt").write_text("".join(f"opening {i}\n" for i in range(4)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(out: str, actor: str, critic: str, reference: str, *more: str) -> int:
    words = ["train", "--out", out, "--iterations", "2", "--batch", "4", "--actor.model", f"actor-{actor}"]
    words += ["--critic.model", f"critic-{critic}", "--reference.model", f"actor-{reference}"]
    words += ["--data.prompts", "prompts.txt", "--data.max_prompt_tokens", "16", "--device", "cpu"]
    words += ["--generation.max_new_tokens", "6", "--log.plots", "false"]
    if not more:
        more = ("--reward.function", "puzzle.rlhf.rewards:letter_share")
    return main([*words, *more])


def metrics(out: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in Path(out, "run.jsonl").read_text().splitlines()]
    found = [record["metrics"] for record in records if record["record"] == "iteration"]
    assert len(found) == 2
    return found


@pytest.mark.parametrize(("actor", "critic"), [("large", "small"), ("small", "large")])
def test_rows_that_one_model_lacks_are_in_no_distribution(folder: Path, actor: str, critic: str) -> None:
    assert run("same", "small", "small", "small") == 0
    assert run("padded", actor, critic, "large") == 0
    for one, other in zip(metrics("same"), metrics("padded"), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    saved = load_file("padded/checkpoints/last/model.safetensors")
    assert saved["lm_head.weight"].shape == (LARGE if actor == "large" else SMALL, 32)
    if actor == "large":
        before = load_file("actor-large/model.safetensors")["lm_head.weight"]
        assert torch.equal(saved["lm_head.weight"][SMALL:], before[SMALL:])


def test_a_token_that_a_model_lacks_is_refused_before_the_log(folder: Path, capsys) -> None:
    cut(folder / "critic-large", folder / "critic-tiny", 200)
    assert run("out", "large", "tiny", "large") == 2
    assert "critic: token 257, which the actor may read or draw, is outside its vocabulary of 200" in (
        capsys.readouterr().err
    )
    assert not (folder / "out").exists()


def test_another_tokenizer_is_refused(folder: Path, capsys) -> None:
    core = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder / "critic-small")
    assert run("out", "large", "small", "large") == 2
    assert "critic: the tokenizer of critic-small is not the actor's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("actor", "size", "prompt", "odd"),
    [(10, 10, 3, None), (8, 8, 3, None), (8, 7, 3, 7), (10, 9, 3, 9), (99, 10, 3, None), (99, 20, 20, 20)],
)
def test_a_model_reads_all_tokens_that_the_actor_reads_or_draws(
    actor: int, size: int, prompt: int, odd: int | None
) -> None:
    """Of a tokenizer's ten tokens an actor of eight draws no others; prompts may have more."""
    tokenizer = SimpleNamespace(get_vocab=lambda: {str(i): i for i in range(10)})
    data: Any = SimpleNamespace(
        tokenizer=tokenizer,
        train=SimpleNamespace(prompts=SimpleNamespace(prompts=[SimpleNamespace(tokens=(0, prompt))])),
        held_out=None,
        endings=SimpleNamespace(stop_ids=(1,)),
    )
    config: Any = SimpleNamespace(critic=SimpleNamespace(model=None))
    runtimes: Any = [
        SimpleNamespace(name=name, spec=SimpleNamespace(vocab_size=rows))
        for name, rows in (("actor", actor), ("critic", size))
    ]
    if odd is None:
        vocabulary._check(config, data, *runtimes)
        return
    with pytest.raises(UserError, match=f"^critic: token {odd}, which .* its vocabulary of {size}$"):
        vocabulary._check(config, data, *runtimes)
