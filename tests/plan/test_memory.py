"""Memory formulas against the tensors that real ranks hold and save."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.engine.pipeline.pipeline import Pipeline, PipelineInput
from puzzle.engine.train.zero_adamw import AdamWSettings
from puzzle.model import logprobs
from puzzle.plan import memory
from puzzle.plan.activations import LOGITS_BLOCK
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.pipeline import schedules
from puzzle.plan.pipeline.schedules import PipelineModel
from puzzle.rlhf.balance import balanced, contiguous
from puzzle.rlhf.microbatches import microbatches
from puzzle.spec.lora import Lora
from puzzle.spec.model import ModelSpec
from tests.helpers import run_ranks
from tests.plan.measures import peak_in_flight
from tests.plan.memories import batch_of, built, loss_of, spec_of

EIGHT = [(t, p, 8 // t // p) for t in (1, 2) for p in (1, 2, 4, 8) if t * p <= 8]
SETTINGS = AdamWSettings(lambda step: 1e-3)


def held(rank: int, spec: ModelSpec, layout: Layout, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of what a rank holds during a step."""
    model = built(rank, spec, layout, dtype)
    model.attach_optimizer(SETTINGS, bucket=20_000)
    batch = batch_of(model)
    Pipeline([model]).train([PipelineInput(model, [batch], loss_of(model, batch.tokens_T))])
    optimizer = model.optimizer
    assert optimizer is not None
    weights = list(model.decoder.parameters())
    inside = {p.untyped_storage().data_ptr() for p in weights}
    masters = [m for m in optimizer.masters if m.untyped_storage().data_ptr() not in inside]
    moments = [t for state in optimizer.adam.state.values() for t in state.values() if t.dim()]
    buffers = {id(t): t for b in optimizer.buckets for t in (b.grads, b.shard) if t is not None}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in buffers.values()}
    cache = model.decoder.new_cache(3, 20)  # pages and their positions
    return {
        "weights": sum(p.nbytes for p in weights),
        "masters": sum(m.nbytes for m in masters),
        "moments": sum(m.nbytes for m in moments),
        "gradients": sum(storages.values()),
        "kv": cache.k.nbytes + cache.v.nbytes,
    }


@pytest.mark.parametrize(
    ("layout", "changes", "dtype"),
    [
        (Layout.even(1, 1, 1, 4), {}, torch.float32),
        (Layout(2, 2, 1, (3, 1)), {"tie_word_embeddings": True}, torch.bfloat16),
        (Layout.even(1, 1, 3, 4), {"value": True}, torch.bfloat16),
        (Layout.even(4, 1, 1, 4), {"model_type": "qwen2"}, torch.float32),
        (Layout.even(1, 2, 2, 4), {"model_type": "qwen3", "head_dim": 8}, torch.float32),
        (Layout.even(2, 1, 2, 4), {"lora": Lora(5, 8.0)}, torch.bfloat16),
        (
            Layout.even(1, 2, 1, 4),
            {"lora": Lora(3, 8.0, ("q_proj", "down_proj")), "value": True},
            torch.float32,
        ),
    ],
    ids=str,
)
def test_resident_bytes_are_those_of_real_tensors(layout: Layout, changes: dict, dtype: torch.dtype) -> None:
    spec = spec_of(**changes)
    use = memory.Use("actor", spec, Placement.default(layout), dtype.itemsize, trained=True, fused=False)
    for rank, found in enumerate(run_ranks(held, layout.world, spec, layout, dtype)):
        coord = layout.coord(rank)
        assert found == {
            "weights": memory.weight_bytes(spec, layout, coord, dtype.itemsize),
            **memory.state_bytes(use, coord),
            "gradients": memory.gradient_bytes(use, coord),
            "kv": memory.kv_bytes(spec, layout, coord.p, 3 * 20, dtype.itemsize),
        }


