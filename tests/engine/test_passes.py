"""Passes that keep their state on the device draw what a full forward pass and keyed noise give."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from puzzle.engine.generate import memory as cache_memory
from puzzle.engine.generate import model_runner as engine_passes
from puzzle.engine.generate.decode_ring import generate
from puzzle.engine.generate.model_runner import ModelRunner, bucket
from puzzle.engine.generate.requests import Request
from puzzle.engine.generate.sampling import Sampled, SamplingParams
from puzzle.engine.generate.scheduler import Join, Prefill
from puzzle.errors import UserError
from puzzle.model.decoder import Decoder
from puzzle.model.noise import row_seeds
from puzzle.plan import memory
from puzzle.plan.layout import Placement
from puzzle.plan.pages import KEPT_FREE
from tests.model.tiny import stage
from tests.reference.tiny import save_lm

PAGES, COLUMNS = 24, 3


def seeds_of(ids: list[int], seed: int = 3) -> list[int]:
    names = torch.tensor(ids)
    return row_seeds(seed, 0, names, torch.zeros_like(names)).tolist()


def drawn(out: Sampled | torch.Tensor) -> tuple[list[int], list[float]]:
    assert isinstance(out, Sampled)
    return out.fetch().lists()


class Filled:
    """A runner whose sequences are placed by hand, each with pages of its own."""

    def __init__(self, decoder: Decoder, groups: tuple[int, ...], prompts: list[list[int]], **how: Any):
        self.passes, self.prompts = ModelRunner(decoder), prompts
        self.passes.start(groups, PAGES, 16, COLUMNS, SamplingParams(**how))
        self.pages = iter(torch.randperm(PAGES, generator=torch.Generator().manual_seed(0)).add(1).tolist())
        self.got: list[list[tuple[int, float]]] = [[] for _ in prompts]

    def fill(self, rows: list[int], who: list[int]) -> None:
        """Cache prompts but for their last tokens, which the rows read next."""
        tables = [[next(self.pages) for _ in range(COLUMNS)] for _ in who]
        parts = [
            Prefill(self.prompts[i][:-1], table[: -(-len(self.prompts[i][:-1]) // 16)])
            for i, table in zip(who, tables, strict=True)
            if len(self.prompts[i]) > 1
        ]
        if parts:
            self.passes.prefill(parts)
        joins = [
            Join(row, i, self.prompts[i][-1], len(self.prompts[i]) - 1, 0, table)
            for row, i, table in zip(rows, who, tables, strict=True)
        ]
        self.passes.join(joins, seeds_of(who))

    def note(self, who: list[int], out: Sampled | torch.Tensor) -> None:
        for i, token, logprob in zip(who, *drawn(out), strict=True):
            self.got[i].append((token, logprob))


def test_rows_in_any_order_with_refill_and_moves(tmp_path: Path) -> None:
    """Six prompts through four rows in two groups; every token and log-prob is that of the prompt alone."""
    decoder = stage(save_lm(tmp_path / "model"))
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 259, (n,), generator=generator).tolist() for n in (5, 19, 1, 34, 7, 3)]
    params = SamplingParams(max_new_tokens=12, seed=3)
    alone = [generate(decoder, [Request(p, i)], params)[0] for i, p in enumerate(prompts)]

    filled = Filled(decoder, (3, 1), prompts, max_new_tokens=12, seed=3)
    passes = filled.passes
    filled.fill([2, 0, 3], [0, 1, 3])
    filled.fill([1], [2])
    order = [1, 2, 0]
    for _ in range(4):
        filled.note(order, passes.decode(0, 3))
        filled.note([3], passes.decode(1, 1))
    passes.move([(2, 1)], [2])  # prompt 2 leaves, prompt 0 takes its row, then row 2 is filled anew
    filled.note([1, 0], passes.decode(0, 2))
    filled.fill([2], [4])
    passes.move([(2, 0), (0, 2)], [])  # at once
    filled.fill([3], [5])
    for _ in range(6):
        filled.note([4, 0, 1], passes.decode(0, 3))
        filled.note([5], passes.decode(1, 1))
    assert [len(part) for part in filled.got] == [11, 11, 4, 4, 6, 6]
    for part, truth in zip(filled.got, alone, strict=True):
        assert [token for token, _ in part] == truth.tokens[: len(part)]
        logprobs = torch.tensor([logprob for _, logprob in part])
        torch.testing.assert_close(logprobs, torch.tensor(truth.logprobs[: len(part)]), rtol=0, atol=1e-5)


def test_inactive_rows_change_nothing_and_stay_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where passes have as many rows as a bucket: what stands behind the sequences in use has no
    place, writes to nobody's page alone, though its line of the block table names others', and may be filled
    at any time."""
    decoder = stage(save_lm(tmp_path / "model"))
    prompts = [[5, 9, 200], [7, 7, 31, 99], [250, 1], [11, 12, 13, 14, 15]]
    params = SamplingParams(max_new_tokens=10, seed=3)
    alone = [generate(decoder, [Request(p, i)], params)[0].tokens for i, p in enumerate(prompts)]

    def record(self: engine_passes.CudaGraphDecode) -> None:
        def replay() -> None:
            self.out = self._pass()

        self.graph = cast(Any, SimpleNamespace(replay=replay))

    monkeypatch.setattr(engine_passes.CudaGraphDecode, "record", record)
    filled = Filled(decoder, (5,), prompts, max_new_tokens=10, seed=3)
    passes = filled.passes
    passes.graphs = True
    filled.fill([0, 1, 2], [0, 1, 2])
    with torch.inference_mode():
        passes.table[3:] = passes.table[0]
    for _ in range(4):
        filled.note([0, 1, 2], passes.decode(0, 3))
        assert passes.state[1].tolist() == [
            *(len(prompts[i]) + len(filled.got[i]) - 1 for i in range(3)),
            engine_passes.INACTIVE,
            engine_passes.INACTIVE,
        ]
    filled.fill([3], [3])  # where an inactive row was computed four times
    for _ in range(3):
        filled.note([0, 1, 2, 3], passes.decode(0, 4))
    passes.move([(3, 0)], [3])
    assert passes.state[1, 3] == engine_passes.INACTIVE
    for _ in range(2):
        filled.note([3, 1, 2], passes.decode(0, 3))
    assert passes.state[1, 3:].tolist() == [engine_passes.INACTIVE] * 2
    assert [len(part) for part in filled.got] == [7, 9, 9, 5]
    got = [[token for token, _ in part] for part in filled.got]
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
    passes.start((11, 3), PAGES, 16, COLUMNS, SamplingParams())
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


