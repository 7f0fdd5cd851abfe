"""The optimizer by itself: sums of gradients, who counts what, and steps against AdamW in float64."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.pipeline.pipeline import Pipeline, PipelineInput
from puzzle.engine.runtime.world import World
from puzzle.engine.train.grad_buckets import Bucket, fill_buckets
from puzzle.engine.train.zero_adamw import AdamWSettings, ZeroAdamW
from puzzle.model.decoder import Decoder
from puzzle.model.packing import pack
from puzzle.model.parallel import TensorGroup
from puzzle.model.weights import initialise
from puzzle.plan.layout import Coord, Layout, Placement
from puzzle.plan.pipeline.actions import Op
from puzzle.spec.model import ModelSpec

SIZES = {
    "model_type": "qwen2",  # has biases
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TEXTS = [[1, 2, 3, 4], [9, 8, 7], [5, 60, 11, 12, 13]]


def runtime(settings: AdamWSettings, dtype: torch.dtype, spec: ModelSpec | None = None) -> ModelRuntime:
    spec = spec or ModelSpec.from_hf(SIZES)
    placement = Placement.default(Layout.even(1, 1, 1, spec.num_layers))
    made = ModelRuntime("actor", spec, placement, World(0, 1, torch.device("cpu")), dtype)
    initialise(made.decoder, 0)
    made.attach_optimizer(settings)
    return made


def train(model: ModelRuntime, factor: float = 1.0) -> None:
    """A step on the three texts, one a pass."""

    def loss_fn(index: int, hidden: Tensor) -> Tensor:
        places = torch.arange(len(TEXTS[index]) - 1)
        targets = torch.tensor(TEXTS[index][1:])
        return -factor * model.decoder.token_stats(hidden, places, targets).logprobs.sum()

    Pipeline([model]).train([PipelineInput(model, [pack([text]) for text in TEXTS], loss_fn)])


def optimizer_of(model: ModelRuntime) -> ZeroAdamW:
    assert model.optimizer is not None
    return model.optimizer


class TextbookAdamW:
    """Loshchilov and Hutter 2019, algorithm 2, in float64; gradients clipped to a norm before."""

    def __init__(self, weights: dict[str, np.ndarray], settings: AdamWSettings) -> None:
        self.weights, self.settings, self.steps = weights, settings, 0
        self.m = {name: np.zeros_like(w) for name, w in weights.items()}
        self.v = {name: np.zeros_like(w) for name, w in weights.items()}

    def step(self, grads: dict[str, np.ndarray]) -> float:
        s, lr = self.settings, self.settings.lr_at(self.steps)
        self.steps += 1
        norm = float(np.sqrt(sum((g**2).sum() for g in grads.values())))
        share = 1.0 if s.grad_clip is None else min(1.0, s.grad_clip / norm)
        for name, weight in self.weights.items():
            grad = share * grads[name]
            self.m[name] = s.betas[0] * self.m[name] + (1 - s.betas[0]) * grad
            self.v[name] = s.betas[1] * self.v[name] + (1 - s.betas[1]) * grad**2
            m = self.m[name] / (1 - s.betas[0] ** self.steps)
            v = self.v[name] / (1 - s.betas[1] ** self.steps)
            decay = 0.0 if "norm" in name or "bias" in name else s.weight_decay
            weight -= lr * (m / (np.sqrt(v) + s.eps) + decay * weight)
        return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clip", [None, 0.3, 1e3], ids=str)
def test_steps_are_those_of_the_textbook(dtype: torch.dtype, clip: float | None) -> None:
    """Decay of matrices alone, a rate for every step, bias corrections, the clipped norm; bf16 weights are
    rounded masters, which go on from their own digits."""
    rates = [3e-3, 1e-5, 2e-3, 4e-3]
    settings = AdamWSettings(lambda step: rates[step], (0.8, 0.95), 1e-6, weight_decay=0.2, grad_clip=clip)
    model = runtime(settings, dtype)
    optimizer = optimizer_of(model)
    with torch.no_grad():  # a master that decays is not to be mistaken for one that does not
        for master in optimizer.masters:
            master.add_(0.5)
    names = [slot.local.name for slot in optimizer.slots]
    start = {n: m.double().numpy().copy() for n, m in zip(names, optimizer.masters, strict=True)}
    truth = TextbookAdamW(start, settings)
    norms: list[float] = []

    def step() -> None:
        """Before the optimizer's own, which divides gradients where they lie."""
        norms.append(truth.step({n: g.double().numpy().copy() for n, g in optimizer.gradients().items()}))

    optimizer.before_use = step
    for _ in rates:
        train(model)
        for name, master in zip(names, optimizer.masters, strict=True):
            assert master.dtype == torch.float32
            np.testing.assert_allclose(master.numpy(), truth.weights[name], rtol=3e-5, atol=1e-6)
        for slot, master in zip(optimizer.slots, optimizer.masters, strict=True):
            assert torch.equal(slot.param.detach(), master.to(dtype))
    assert optimizer.pop_grad_norms() == pytest.approx(norms, rel=1e-5)
    assert optimizer.steps == len(rates)
    assert clip is None or (min(norms) > clip) == (clip < 1)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])  # the last: squares beyond float32
