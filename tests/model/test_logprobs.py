"""Vocabulary-parallel log-probs and entropy against the textbook, and what they may keep in memory."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from puzzle.model.logprobs import token_stats
from puzzle.model.parallel import TensorGroup
from tests.helpers import run_ranks

N, D, V = 13, 8, 101


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(dtype)
    weight = (2 * torch.randn(V, D, generator=generator)).to(dtype)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[:2] = torch.tensor([0, V - 1])
    slopes = torch.randn(2, N, generator=generator)
    return hidden, weight, targets, slopes


def textbook(hidden, weight, targets, slopes, temperature):
    """Log-probs, entropy and gradients of their weighted sum, in float64."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    all_p = (hidden @ weight.t() / temperature).log_softmax(-1)
    logprobs = all_p.gather(1, targets[:, None])[:, 0]
    entropy = -(all_p.exp() * all_p).sum(-1)
    (slopes[0] * logprobs + slopes[1] * entropy).sum().backward()
    return logprobs.detach(), entropy.detach(), hidden.grad, weight.grad


def sharded(rank, world, block, temperature):
    hidden, weight, targets, slopes = inputs()
    rows = -(-V // world)
    shard = torch.full((rows, D), 1e3)
    real = weight[rank * rows : (rank + 1) * rows]
    shard[: len(real)] = real
    hidden.requires_grad_()
    shard.requires_grad_()
    group = TensorGroup(dist.group.WORLD if world > 1 else None)
    got = token_stats(hidden, shard, targets, group, V, temperature, entropy=True, block=block)
    assert got.entropy is not None
    (slopes[0] * got.logprobs + slopes[1] * got.entropy).sum().backward()
    assert shard.grad is not None
    assert not shard.grad[len(real) :].any(), "padding gets no gradient"
    return got.logprobs.detach(), got.entropy.detach(), hidden.grad, shard.grad[: len(real)]


def close(got, expected):
    return (got.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def check(results, temperature):
    logprobs, entropy, grad_hidden, grad_weight = textbook(*inputs(), temperature)
    for result in results:
        assert close(result[0], logprobs)
        assert close(result[1], entropy)
    total = torch.stack([result[2] for result in results]).sum(0)
    assert close(total, grad_hidden)
    rows = torch.cat([result[3] for result in results])
    assert close(rows, grad_weight)


@pytest.mark.parametrize("block", [1, 3 * N, 50 * N, 1000 * N])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_one_rank(block, temperature):
    check([sharded(0, 1, block, temperature)], temperature)


@pytest.mark.parametrize(("world", "block"), [(2, 7 * N), (4, 1000 * N)])
def test_vocabulary_over_ranks(world, block):
    check(run_ranks(sharded, world, world, block, 0.7), 0.7)


def test_entropy_is_not_computed_unasked():
    hidden, weight, targets, _ = inputs()
    assert token_stats(hidden, weight, targets, TensorGroup(), V).entropy is None


def test_extreme_logits_stay_finite():
    hidden, weight, targets, _ = inputs()
    got = token_stats(1e4 * hidden, weight, targets, TensorGroup(), V, entropy=True, block=9 * N)
    expected = (1e4 * hidden.double() @ weight.double().t()).log_softmax(-1)
    torch.testing.assert_close(
        got.logprobs.double(), expected.gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=1
    )
    assert got.entropy is not None
    assert got.entropy.isfinite().all()


def test_half_precision_gradients_come_in_its_dtype():
    hidden, weight, targets, slopes = inputs(torch.bfloat16)
    expected = textbook(hidden, weight, targets, slopes, 1.0)
    hidden.requires_grad_()
    weight.requires_grad_()
    got = token_stats(hidden, weight, targets, TensorGroup(), V, block=20 * N)
    (slopes[0] * got.logprobs).sum().backward()
    assert got.logprobs.dtype == torch.float32
    assert hidden.grad is not None
    assert hidden.grad.dtype == weight.dtype == torch.bfloat16
    torch.testing.assert_close(got.logprobs.double(), expected[0], rtol=0.02, atol=0.1)


class LargestFloats(TorchDispatchMode):
    """Records the most elements that any float32 or float64 result has."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.float32, torch.float64):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_never_exist_as_a_whole(dtype):
    tokens, width, vocabulary = 96, 16, 1024
    block = tokens * vocabulary // 4
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))
    with LargestFloats() as seen:
        got = token_stats(hidden, weight, targets, TensorGroup(), vocabulary, entropy=True, block=block)
        assert got.entropy is not None
        (got.logprobs + got.entropy).sum().backward()
    assert seen.largest == block
    with LargestFloats() as seen:
        (hidden @ weight.t()).float().log_softmax(-1)
    assert seen.largest == tokens * vocabulary, "the check sees whole logits where there are some"