def test_more_sequences_than_the_cache_holds_wait_and_one_too_long_is_told(tmp_path: Path) -> None:
    decoder = stage(save_lm(tmp_path / "model"))
    prompts = [Request([1] * n, n) for n in (2, 6, 40, 4)]
    params = SamplingParams(max_new_tokens=5)
    whole = generate(decoder, prompts, params)
    # The longest one caches 44 tokens: three pages of 16.
    few = generate(decoder, prompts, params, passes=ModelRunner(decoder, page=16), pages=3)
    assert [r.tokens for r in few] == [r.tokens for r in whole]
    words = r"prompt 2 \(40 tokens\) and 5 new tokens does not fit .* room for 32 tokens; lower max_new"
    with pytest.raises(UserError, match=words):
        generate(decoder, prompts, params, passes=ModelRunner(decoder, page=16), pages=2)


def test_pages_are_as_many_as_the_fullest_device_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA: this rank's memory, a kept cache, and what other ranks of the run say."""
    passes = ModelRunner(stage(save_lm(tmp_path / "model")))
    passes.start((2,), 10, 16, 3, SamplingParams())
    assert passes.cache is not None
    page = (passes.cache.k.nbytes + passes.cache.v.nbytes) // 11
    world, others = SimpleNamespace(device=torch.device("cpu"), per_device=1), [-(1 << 60)]
    world.max = lambda x: torch.maximum(x, torch.tensor(others[-1]))
    use = memory.Use("model", passes.decoder.spec, Placement.default(passes.decoder.layout), 4)
    beside = sum(memory.generation_passes(use, 0, 40, 2).values())
    monkeypatch.setattr(cache_memory, "cache_memory", lambda *_: beside + 8 * page - 1)

    def fitting(wanted: int) -> int:
        return cache_memory.fitting_pages(passes, wanted, 16, cast(Any, world), (40, 2, 0))

    assert fitting(12) == 12  # a CPU has what is wanted
    passes.decoder = cast(Any, Cuda(passes.decoder))
    assert fitting(10) == 10  # the kept cache has them
    assert fitting(0) == 1 << 60  # a replica without requests holds up nobody
    assert passes.cache is not None
    assert fitting(11) == 6  # it was given back; one page is nobody's
    assert passes.cache is None
    others.append(-4)
    assert fitting(11) == 4