def test_a_rank_holds_what_its_models_need_and_a_stage_what_comes_beside() -> None:
    """Term by term: a trained actor, a reference, generation in another layout; then all that may be away."""
    layout = Layout.even(1, 2, 1, 4)
    plain = [
        memory.Use("actor", spec_of(), Placement.default(layout), 2, trained=True),
        memory.Use("reference", spec_of(), Placement.default(layout), 2),
    ]
    generation = memory.Use("generation", spec_of(), Placement.default(Layout.even(2, 1, 1, 4)), 2)
    work = memory.Work(batch=8, minibatch=4, prompt=16, response=16, microbatch=1)
    switched = memory.Switched(weights=3, filling=5, deferred_gather=7)
    for rank in range(2):
        coord = layout.coord(rank)
        weights = memory.weight_bytes(spec_of(), layout, coord, 2)
        states = {f"actor {name}": n for name, n in memory.state_bytes(plain[0], coord).items()}
        gradients = {"actor gradients": memory.gradient_bytes(plain[0], coord)}
        held = memory.rank_memory(rank, plain, generation, work, switched, False)
        assert held.resident == {"actor weights": weights, "reference weights": weights, **states}
        assert held.host == 0
        assert held.stages["switch"] == {"generation weights and staging": 5}
        made = held.stages["generation"]
        assert (made["generation weights"], made["actor deferred all-gather"]) == (3, 7)
        # Nine pages of 128 positions: one for each sequence, and one that is nobody's.
        assert made["generation kv cache"] == 2 * 2 * 4 * 1 * 8 * 9 * 128
        assert held.stages["training"].items() >= gradients.items()
        assert list(held.stages["inference"]) in ([f"{u.name} {what}"] for u in plain for what in WHAT)
        for stage, terms in held.stages.items():
            assert held.total(stage) == sum(held.resident.values()) + sum(terms.values())
        assert held.peak == max(map(held.total, held.stages))
        assert held.total(held.worst) == held.peak
        away = [replace(use, offload=True) for use in plain]
        less = memory.rank_memory(rank, away, generation, work, switched, False)
        assert less.resident == {"actor weights": weights}
        assert less.host == weights + sum(states.values())
        assert less.stages["switch"] == {"generation weights and staging": 5, **states}
        assert less.stages["generation"] == made
        assert less.stages["inference"] == {"reference weights": weights, **held.stages["inference"]}
        assert less.stages["training"] == {**states, **held.stages["training"]}


WHAT = ("one layer", "logits")


def test_limits_are_those_of_who_keeps_them() -> None:
    """Rooms of torch, from which plans import nothing."""
    assert LOGITS_BLOCK == logprobs.BLOCK


