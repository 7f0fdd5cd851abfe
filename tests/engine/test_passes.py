"""Passes that keep their state on the device draw what a full forward pass and keyed noise give."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from puzzle.engine.generate import model_runner as engine_passes
from puzzle.engine.generate.decode_ring import Request, generate
from puzzle.engine.generate.model_runner import ModelRunner, Sampled, bucket
from puzzle.engine.generate.sampling import SamplingParams
from puzzle.errors import UserError
from puzzle.model.noise import row_seeds
from tests.model.tiny import stage
from tests.reference.tiny import save_lm

CAPACITY = 48


def seeds_of(ids: list[int], seed: int = 3) -> list[int]:
    names = torch.tensor(ids)
    return row_seeds(seed, 0, names, torch.zeros_like(names)).tolist()


def drawn(out: Sampled | torch.Tensor) -> tuple[list[int], list[float]]:
    assert isinstance(out, Sampled)
    return out.fetch().lists()


def test_rows_in_any_order_with_refill_and_moves(tmp_path: Path) -> None:
    """Six prompts through four rows in two groups; every token and log-prob is that of the prompt alone."""
    decoder = stage(save_lm(tmp_path / "model"))
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 259, (n,), generator=generator).tolist() for n in (5, 9, 1, 14, 7, 3)]
    params = SamplingParams(max_new_tokens=12, seed=3)
    alone = [generate(decoder, [Request(p, i)], params)[0] for i, p in enumerate(prompts)]

    passes = ModelRunner(decoder)
    passes.start((3, 1), CAPACITY, params)
    got: list[list[tuple[int, float]]] = [[] for _ in prompts]

    def note(who: list[int], out: Sampled | torch.Tensor) -> None:
        for i, token, logprob in zip(who, *drawn(out), strict=True):
            got[i].append((token, logprob))

    def fill(rows: list[int], who: list[int]) -> None:
        note(who, passes.prefill(rows, [prompts[i] for i in who], seeds_of(who)))

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


def test_inactive_rows_change_nothing_and_stay_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where passes have as many rows as a bucket: what stands behind the sequences in use has no
    place, is never moved on, and may be filled at any time."""
    decoder = stage(save_lm(tmp_path / "model"))
    prompts = [[5, 9, 200], [7, 7, 31, 99], [250, 1], [11, 12, 13, 14, 15]]
    params = SamplingParams(max_new_tokens=10, seed=3)
    alone = [generate(decoder, [Request(p, i)], params)[0].tokens for i, p in enumerate(prompts)]

    def record(self: engine_passes.CudaGraphDecode) -> None:
        def replay() -> None:
            self.out = self._pass()

        self.graph = cast(Any, SimpleNamespace(replay=replay))

    monkeypatch.setattr(engine_passes.CudaGraphDecode, "record", record)
    passes = ModelRunner(decoder)
    passes.start((5,), CAPACITY, params)
    passes.graphs = True
    got: list[list[int]] = [[] for _ in prompts]

    def note(who: list[int], out: Sampled | torch.Tensor) -> None:
        for i, token in zip(who, drawn(out)[0], strict=True):
            got[i].append(token)

    note([0, 1, 2], passes.prefill([0, 1, 2], prompts[:3], seeds_of([0, 1, 2])))
    for _ in range(4):
        note([0, 1, 2], passes.decode(0, 3))
        assert passes.state[1].tolist() == [
            *(len(prompts[i]) + len(got[i]) - 1 for i in range(3)),
            engine_passes.INACTIVE,
            engine_passes.INACTIVE,
        ]
    note(
        [3], passes.prefill([3], prompts[3:], seeds_of([3]))
    )  # where an inactive row was computed four times
    for _ in range(3):
        note([0, 1, 2, 3], passes.decode(0, 4))
    passes.move(3, 0, len(prompts[3]) + len(got[3]) - 1)
    assert passes.state[1, 3] == engine_passes.INACTIVE
    for _ in range(2):
        note([3, 1, 2], passes.decode(0, 3))
    assert passes.state[1, 3:].tolist() == [engine_passes.INACTIVE] * 2
    assert [len(part) for part in got] == [8, 10, 10, 6]
    assert got == [truth[: len(part)] for part, truth in zip(got, alone, strict=True)]


