"""Passes that keep their state on the device draw what a full forward pass and keyed noise give."""

from __future__ import annotations

from pathlib import Path

import torch

from puzzle.engine.generate import Request, generate
from puzzle.engine.passes import Drawn, StagePasses, bucket
from puzzle.engine.sampling import SamplingParams
from puzzle.model.noise import row_stems
from tests.model.tiny import stage
from tests.reference.tiny import save_lm

CAPACITY = 48


def stems(ids: list[int], seed: int = 3) -> list[int]:
    names = torch.tensor(ids)
    return row_stems(seed, 0, names, torch.zeros_like(names)).tolist()


def drawn(out: Drawn | torch.Tensor) -> tuple[list[int], list[float]]:
    assert isinstance(out, Drawn)
    return out.fetch().lists()


def test_rows_in_any_order_with_refill_and_moves(tmp_path: Path) -> None:
    """Six prompts through four rows in two groups; every token and log-prob is that of the prompt alone."""
    decoder = stage(save_lm(tmp_path / "model"))
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 259, (n,), generator=generator).tolist() for n in (5, 9, 1, 14, 7, 3)]
    params = SamplingParams(max_new_tokens=12, seed=3)
    alone = [generate(decoder, [Request(p, i)], params)[0] for i, p in enumerate(prompts)]

    passes = StagePasses(decoder)
    passes.start((3, 1), CAPACITY, params)
    got: list[list[tuple[int, float]]] = [[] for _ in prompts]

    def note(who: list[int], out: Drawn | torch.Tensor) -> None:
        for i, token, logprob in zip(who, *drawn(out), strict=True):
            got[i].append((token, logprob))

    def fill(rows: list[int], who: list[int]) -> None:
        note(who, passes.prefill(rows, [prompts[i] for i in who], stems(who)))

    fill([2, 0, 3], [0, 1, 3])
    fill([1], [2])
    order = [1, 2, 0]
    for _ in range(4):
        note(order, passes.decode(0, 3))
        note([3], passes.decode(1, 1))
    passes.park([1])  # prompt 2 leaves, prompt 0 takes its row, then row 2 is filled anew
    passes.move(2, 1, len(prompts[0]) + len(got[0]) - 1)
    note([1, 0], passes.decode(0, 2))
    fill([2], [4])
    fill([3], [5])
    for _ in range(6):
        note([1, 0, 4], passes.decode(0, 3))
        note([5], passes.decode(1, 1))
    assert [len(part) for part in got] == [12, 12, 5, 5, 7, 7]
    for part, truth in zip(got, alone, strict=True):
        assert [token for token, _ in part] == truth.tokens[: len(part)]
        logprobs = torch.tensor([logprob for _, logprob in part])
        torch.testing.assert_close(logprobs, torch.tensor(truth.logprobs[: len(part)]), rtol=0, atol=1e-5)


def test_buckets_hold_their_rows() -> None:
    sizes = [bucket(rows) for rows in range(1, 1025)]
    assert all(rows <= size <= max(rows + 7, rows * 9 // 8) for rows, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) < 45
