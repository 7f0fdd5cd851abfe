"""Training steps in every layout against transformers in one process: losses, norms, weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from puzzle.plan.layout import Layout
from tests.engine import training
from tests.helpers import run_ranks
from tests.reference.hf_ppo import token_values
from tests.reference.tiny import save_lm, save_value

STEPS = 3
LAYERS = 4
# (tp, pp, dp) or (tp, pp, dp, layers per stage); the model has 8 heads, 2 kv heads, 4 layers.
SHORT = [(1, 1, 1), (2, 2, 1), (1, 2, 2), (4, 1, 1), (2, 1, 2), (1, 3, 1, (1, 2, 1))]
LONG = [
    *((t, p, d) for t in (1, 2, 4, 8) for p in (1, 2, 4) for d in (1, 2, 3, 4) if 1 < t * p * d <= 8),
    (1, 2, 1, (3, 1)),
    (2, 3, 1, (1, 1, 2)),
    (1, 3, 2, (2, 1, 1)),
]


def texts(seed: int = 0) -> training.Texts:
    generator = torch.Generator().manual_seed(seed)
    lengths = [7, 13, 4, 9, 21, 6, 11]
    return [torch.randint(0, 259, (n,), generator=generator).tolist() for n in lengths]


def reference(folder: Path, value: bool) -> tuple[dict[str, Tensor], list[float], list[float]]:
    kind = AutoModelForSequenceClassification if value else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.0)
    rows = texts()
    total = sum(len(r) - 1 for r in rows)
    losses, norms = [], []
    for _ in range(STEPS):
        adam.zero_grad()
        loss = torch.zeros(())
        for row in rows:
            if value:
                loss = loss + (token_values(model, row)[:-1] - 1).square().sum()
            else:
                logits = model(torch.tensor([row])).logits[0, :-1]
                loss = loss + torch.nn.functional.cross_entropy(
                    logits, torch.tensor(row[1:]), reduction="sum"
                )
        (loss / total).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        losses.append(float(loss.detach()) / total)
        adam.step()
    return {n: p.detach() for n, p in model.named_parameters()}, losses, norms


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict:
    base = tmp_path_factory.mktemp("training")
    made = {}
    wanted: list[tuple[str, Callable[..., Path], dict[str, Any]]] = [
        ("untied", save_lm, {}),
        ("tied", save_lm, {"tie_word_embeddings": True}),
        ("value", save_value, {}),
        ("qwen3", save_lm, {"family": "qwen3", "tie_word_embeddings": True}),
    ]
    for name, save, options in wanted:
        folder = save(base / name, **options)
        made[name] = (folder, *reference(folder, name == "value"))
    return made


def compare(cases: dict, name: str, shape: tuple, per_pass: int, bucket: int) -> list[dict]:
    folder, weights, losses, norms = cases[name]
    tp, pp, dp, *stages = shape
    layout = Layout(tp, pp, dp, stages[0]) if stages else Layout.even(tp, pp, dp, LAYERS)
    args = (str(folder), layout, texts(), per_pass, STEPS, bucket, name == "value")
    found = run_ranks(training.run, layout.world, *args)
    covered = {n: torch.zeros(w.shape, dtype=torch.bool) for n, w in weights.items()}
    for answer in found:
        assert answer["losses"] == pytest.approx(losses, rel=1e-5)
        assert answer["norms"] == pytest.approx(norms, rel=1e-4)
        for tensor, intervals, values in answer["weights"]:
            box = tuple(slice(*interval) for interval in intervals)
            torch.testing.assert_close(values, weights[tensor][box], rtol=0, atol=1e-5)
            covered[tensor][box] = True
    assert all(bool(c.all()) for c in covered.values())
    return found


@pytest.mark.parametrize("shape", SHORT, ids=str)
def test_untied_steps_equal_transformers(cases: dict, shape: tuple) -> None:
    compare(cases, "untied", shape, per_pass=2, bucket=20_000)


@pytest.mark.parametrize(
    ("name", "shape", "per_pass"),
    [("tied", (2, 2, 2), 1), ("tied", (1, 4, 1), 7), ("value", (2, 2, 1), 3), ("qwen3", (4, 2, 1), 2)],
    ids=str,
)
def test_other_heads_and_families(cases: dict, name: str, shape: tuple, per_pass: int) -> None:
    compare(cases, name, shape, per_pass, bucket=1 << 26)


def test_a_norm_that_is_not_finite_changes_nothing_and_is_told() -> None:
    """On every stage, although only the last one's loss is NaN; the host learns it when it asks."""
    for changed, (norm,), said in run_ranks(training.overflowing, 2, Layout.even(1, 2, 1, 2)):
        assert changed == [True, False, True]
        assert norm > 0.5
        assert said.startswith("actor: the gradient norm is nan at optimizer step 1; look at the loss, lower")


@pytest.mark.long
@pytest.mark.parametrize("name", ["untied", "tied", "value", "qwen3"])
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_every_layout(cases: dict, name: str, shape: tuple) -> None:
    compare(cases, name, shape, per_pass=2, bucket=50_000)