def test_graphs_go_on_while_nothing_that_they_read_has_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recordings launch their pass, but only while all addresses are those that they were made with: a graph
    would read what lies there now."""
    addresses: dict[Any, list[int]] = {}

    def read(self: engine_passes.CudaGraphDecode) -> list[int]:
        tensors = [*self.decoder.parameters(), self.cache.k, self.cache.v, self.state, self.table]
        return [x.data_ptr() for x in tensors]

    def record(self: engine_passes.CudaGraphDecode) -> None:
        self.passes.captures += 1
        made, params = read(self), self.passes.params

        def replay() -> None:
            assert read(self) == made
            assert (self.passes.params.greedy, self.passes.params.top_k) == (params.greedy, params.top_k)
            self.out = self._pass()

        self.graph = cast(Any, SimpleNamespace(replay=replay))

    monkeypatch.setattr(engine_passes.CudaGraphDecode, "record", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: addresses.setdefault(len(addresses), []))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    decoder = stage(save_lm(tmp_path / "model"))
    prompts = [Request([7 + n] * n, n) for n in (2, 6, 19, 4)]
    params = SamplingParams(max_new_tokens=5)
    greedy = SamplingParams(max_new_tokens=5, greedy=True)

    def tokens(passes: ModelRunner | None, asked: list[Request], how: SamplingParams) -> list[list[int]]:
        return [answer.tokens for answer in generate(decoder, asked, how, passes=passes)]

    truth, likeliest = tokens(None, prompts, params), tokens(None, prompts, greedy)
    passes = ModelRunner(decoder, page=16, room=engine_passes.Room(4, 2, 9))
    passes.graphs = True
    counts = []
    for asked, how in (
        (prompts, params),
        (prompts, params),
        (prompts[:2], params),  # fewer rows, shorter prompts
        (prompts, greedy),
        (prompts, params),
    ):
        assert tokens(passes, asked, how) == (likeliest if how is greedy else truth)[: len(asked)]
        passes.rest()
        counts.append(passes.captures)
    assert counts == [1, 1, 2, 3, 3]  # four rows; two rows; four rows drawn in another way
    weight = next(decoder.parameters())
    weight.data = weight.data.clone()
    assert tokens(passes, prompts, params) == truth
    assert passes.captures == 4
    passes.release()
    assert passes.cache is None
    assert tokens(passes, prompts, params) == truth
    assert passes.captures == 5
    lent = ModelRunner(decoder, page=16, room=engine_passes.Room(4, 2))
    lent.graphs = True
    for count in (1, 2):
        assert tokens(lent, prompts, params) == truth
        assert lent.captures == count
        lent.rest()
        assert lent.cache is None


def test_graphs_are_made_where_they_can_hold_the_collectives(tmp_path: Path) -> None:
    decoder = stage(save_lm(tmp_path / "model"))
    on_gpu = cast(Any, Cuda(decoder))
    for recordable in (True, False):
        on_gpu.group = SimpleNamespace(recordable=recordable)
        assert ModelRunner(on_gpu).graphs == recordable
        assert not ModelRunner(on_gpu, graphs=False).graphs
    assert not ModelRunner(decoder).graphs


def test_what_one_rank_has_to_record_anew_all_do(tmp_path: Path) -> None:
    """A kept cache serves whoever has room in it alone; if any rank's memory has moved, all begin anew."""
    passes = ModelRunner(stage(save_lm(tmp_path / "model")), room=engine_passes.Room(2, 3, 10))
    told: list[int] = []

    def most(x: torch.Tensor) -> torch.Tensor:
        told.append(int(x))
        return torch.maximum(x, torch.tensor(others.pop(0)))

    world = SimpleNamespace(device=torch.device("cpu"), per_device=1, max=most)
    passes.start((2,), 10, 16, 3, SamplingParams())
    decoder = passes.decoder
    passes.decoder = cast(Any, Cuda(decoder))
    others = [0, -(1 << 60)]
    assert cache_memory.fitting_pages(passes, 99, 16, cast(Any, world), (40, 2, 0), least=10) == 10
    others = [0, -(1 << 60)]
    assert cache_memory.fitting_pages(passes, 0, 16, cast(Any, world), (40, 2, 0)) == 1 << 60
    assert passes.cache is not None
    assert told == [0, -10, 0, -(1 << 60)]
    others = [1, -7]
    assert cache_memory.fitting_pages(passes, 0, 16, cast(Any, world), (40, 2, 0)) == 7
    assert passes.cache is None
    passes.decoder = decoder
    passes.start((2,), 10, 16, 3, SamplingParams())
    weight = next(decoder.parameters())
    weight.data = weight.data.clone()
    told.clear()
    passes.decoder = cast(Any, Cuda(decoder))
    others = [0, -7]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_memory, "cache_memory", lambda *_: 1 << 40)
        assert cache_memory.fitting_pages(passes, 10, 16, cast(Any, world), (40, 2, 0), least=3) == 7
    assert told[0] == 1


