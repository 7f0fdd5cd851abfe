"""What invariant numerics keep beside fast ones, against the tensors that real ranks make."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.pipeline.pipeline import Pipeline, PipelineInput
from puzzle.engine.runtime.world import World
from puzzle.engine.train.grad_buckets import Bucket
from puzzle.model.packing import pack
from puzzle.model.parallel import TensorGroup
from puzzle.model.weights import initialise
from puzzle.plan import memory
from puzzle.plan.activations import Activations
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.memory import BUCKET, EXCHANGES, Use
from tests.helpers import run_ranks
from tests.plan.test_memory import SETTINGS, batch_of, loss_of, spec_of


def made(rank: int, layout: Layout, parts: int) -> ModelRuntime:
    world = World(rank, layout.world, torch.device("cpu"))
    model = ModelRuntime("actor", spec_of(), Placement.default(layout), world, torch.float32, parts=parts)
    initialise(model.decoder, 0)
    return model


Exchanged = tuple[int, int, int, list[Tensor]]
"""Most buckets and bytes that were exchanged at a time, bytes of gradients, and the weights after a step."""


def exchanged(rank: int, layout: Layout, sizes: tuple[int, ...]) -> list[Exchanged]:
    """Of buckets of several sizes."""
    return [_exchanged(rank, layout, size) for size in sizes]


def _exchanged(rank: int, layout: Layout, bucket: int) -> Exchanged:
    model = made(rank, layout, 1)
    model.attach_optimizer(SETTINGS, bucket=bucket)
    assert model.optimizer is not None
    buckets, counts, sizes = model.optimizer.buckets, [0], [0]
    plain = Bucket.exchange

    def watched(one: Bucket, group: Any) -> None:
        plain(one, group)
        under_way = [b.exchanged.nbytes for b in buckets if b.exchanged is not None]
        counts.append(len(under_way))
        sizes.append(sum(under_way))

    batch = batch_of(model)
    with mock.patch.object(Bucket, "exchange", watched):
        Pipeline([model]).train([PipelineInput(model, [batch], loss_of(model, batch.tokens_T))])
    owned = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _sums(buckets)}
    return max(counts), max(sizes), sum(owned.values()), [p.detach() for p in model.decoder.parameters()]


def _sums(buckets: list[Bucket]) -> list[Tensor]:
    return [t for bucket in buckets for t in (bucket.grads, bucket.shard) if t is not None]


def test_replicas_exchange_a_few_buckets_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    dp, small = 3, 20_000
    layout = Layout.even(1, 1, dp, 4)
    whole, cut = zip(*run_ranks(exchanged, dp, layout, (BUCKET, small)), strict=True)
    use = Use("actor", spec_of(), Placement.default(layout), 4, True, fused=False, parts=1)
    for rank, coord in enumerate(layout.coord(rank) for rank in range(dp)):
        count, size, gradients, weights = cut[rank]
        assert all(map(torch.equal, weights, whole[rank][3]))
        assert gradients == memory.gradient_bytes(use, coord)
        assert (whole[rank][0], count) == (1, EXCHANGES)
        # All in one, and half of it for the first sums; of small buckets as many as are exchanged at a time.
        assert memory.exchanged_bytes(use, coord) == whole[rank][1] + whole[rank][1] // 2
        with monkeypatch.context() as patch:
            patch.setattr(memory, "BUCKET", small)
            assert size <= memory.exchanged_bytes(use, coord) <= 2 * size
            stages = memory.rank_memory(rank, [use], None, WORK, memory.Switched(), False).stages
            assert stages["training"]["actor exchanged gradients"] == memory.exchanged_bytes(use, coord)


WORK = memory.Work(batch=6, minibatch=6, prompt=16, response=16, microbatch=1)


def test_one_replica_and_fast_numerics_exchange_nothing() -> None:
    for dp, parts in ((1, 1), (2, None)):
        layout = Layout.even(1, 1, dp, 4)
        use = Use("actor", spec_of(), Placement.default(layout), 2, True, parts=parts)
        assert memory.exchanged_bytes(use, layout.coord(0)) == 0


def sent(rank: int, layout: Layout) -> tuple[int, int]:
    """Tokens of a pass, and most bytes of a float32 sum and of what ranks made of theirs, exchanged."""
    model, sizes = made(rank, layout, layout.tp), [0]
    plain = TensorGroup.exchange

    def watched(group: TensorGroup, x: Tensor) -> Tensor:
        found = plain(group, x)
        sizes.append(x.nbytes + found.nbytes)
        return found

    batch = pack([list(range(40)), list(range(9))], model.decoder.numerics.multiple)
    with mock.patch.object(TensorGroup, "exchange", watched), torch.no_grad():
        model.decoder(batch.tokens_T, batch)
    return batch.total, max(sizes)


def test_tensor_ranks_send_float32_sums() -> None:
    layout = Layout.even(2, 1, 1, 4)
    for tokens, size in run_ranks(sent, 2, layout):
        fast, exact = (
            Activations(Use("a", spec_of(), Placement.default(layout), 2, True, parts=parts), 0, tokens, 8)
            for parts in (None, 2)
        )
        assert (fast.partial(), exact.partial()) == (0, size)
        assert (
            exact.transient() - fast.transient() == size - tokens * 64 * 2
        )  # instead of one in half precision
        assert exact.forward() > fast.forward()


@pytest.mark.parametrize("parts", [1, 4])
def test_the_head_has_a_sum_of_each_part(parts: int) -> None:
    layout = Layout.even(1, 1, 1, 4)
    model, sizes = made(0, layout, parts), []
    batch = pack([list(range(40)), list(range(9))], model.decoder.numerics.multiple)
    hidden = torch.randn((batch.total, 64), requires_grad=True)
    rows = torch.arange(20)
    found = model.decoder.token_stats(hidden, rows, rows).logprobs.sum()
    plain = Tensor.new_zeros

    def watched(x: Tensor, *given: Any, **how: Any) -> Tensor:
        zeros = plain(x, *given, **how)
        sizes.append(zeros.nbytes)
        return zeros

    with mock.patch.object(Tensor, "new_zeros", watched):
        found.backward()
    fast, exact = (
        Activations(
            Use("a", spec_of(), Placement.default(layout), 4, True, parts=p), 0, batch.total, len(rows)
        )
        for p in (None, parts)
    )
    blocks = 2 * 4 * len(rows) * 259
    assert exact.logits() > blocks
    assert exact.logits() - fast.logits() == sum(sizes)
