"""What passes save for their backward passes, beside what autograd saves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from puzzle.model.decoder import Decoder
from puzzle.model.linear import Weight
from puzzle.model.parallel import TensorGroup
from puzzle.plan import memory
from puzzle.plan.layout import Coord, Layout, Placement
from puzzle.spec.lora import Lora
from puzzle.spec.model import ModelSpec
from tests.helpers import run_ranks
from tests.plan.measures import peak_in_flight
from tests.plan.memories import LENGTH, PROMPT, RESPONSE, ROWS, batch_of, built, loss_of, spec_of
from tests.plan.single import one_f_one_b


def saved(
    rank: int,
    spec: ModelSpec,
    layout: Layout,
    dtype: torch.dtype,
    recompute: bool,
    compiled: bool = False,
    prompt: int = PROMPT,
) -> int:
    """Bytes that a forward pass of this stage saves for its backward pass, weights left out."""
    model = built(rank, spec, layout, dtype, recompute)
    if compiled:
        model.stage.compile_layers()
    batch = batch_of(model)
    decoder = model.decoder
    x = batch.tokens_T
    if not decoder.first:
        x = torch.randn(len(x) // layout.tp, spec.hidden_size).to(dtype).requires_grad_()
    weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack_hook(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        out = decoder(x, batch)
        if decoder.last:
            out = loss_of(model, batch.tokens_T, prompt)(0, out)
        else:
            pack_hook(out)  # kept for the gradient that comes back
    return sum(sizes.values())


@pytest.mark.parametrize(
    ("layout", "changes", "dtype", "recompute"),
    [
        (Layout.even(1, 1, 1, 4), {}, torch.float32, False),
        (Layout.even(1, 1, 1, 4), {}, torch.bfloat16, True),
        (Layout.even(1, 1, 1, 4), {"value": True}, torch.bfloat16, False),
        (Layout.even(1, 1, 1, 4), {"model_type": "qwen3", "head_dim": 8}, torch.bfloat16, False),
        (Layout.even(2, 1, 1, 4), {}, torch.float32, False),
        (Layout.even(2, 1, 1, 4), {}, torch.bfloat16, True),
        (Layout.even(4, 1, 1, 4), {"value": True}, torch.bfloat16, False),
        (Layout(1, 3, 1, (1, 2, 1)), {}, torch.bfloat16, False),
        (Layout.even(1, 1, 1, 4), {"lora": Lora(32, 8.0)}, torch.float32, False),
        (Layout.even(2, 1, 1, 4), {"lora": Lora(32, 8.0, ("v_proj", "o_proj"))}, torch.bfloat16, False),
    ],
    ids=str,
)
def test_activations_are_what_autograd_saves(
    layout: Layout, changes: dict, dtype: torch.dtype, recompute: bool
) -> None:
    spec = spec_of(**changes)
    use = memory.Use("actor", spec, Placement.default(layout), dtype.itemsize, True, recompute, fused=False)
    for rank, found in enumerate(run_ranks(saved, layout.world, spec, layout, dtype, recompute)):
        one = memory.Activations(use, layout.coord(rank).p, ROWS * LENGTH, ROWS * RESPONSE)
        assert one.saved() == pytest.approx(found, rel=0.1)


def differences(rank: int, shapes: list[dict], dtype: torch.dtype) -> list[int]:
    """Saved bytes of each shape more than of the first."""
    layout = Layout.even(1, 1, 1, 4)
    found = [saved(rank, spec_of(**shape), layout, dtype, False) for shape in shapes]
    return [size - found[0] for size in found]


SHAPES: list[dict] = [
    {},
    {"num_attention_heads": 16, "head_dim": 4, "num_key_value_heads": 4},  # as wide, twice the heads
    {"num_attention_heads": 4, "head_dim": 8},  # half the queries
    {"num_key_value_heads": 8},
    {"num_key_value_heads": 1},
    {"intermediate_size": 160},
    {"vocab_size": 515},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_head_or_a_column_more_costs_is_what_autograd_saves(dtype: torch.dtype) -> None:
    """To the byte, where sums of all terms would hide a small one: heads, keys, the width of the ffn."""
    layout = Layout.even(1, 1, 1, 4)
    sizes = []
    for shape in SHAPES:
        spec = spec_of(**shape)
        use = memory.Use("actor", spec, Placement.default(layout), dtype.itemsize, True, fused=False)
        sizes.append(memory.Activations(use, 0, ROWS * LENGTH, ROWS * RESPONSE).saved())
    assert [size - sizes[0] for size in sizes] == differences(0, SHAPES, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_an_answer_more_costs_is_what_autograd_saves(dtype: torch.dtype) -> None:
    layout, spec = Layout.even(1, 1, 1, 4), spec_of()
    use = memory.Use("actor", spec, Placement.default(layout), dtype.itemsize, True, fused=False)
    sizes = [
        (
            saved(0, spec, layout, dtype, False, prompt=prompt),
            memory.Activations(use, 0, ROWS * LENGTH, ROWS * (LENGTH - prompt)).saved(),
        )
        for prompt in (PROMPT, PROMPT + 9)
    ]
    assert sizes[0][0] - sizes[1][0] == sizes[0][1] - sizes[1][1] > 0


def test_a_gradient_of_the_largest_weight_comes_and_goes_unless_its_product_adds_it_up() -> None:
    """Of half-precision weights without kernels; in float32 and with kernels it is never there."""
    spec, layout = spec_of(vocab_size=515), Layout.even(1, 2, 1, 4)
    for p in range(2):
        largest = max(x.numel() for x in built_stage(spec, layout, p))
        sizes = {
            (item, fused): memory.Activations(
                memory.Use("actor", spec, Placement.default(layout), item, True, fused=fused), p, 96, 48
            ).transient()
            for item in (2, 4)
            for fused in (False, True)
        }
        assert sizes[2, False] - sizes[2, True] == 2 * largest
        assert sizes[4, False] == sizes[4, True] == 2 * sizes[2, True]


def built_stage(spec: ModelSpec, layout: Layout, p: int) -> list[Tensor]:
    group = TensorGroup()
    return list(Decoder(spec, layout, Coord(0, p, 0), group).parameters())


def waiting(rank: int, spec: ModelSpec, layout: Layout, dtype: torch.dtype) -> int:
    """Bytes that wait for the weights' gradients after the first part of a split backward of this stage."""
    model = built(rank, spec, layout, dtype)
    decoder, batch, sizes = model.decoder, batch_of(model), {}

    def sink(*matrices: Tensor) -> None:
        sizes.update((m.untyped_storage().data_ptr(), m.untyped_storage().nbytes()) for m in matrices)

    for weight in decoder.parameters():
        if isinstance(weight, Weight):
            weight.sink = sink
    x = batch.tokens_T
    if not decoder.first:
        x = torch.randn(len(x), spec.hidden_size).to(dtype).requires_grad_()
    out = decoder(x, batch)
    received = None if decoder.last else torch.randn_like(out)
    if decoder.last:
        out = loss_of(model, batch.tokens_T)(0, out)
    with decoder.later.deferring() as products:
        torch.autograd.backward(out, received)
    assert not sizes
    for add in products:
        add()
    return sum(sizes.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_waits_is_what_products_read(dtype: torch.dtype) -> None:
    spec, layout = spec_of(), Layout(1, 3, 1, (1, 2, 1))
    use = memory.Use("actor", spec, Placement.default(layout), dtype.itemsize, True, split=True)
    for rank, found in enumerate(run_ranks(waiting, 3, spec, layout, dtype)):
        one = memory.Activations(use, layout.coord(rank).p, ROWS * LENGTH, ROWS * RESPONSE)
        assert one.deferred() == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("minibatch", [1, 3, 8])
def test_split_backwards_hold_what_their_schedule_keeps(minibatch: int) -> None:
    """Byte by byte as the checker counts them; of short runs no less."""
    work = memory.Work(batch=8, minibatch=minibatch, prompt=16, response=16, microbatch=1)
    use = memory.Use("actor", spec_of(), Placement.default(Layout.even(1, 4, 1, 4)), 2, True, split=True)
    one = [memory.Activations(use, p, 32, 16) for p in range(4)]
    weight, deferred = {"actor": [x.saved() for x in one]}, {"actor": [x.deferred() for x in one]}
    kept = peak_in_flight(one_f_one_b(4, minibatch, split=True), weight, deferred)
    ranks = [memory.rank_memory(rank, [use], use, work, memory.Switched(), False) for rank in range(4)]
    found = [rank.stages["training"]["actor activations"] for rank in ranks]
    assert all(a >= b for a, b in zip(found, kept, strict=True))
    if minibatch == 8:
        assert found == list(kept)


def test_stages_hold_as_many_microbatches_as_1f1b_keeps() -> None:
    spec, layout = spec_of(), Layout.even(1, 4, 1, 4)
    use = memory.Use("actor", spec, Placement.default(layout), 2, trained=True)
    work = memory.Work(batch=8, minibatch=8, prompt=16, response=16, microbatch=1)
    ranks = [memory.rank_memory(rank, [use], use, work, memory.Switched(), False) for rank in range(4)]
    found = [rank.stages["training"]["actor activations"] for rank in ranks]
    one = [memory.Activations(use, p, 32, 16).saved() for p in range(4)]
    assert found == [4 * one[0], 3 * one[1], 2 * one[2], one[3]]


@pytest.mark.long
@pytest.mark.parametrize("tp", [1, 2])
def test_compiled_layers_save_less(tp: int) -> None:
    spec, layout = spec_of(intermediate_size=192), Layout.even(tp, 1, 1, 4)
    placement = Placement.default(layout)
    eager, compiled = (memory.Use("actor", spec, placement, 2, True, compiled=c) for c in (False, True))
    (found, *_) = run_ranks(saved, tp, spec, layout, torch.bfloat16, False, True)
    sizes = [memory.Activations(use, 0, ROWS * LENGTH, ROWS * RESPONSE).saved() for use in (compiled, eager)]
    assert sizes[0] == pytest.approx(found, rel=0.03)
    assert sizes[1] > 1.1 * found