def test_recorded_ahead_is_all_that_passes_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings are counted where no graph can be made: they launch their pass, as on a CPU."""
    recorded = []

    def count(self: engine_passes.CudaGraphDecode) -> None:
        recorded.append(len(self.state[0]))
        replay = lambda: setattr(self, "out", self._pass())  # noqa: E731
        self.graph = cast(Any, SimpleNamespace(replay=replay))

    monkeypatch.setattr(engine_passes.CudaGraphDecode, "record", count)
    passes = ModelRunner(stage(save_lm(tmp_path / "model")))
    passes.start((11, 3), CAPACITY, SamplingParams())
    passes.graphs = True
    passes.record(leaving=False)
    assert recorded == [11, 3]
    for active in range(11, 0, -1):
        passes.decode(0, active)
        passes.decode(1, min(active, 3))
    alone, recorded[:] = sorted(recorded), []
    passes._recorded.clear()
    passes.record(leaving=True)
    assert sorted(recorded) == alone == [1, 1, 2, 2, 3, 4, 8, 11]
    passes.record(leaving=True)
    assert sorted(recorded) == alone


def test_a_batch_that_does_not_fit_is_told_what_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = stage(save_lm(tmp_path / "model"))
    prompts = [Request([1] * n, n) for n in (2, 6, 4)]
    params = SamplingParams(max_new_tokens=5)
    cache = ModelRunner(decoder)
    cache.start((2,), 11, params)
    assert cache.cache is not None
    free = cache.cache.k.nbytes + cache.cache.v.nbytes  # room for two of the longest
    monkeypatch.setattr(engine_passes, "cache_memory", lambda *_: free)
    with pytest.raises(UserError, match=r"for 3 sequences of 11 tokens .*: 2 of a replica's sequences do;"):
        generate(decoder, prompts, params)
    assert len(generate(decoder, prompts[:2], params)) == 2
    monkeypatch.setattr(engine_passes, "cache_memory", lambda *_: free - 1)
    with pytest.raises(UserError, match=r": 1 of a replica's sequences do;"):
        generate(decoder, prompts[:2], params)


@pytest.mark.parametrize("lends", [True, False])
def test_unused_memory_is_given_back_where_torch_cannot_use_it(
    lends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device of 1000 bytes: 300 hold tensors, 500 are kept by torch, 200 are free."""
    kept = [500]

    def empty() -> None:
        kept.append(0)

    monkeypatch.setattr(engine_passes, "lends_pages", lambda: lends)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 300)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 300 + kept[-1])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (700 - kept[-1], 1000))
    monkeypatch.setattr(torch.cuda, "empty_cache", empty)
    device = torch.device("cuda", 0)
    most = int(700 - 1000 * engine_passes.KEPT_FREE)
    for enough, gives_back in ((1, not lends), (most, not lends), (most + 1, True)):
        kept[:] = [500]
        assert engine_passes.cache_memory(device, enough) == most
        assert (kept[-1] == 0) == gives_back
    kept[:] = [0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5, 1000))  # others have taken the rest
    assert engine_passes.cache_memory(device, 1) == 0


def test_a_cache_is_kept_while_it_is_large_enough(tmp_path: Path) -> None:
    """For more rows or longer sequences there is a new one; `release` gives it back."""
    passes, params = ModelRunner(stage(save_lm(tmp_path / "model"))), SamplingParams()
    passes.start((2, 1), 20, params)
    for groups, capacity, kept, shape in (
        ((2, 1), 20, True, (3, 20)),
        ((1, 1), 19, True, (3, 20)),
        ((2, 2), 20, False, (4, 20)),
        ((4,), 21, False, (4, 21)),
        ((4,), 21, True, (4, 21)),
    ):
        before = passes.cache
        passes.start(groups, capacity, params)
        assert passes.cache is not None
        assert (passes.cache is before) == kept
        assert (passes.cache.k.shape[1], passes.cache.k.shape[3]) == shape
        assert passes.state.shape == (4, shape[0])
        assert passes.state[1].tolist() == [engine_passes.INACTIVE] * shape[0]
    passes.release()
    assert passes.cache is None


def test_buckets_hold_their_rows() -> None:
    sizes = [bucket(rows) for rows in range(1, 1025)]
    assert sizes[:17] == [1, 2, 4, 4, 8, 8, 8, 8, 16, 16, 16, 16, 16, 16, 16, 16, 32]
    assert all(rows <= size < 2 * rows for rows, size in enumerate(sizes, 1))
    assert all(size <= rows * 5 // 4 for rows, size in enumerate(sizes[256:], 257))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 17