def test_logits_of_a_pass_are_two_blocks_or_one_beside_the_gradients_made_of_it() -> None:
    """float32 logits of all answers, up to a limit; their gradients in half precision, the head's, and those
    of hidden states, summed in float32 and then halved. A stage before the last has none."""
    layout = Layout.even(1, 2, 1, 4)
    for answers, vocabulary in ((48, 259), (1, 259), (5000, 259), (1 << 16, 515)):
        spec = spec_of(vocab_size=vocabulary)
        block = 4 * min(1 << 24, answers * vocabulary)
        for item, trained in ((2, False), (2, True), (4, True)):
            use = memory.Use("actor", spec, Placement.default(layout), item, trained)
            head, hidden = vocabulary * 64 * item, answers * 64 * (4 + item)
            needed = max(2 * block, block + block // (4 // item) + head + hidden) if trained else 2 * block
            assert memory.Activations(use, 1, 2 * answers, answers).logits() == needed
            assert memory.Activations(use, 0, 2 * answers, answers).logits() == 0
    value = memory.Use("critic", spec_of(value=True), Placement.default(layout), 2, True)
    assert memory.Activations(value, 1, 96, 48).logits() == 0


@pytest.mark.parametrize(("prefill", "decode"), [(None, None), (1, 3), (100, 100)])
@pytest.mark.parametrize("vocabulary", [259, 100_003])
def test_a_generating_rank_has_a_prefill_pass_or_the_logits_of_a_decode_pass(
    prefill: int | None, decode: int | None, vocabulary: int
) -> None:
    """Of 10 sequences on two replicas of two stages: five each, in passes of three where nothing is said."""
    spec, layout = spec_of(vocab_size=vocabulary), Layout.even(1, 2, 2, 4)
    work = memory.Work(
        batch=10, minibatch=2, prompt=24, response=8, microbatch=1, prefill=prefill, decode=decode
    )
    rows, share = min(5, prefill or 3), min(5, decode or 3)
    for fused in (False, True):
        use = memory.Use("generation", spec, Placement.default(layout), 2, trained=True, fused=fused)
        for rank in range(4):
            held = memory.rank_memory(rank, [use], use, work, memory.Switched(), False).stages["generation"]
            p = layout.coord(rank).p
            layer = memory.Activations(use, p, 24 * rows, 0).forward()
            logits = (1 if fused else 4) * 4 * share * vocabulary if p == 1 else 0
            # A page of 128 for each sequence, or of its 31 positions; and one that is nobody's.
            assert held["generation kv cache"] == 2 * 2 * 2 * 2 * 8 * 6 * (128 if fused else 31)
            terms = {name: n for name, n in held.items() if name.endswith(WHAT)}
            assert list(terms.values()) == [max(layer, logits)]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(("prompt", "copied"), [(999, 0), (1000, 0), (3001, 3001)])
def test_a_long_prompt_needs_one_part_and_a_copy_of_what_is_cached(prompt: int, copied: int, tp: int) -> None:
    """A prefill pass has 1000 tokens at most; behind others the keys and values of a layer stand twice."""
    spec, layout = spec_of(vocab_size=16), Layout.even(tp, 1, 1, 4)
    work = memory.Work(batch=6, minibatch=2, prompt=prompt, response=8, prefill_tokens=1000)
    use = memory.Use("generation", spec, Placement.default(layout), 2, trained=True, fused=True)
    held = memory.rank_memory(0, [use], use, work, memory.Switched(), False).stages["generation"]
    layer = memory.Activations(use, 0, min(prompt, 1000), 0).forward()
    each = spec.num_kv_heads // tp * spec.head_dim * 2
    assert held["generation one layer"] == layer + 2 * copied * each


@pytest.mark.parametrize(("minibatch", "microbatch"), [(8, 1), (2, 1), (6, 2), (3, 1)])
def test_models_in_one_stream_hold_what_its_schedule_keeps(minibatch: int, microbatch: int) -> None:
    """As many bytes as the sequential stream whose larger model leads; no stream holds more."""
    work = memory.Work(batch=8, minibatch=minibatch, prompt=16, response=16, microbatch=microbatch)
    actor = memory.Use("actor", spec_of(), Placement.default(Layout.even(1, 4, 1, 4)), 2, trained=True)
    small = spec_of(value=True, hidden_size=32)
    critic = memory.Use("critic", small, Placement.default(Layout.even(1, 4, 1, 4)), 2, trained=True)
    rows = microbatch
    sizes = {
        use.name: [memory.Activations(use, p, 32 * rows, 16 * rows).saved() for p in range(4)]
        for use in (actor, critic)
    }
    models = [PipelineModel(name, minibatch // microbatch) for name in sizes]
    found = []
    for rank in range(4):
        terms = memory.rank_memory(rank, [actor, critic], actor, work, memory.Switched(), True).stages[
            "training"
        ]
        found.append(sum(size for name, size in terms.items() if name.endswith("activations")))
    for order in ("sequential", "alternating"):
        peaks = peak_in_flight(schedules.one_f_one_b(models, 4, order), sizes)
        assert all(peak <= limit for peak, limit in zip(peaks, found, strict=True))
        if order == "sequential":
            assert list(peaks) == found


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 12)), min_size=1, max_size=24),
    st.integers(1, 60),
    st.integers(1, 4),
    st.booleans(),
)
def test_no_pass_is_larger_than_forecast(
    sizes: list[tuple[int, int]], limit: int, dp: int, by_tokens: bool
) -> None:
    """Whatever prompts (up to 8 tokens) and responses (up to 12), by rows or by tokens, at every moment."""
    dp = min(dp, len(sizes))
    options = {"microbatch_tokens": limit} if by_tokens else {"microbatch": limit}
    work = memory.Work(len(sizes), len(sizes), prompt=8, response=12, **options)
    use = memory.Use("actor", spec_of(), Placement.default(Layout.even(1, 1, dp, 4)), 2, trained=True)
    most, count = memory.largest_pass(use, work, 0, len(sizes))
    lengths = [sum(size) for size in sizes]
    for shares in (balanced(lengths, dp), contiguous(len(sizes), dp)):
        for part in shares:
            limits = (options.get("microbatch"), options.get("microbatch_tokens"))
            cut = microbatches(part, [lengths[i] for i in part], *limits)
            tokens = [sum(lengths[i] for i in rows) for rows in cut]
            assert max(tokens) <= most.T
            assert max(sum(sizes[i][1] for i in rows) for rows in cut) <= most.answers
            for held in range(1, len(cut) + 1):  # so many are held before their backward passes
                largest = max(sum(tokens[i : i + held]) for i in range(len(tokens) - held + 1))
                assert largest <= min(held, count) * most.T


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_ranks_of_one_kind_hold_the_same(data: st.DataObject) -> None:
    """Trained models in layouts of eight ranks, one that is not in its own, generation in a third."""
    drawn = [Layout.even(*data.draw(st.sampled_from(EIGHT)), 8) for _ in range(4)]
    spec = replace(spec_of(), num_layers=8)
    uses = [
        memory.Use(name, spec, Placement.default(layout), 2, trained=name != "reference")
        for name, layout in zip(("actor", "critic", "reference"), drawn, strict=False)
    ]
    generation = memory.Use("generation", spec, Placement.default(drawn[3]), 2)
    work = memory.Work(batch=24, minibatch=24, prompt=16, response=16, microbatch=1)
    fused = drawn[0].pp == drawn[1].pp
    kinds: dict[tuple[int, ...], memory.RankMemory] = {}
    for rank in range(8):
        found = memory.rank_memory(rank, uses, generation, work, memory.Switched(3, 5), fused)
        same = kinds.setdefault(memory.kind_of_rank(rank, uses, generation), found)
        assert replace(same, rank=rank) == found