class Cuda:
    """A decoder that says that it is on a GPU."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self.device = decoder, torch.device("cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


@pytest.mark.parametrize("lends", [True, False])
def test_unused_memory_is_given_back_where_torch_cannot_use_it(
    lends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device of 1000 bytes: 300 hold tensors, 500 are kept by torch, 200 are free."""
    kept = [500]

    def empty() -> None:
        kept.append(0)

    monkeypatch.setattr(cache_memory, "lends_pages", lambda: lends)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 300)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 300 + kept[-1])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (700 - kept[-1], 1000))
    monkeypatch.setattr(torch.cuda, "empty_cache", empty)
    device = torch.device("cuda", 0)
    most = int(700 - 1000 * KEPT_FREE)
    for enough, gives_back in ((1, not lends), (most, not lends), (most + 1, True)):
        kept[:] = [500]
        assert cache_memory.cache_memory(device, enough) == most
        assert (kept[-1] == 0) == gives_back
    kept[:] = [500]
    alone = int((200 - 1000 * KEPT_FREE) / 2)  # of what is free, where two ranks have the device
    assert cache_memory.cache_memory(device, 1, 2) == (500 + alone if lends else most // 2)
    kept[:] = [0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5, 1000))  # others have taken the rest
    assert cache_memory.cache_memory(device, 1) == 0


def test_a_cache_is_kept_while_it_is_large_enough(tmp_path: Path) -> None:
    """For more pages there is a new one, for more rows or longer ones a new block table; `release` gives both
    back."""
    passes, params = ModelRunner(stage(save_lm(tmp_path / "model"))), SamplingParams()
    passes.start((2, 1), 20, 8, 2, params)
    for groups, pages, page, columns, kept, shape in (
        ((2, 1), 20, 8, 2, True, (21, 8, 3, 2)),
        ((1, 1), 19, 8, 1, True, (21, 8, 3, 2)),
        ((2, 2), 20, 8, 2, True, (21, 8, 4, 2)),
        ((4,), 20, 8, 3, True, (21, 8, 4, 3)),
        ((4,), 21, 8, 3, False, (22, 8, 4, 3)),
        ((4,), 21, 8, 3, True, (22, 8, 4, 3)),
        ((4,), 21, 4, 3, False, (22, 4, 4, 3)),
    ):
        before = passes.cache
        passes.start(groups, pages, page, columns, params)
        assert passes.cache is not None
        assert (passes.cache is before) == kept
        assert (*passes.cache.k.shape[2:4], *passes.table.shape) == shape
        assert passes.state.shape == (4, shape[2])
        assert passes.state[1].tolist() == [engine_passes.INACTIVE] * shape[2]
    assert passes.page_for(3) == 4
    assert passes.page_for(5) == 5
    assert ModelRunner(passes.decoder, page=2).page_for(5) == 2
    passes.release()
    assert passes.cache is None


def test_buckets_hold_their_rows() -> None:
    sizes = [bucket(rows) for rows in range(1, 1025)]
    assert sizes[:17] == [1, 2, 4, 4, 8, 8, 8, 8, 16, 16, 16, 16, 16, 16, 16, 16, 32]
    assert all(rows <= size < 2 * rows for rows, size in enumerate(sizes, 1))
    assert all(size <= rows * 5 // 4 for rows, size in enumerate(sizes[256:], 257))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 17
