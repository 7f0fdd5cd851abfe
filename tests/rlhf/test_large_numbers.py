"""Numbers that float32 holds but cannot sum: one line says of which response they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from puzzle.cli import main
from puzzle.errors import UserError
from puzzle.rlhf import rewards
from puzzle.rlhf.algorithms.ppo import value_loss
from puzzle.rlhf.experience import Experience
from puzzle.rlhf.rollout import require_finite, require_summable

CONFIG = """\
iterations: 2
batch: 4
device: cpu
actor:
  init: {vocab_size: 258, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1,
         num_attention_heads: 2, max_position_embeddings: 64}
reward: {function: "puzzle.rlhf.rewards:letter_share"}
data: {prompts: prompts.jsonl, tokenizer: bytes, max_prompt_tokens: 16, shuffle: false}
generation: {min_new_tokens: 4, max_new_tokens: 4}
algorithm: {reward_clip: null}
checkpoint: {save: false}
log: {plots: false}
"""
PLACES = {"a return": "returns_BS", "an advantage": "advantages_BS", "critic: a value": "values_BS"}


def experience(**fields: Any) -> Experience:
    """Four responses of 3, 5, 5 and 2 tokens."""
    return Experience(((1,),) * 4, (0, 1, 2, 3), ((1,) * 3, (1,) * 5, (1,) * 5, (1,) * 2), 1, **fields)


@pytest.mark.parametrize("place", PLACES)
def test_the_limit_is_where_squared_errors_overflow(place: str) -> None:
    """By the loss of a critic that is as far off on the other side, in every token of the batch."""
    tokens = 15
    limit = float(np.sqrt(np.finfo(np.float32).max / (4 * tokens)))
    for factor, fits in ((0.999, True), (1.001, False)):
        x_BS = torch.full((4, 5), factor * limit)
        flat = torch.full((tokens,), factor * limit)
        mask = torch.ones(tokens, dtype=torch.bool)
        error = value_loss(-flat, flat, flat, mask, clip=None).squared_error
        assert bool(error.isfinite()) == fits
        given = experience(**{PLACES[place]: x_BS})
        if fits:
            require_summable(given, torch.zeros(4))
        else:
            with pytest.raises(UserError, match=f"^{place} of response 1 of 4 is 2.38e"):
                require_summable(given, torch.zeros(4))


@pytest.mark.parametrize("x", [1e38, -1e38, float("inf"), float("nan")])
def test_the_response_is_named_and_what_lies_outside_does_not_count(x: float) -> None:
    x_BS = torch.zeros(4, 5)
    x_BS[0, 3] = x  # beyond the end of a response of three
    require_summable(experience(returns_BS=x_BS), torch.zeros(4))
    x_BS[2, 4] = x
    scores = torch.tensor([0.0, 0.0, 7.0, 0.0])
    with pytest.raises(
        UserError, match=f"^a return of response 3 of 4 is {x:.3g}".replace("+", ".")
    ) as raised:
        require_summable(experience(returns_BS=x_BS), scores)
    assert ", its score 7; " in str(raised.value)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("known", [True, False])
def test_what_is_not_known_hides_nothing(place: str, known: bool) -> None:
    """Runs without a critic, or without a reference, have advantages and scores all the same."""
    good = torch.zeros(4, 5)
    bad = torch.where(torch.arange(4)[:, None] == 1, torch.nan, good)
    fields = {name: bad if what == place else good for what, name in PLACES.items() if known or what == place}
    with pytest.raises(UserError, match=f"^{place} of response 2 of 4 is nan, its score 0;"):
        require_summable(experience(**fields), torch.zeros(4))
    found = {what: fields.get(name) for what, name in PLACES.items()}
    with pytest.raises(UserError, match=f"^{place} of response 2 of 4 is not finite;"):
        require_finite(experience(), found)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "error: a return of response 3 of 4 is 8.57e+37, its score 1e+38; squares of more"),
        (("--algorithm.name", "dr_grpo", "--generation.samples", "2"), "error: an advantage of response"),
        (("--algorithm.name", "grpo", "--generation.samples", "2"), None),
        (("--algorithm.reward_clip", "5"), None),
        (("--algorithm.reward_norm", "true"), None),
    ],
)
def test_a_run_with_a_huge_score(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    said: str | None,
) -> None:
    """It ends before it learns, unless the scores are brought to a size that can be learnt from.

    The return of the first of four tokens is discounted by lambda: 1e38 * 0.95^3.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    lines = [json.dumps({"prompt": f"number {i}"}) for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))

    def huge(prompts: list[str], responses: list[str]) -> list[float]:
        return [1e38 if row == 2 else 0.5 for row in range(len(responses))]

    monkeypatch.setattr(rewards, "letter_share", huge)
    code = main(["train", "--config", "run.yaml", "--out", "o", *options])
    told = capfd.readouterr().err
    records = [json.loads(line) for line in (tmp_path / "o/run.jsonl").read_text().splitlines()]
    if said is None:
        assert code == 0, told
        assert sum(record["record"] == "iteration" for record in records) == 2
        return
    assert code == 2
    assert told.startswith(said), told
    assert told.count("\n") == 1
    assert not any(record["record"] == "iteration" for record in records)
    assert records[-1]["status"] == "failed"