def test_a_norm_that_is_not_finite_leaves_everything_as_it_is(clip: float | None, bad: float) -> None:
    model = runtime(AdamWSettings(lambda step: 1e-2, grad_clip=clip), torch.float32)
    optimizer = optimizer_of(model)
    train(model)
    states = lambda: [t.clone() for t in [*model.stage.parameters(), *optimizer.state_tensors()]]  # noqa: E731
    before = states()
    train(model, bad)
    assert all(map(torch.equal, before, states()))
    train(model)
    assert not any(map(torch.equal, before, states()))


def test_gradients_are_summed_in_float32() -> None:
    """400 ones, which stop at 256 in bfloat16; the first gradient of a step replaces what lay there."""
    model = runtime(AdamWSettings(lambda step: 1e-3), torch.bfloat16)
    params = [(s, model.stage.get_parameter(s.name)) for s in model.stage.storages]
    (bucket,) = fill_buckets(params, 1, 0, 1 << 30)
    bucket.grads = torch.full((1, bucket.chunk), torch.nan)
    for _ in range(400):
        for slot in bucket.slots:
            matrix = slot.param.dim() > 1
            if matrix and slot.local.name != "embed":
                left = torch.ones(slot.param.shape[0], 1, dtype=torch.bfloat16)
                bucket.add_product(slot, left, torch.ones(1, slot.param.shape[1], dtype=torch.bfloat16))
            else:
                bucket.add(slot, torch.ones_like(slot.param))
    assert bucket.hits == 400 * len(bucket.slots)
    assert bucket.grads.dtype == torch.float32
    assert (bucket.grads == 400).all()


