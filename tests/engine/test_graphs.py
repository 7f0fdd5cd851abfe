"""Padded decode passes in buckets draw what plain ones draw; on a CPU they run without recording."""

from __future__ import annotations

from pathlib import Path

import torch

from puzzle.engine.generate import Request, generate
from puzzle.engine.graphs import GraphedStage
from puzzle.engine.sampling import SamplingParams
from tests.model.tiny import stage
from tests.reference.tiny import save_lm


def requests(seed: int, count: int) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    return [
        Request(torch.randint(0, 259, (n,), generator=generator).tolist(), i) for i, n in enumerate(lengths)
    ]


def test_buckets_change_no_token(tmp_path: Path) -> None:
    """Ragged prompts, early stops, a cache that is used again, smaller and larger batches."""
    decoder = stage(save_lm(tmp_path / "model"))
    params = SamplingParams(max_new_tokens=50, stop_ids=tuple(range(0, 259, 16)), seed=3)
    relay = GraphedStage()
    for seed, count in ((1, 11), (2, 5), (3, 13)):
        asked = requests(seed, count)
        plain, padded = generate(decoder, asked, params), generate(decoder, asked, params, relay)
        assert [answer.tokens for answer in padded] == [answer.tokens for answer in plain]
        for a, b in zip(padded, plain, strict=True):
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-5)
    steps = len({len(answer.tokens) for answer in plain})
    assert steps > 3
    before = relay.captures
    generate(decoder, asked, params, relay)
    assert relay.captures == before
    relay.release()
    generate(decoder, asked, params, relay)
    assert relay.captures > before