def test_buckets_hold_parameters_in_the_order_of_backward() -> None:
    model = runtime(AdamWSettings(lambda step: 1e-3), torch.float32)
    params = [(s, model.stage.get_parameter(s.name)) for s in model.stage.storages]
    for dp, limit in ((1, 2000), (3, 2000), (2, 1), (4, 1 << 30)):
        buckets = fill_buckets(params, dp, dp - 1, limit)
        slots = [slot for bucket in buckets for slot in bucket.slots]
        assert [slot.local.name for slot in slots] == [s.name for s, _ in reversed(params)]
        for bucket, following in zip(buckets, [*buckets[1:], None], strict=True):
            end = 0
            for slot in bucket.slots:  # one behind the other
                assert slot.offset == end
                end += -(-slot.local.rows // dp) * slot.local.row_size
            assert bucket.chunk == end
            assert end * dp <= limit or len(bucket.slots) == 1
            if following is not None:  # and as full as they may be
                first = following.slots[0].local
                assert (end + -(-first.rows // dp) * first.row_size) * dp > limit


class OneRank:
    """What a rank's optimizer asks of its world while it is made: no groups, for nobody answers."""

    device = torch.device("cpu")

    def groups(self, ranks: object, kind: str) -> None:
        return None


@pytest.mark.parametrize("shape", [(4, 1, 1), (2, 2, 2), (8, 1, 3), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_counts_once_in_the_norm(shape: tuple[int, int, int], tied: bool) -> None:
    """Of what several ranks hold (norms, keys of few heads, tied embeddings), one counts it; padding none."""
    sizes = {**SIZES, "num_attention_heads": 8, "num_hidden_layers": 4, "tie_word_embeddings": tied}
    spec = ModelSpec.from_hf(sizes)
    layout = Layout.even(*shape, 4)
    placement = Placement.default(layout)
    counted = {t.name: np.zeros(t.shape, np.int64) for t in spec.tensors()}
    for coord in layout.coords():
        group = TensorGroup()
        group.rank, group.size = coord.t, layout.tp
        decoder = Decoder(spec, layout, coord, group)
        params = [(s, decoder.get_parameter(s.name)) for s in decoder.storages]
        world, settings = cast(Any, OneRank()), AdamWSettings(lambda step: 1e-3)
        optimizer = ZeroAdamW("actor", spec, placement, coord, params, world, settings)
        for i, first, last in optimizer.owned:
            slot = optimizer.slots[i]
            rows = 0
            for piece in slot.local.clip(slot.low + first, slot.low + last):
                counted[piece.tensor][piece.box.slices] += 1
                rows += piece.stop - piece.start
            assert rows == last - first, "rows of padding"
    assert all((count == 1).all() for count in counted.values())


def test_a_rank_that_counts_nothing_adds_nothing_to_the_norm() -> None:
    """Of norms, which both tensor ranks hold, the first one counts all."""
    spec, found = ModelSpec.from_hf(SIZES), []
    placement = Placement.default(Layout.even(2, 1, 1, 2))
    for t in range(2):
        group = TensorGroup()
        group.rank, group.size = t, 2
        decoder = Decoder(spec, placement.layout, Coord(t, 0, 0), group)
        params = [(s, decoder.get_parameter(s.name)) for s in decoder.storages if "norm" in s.name]
        world, settings = cast(Any, OneRank()), AdamWSettings(lambda step: 1e-3)
        optimizer = ZeroAdamW("actor", spec, placement, Coord(t, 0, 0), params, world, settings)
        optimizer.begin(1)
        for _, param in params:
            (2 * param).sum().backward()
        optimizer.do(Op.NORM)
        optimizer.do(Op.WAIT_NORM)
        found += optimizer.pop_grad_norms()
    assert found == [pytest.approx(2 * (5 * 16) ** 0.5), 0.0]


def test_every_replica_gets_the_others_rows() -> None:
    """`place` of what a gather of two replicas would bring."""
    model = runtime(AdamWSettings(lambda step: 1e-3), torch.float32)
    params = [(s, model.stage.get_parameter(s.name)) for s in model.stage.storages]
    whole = [p.detach().clone() for _, p in params]
    sides = [fill_buckets(params, 2, d, 1 << 30)[0] for d in range(2)]
    chunks = torch.zeros(2, sides[0].chunk)
    for d, bucket in enumerate(sides):
        for slot in bucket.slots:
            own = slot.param[slot.low : slot.high].detach().reshape(-1)
            chunks[d, slot.offset : slot.offset + len(own)] = own
    for d, bucket in enumerate(sides):
        with torch.no_grad():
            for slot in bucket.slots:
                slot.param[: slot.low] = torch.nan
                slot.param[slot.high :] = torch.nan
        bucket.gathered = chunks.view(-1)
        bucket.place(d)
        assert bucket.gathered is None
        assert all(torch.equal(p, w) for (_, p), w in zip(params, whole, strict=True))


def test_a_bucket_takes_no_gradient_outside_of_a_step() -> None:
    model = runtime(AdamWSettings(lambda step: 1e-3), torch.float32)
    bucket = optimizer_of(model).buckets[0]
    assert isinstance(bucket, Bucket)
    with pytest.raises(AssertionError, match="backward outside of a step"):
        bucket.add(bucket.slots[0], torch.zeros_like(bucket.slots[0].param))
    optimizer_of(model).begin(2)
    with pytest.raises(AssertionError, match=r"actor: 0 gradients of \d+ arrived"):
        optimizer_of(model)._check_reduced()


def test_memory_of_gradients_is_given_back_between_steps() -> None:
    model = runtime(AdamWSettings(lambda step: 1e-3), torch.float32)
    optimizer = optimizer_of(model)
    train(model)
    before = [p.detach().clone() for p in model.stage.parameters()]
    optimizer.release()
    assert all(bucket.grads is None and bucket.shard is None for bucket in optimizer.buckets)
    train(model)
    assert not any(torch.equal(*pair) for pair in zip(before, model.stage.parameters(), strict=True))


def test_neither_importing_nor_a_step_loads_a_compiler() -> None:
    """Every process of a run would: torch's takes as long as torch itself, scipy's solvers half as long."""
    script = (
        "import sys, torch, puzzle.rlhf.process\n"
        "from puzzle.engine.train.adamw import AdamWSettings, clipped_step, make_adam\n"
        "weights = torch.ones(4, 4)\n"
        "settings = AdamWSettings(lambda step: 0.1)\n"
        "adam = make_adam([weights], settings)\n"
        "adam.param_groups[0]['lr'] = 0.1\n"
        "weights.grad = torch.ones(4, 4)\n"
        "clipped_step(adam, [weights.grad], torch.tensor(0.5), settings)\n"
        "assert (weights < 1).all(), weights\n"
        "print([name for name in ('torch._dynamo', 'scipy') if name in sys.modules])\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "[]\n"), ended.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_a_model_is_left_when_it_is_dropped(dtype: torch.dtype) -> None:
    """Hooks of weights do not keep the optimizer, which has the weights."""
    model = runtime(AdamWSettings(lambda _: 1e-3), dtype)
    train(model)
    kept: list[weakref.ref[Tensor]] = [weakref.ref(param) for param in model.decoder.parameters()]
    kept += [weakref.ref(master) for master in optimizer_of(model).masters]
    kept += [
        weakref.ref(state) for each in optimizer_of(model).adam.state.values() for state in each.values()
    ]
    assert len(kept) > 2 * len(list(model.decoder.parameters()))
    del model
    gc.collect()
    assert not [one for one in (ref() for ref in kept) if one is not None]


def test_gradients_without_an_optimizer_are_not_lost_in_silence() -> None:
    """Where weights outlive what adds their gradients up."""
    model = runtime(AdamWSettings(lambda _: 1e-3), torch.float32)
    decoder = model.decoder
    del model
    gc.collect()
    hidden = decoder(torch.tensor(TEXTS[0]), pack([TEXTS[0]]))
    with pytest.raises(ReferenceError, match="what gradients are added up by is gone"):
        hidden.sum().backward()
