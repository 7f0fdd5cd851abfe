"""Choosing tokens: by brute force, over shards as over one rank, and from the right distribution."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from puzzle.engine.generate.sampling import SamplingParams, VocabShard, choose, draw, keep_likely
from puzzle.errors import UserError
from puzzle.model.noise import gumbel, row_keys, row_seeds
from puzzle.model.parallel import TensorGroup
from tests.helpers import run_ranks

V = 23
WHOLE = VocabShard(TensorGroup(), 0, V)


def rows(count, seed=0):
    return 2 * torch.randn(count, V, generator=torch.Generator().manual_seed(seed))


def keys(count, seed=0):
    numbers = torch.arange(count)
    return row_keys(seed, 1, numbers, numbers % 3, numbers // 7)


def pick(logits, params, shard=WHOLE, young=None):
    noise = None if params.greedy else keys(len(logits), params.seed)
    return choose(logits.clone(), noise, young, params, shard)


def test_greedy_is_argmax_with_probabilities_at_the_temperature():
    logits = rows(50)
    tokens, logprobs = pick(logits, SamplingParams(greedy=True, temperature=5.0))
    assert torch.equal(tokens, logits.argmax(1))
    torch.testing.assert_close(logprobs, (logits / 5).log_softmax(1).amax(1))


def test_the_first_of_equal_logits_wins():
    logits = torch.zeros(2, V)
    logits[1, 5:9] = 1
    assert pick(logits, SamplingParams(greedy=True))[0].tolist() == [0, 5]


def test_a_draw_is_the_argmax_of_logits_plus_noise():
    logits, params = rows(200), SamplingParams(temperature=0.6, seed=9)
    tokens, logprobs = pick(logits, params)
    noisy = logits / 0.6 + gumbel(keys(200, 9), 0, V)
    assert torch.equal(tokens, noisy.argmax(1))
    expected = (logits / 0.6).log_softmax(1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected)


@pytest.mark.parametrize("least", [0, 2])
@pytest.mark.parametrize(
    "case", [{"greedy": True}, {}, {"temperature": 0.4}, {"top_k": 5, "top_p": 0.8, "temperature": 1.3}]
)
def test_log_probabilities_are_of_logits_without_noise_filters_or_bans(case, least):
    """In float64: log_softmax(logits / T) at whatever was drawn; rows that are young enough draw no stop."""
    logits, params = rows(60, seed=5), SamplingParams(**case, stop_ids=(3, 11), min_new_tokens=least, seed=2)
    logits[:, [3, 11]] += 5.0
    numbers = torch.arange(60)
    seeds, counts = row_seeds(2, 0, numbers, numbers), numbers % 4
    packed = draw(logits.clone(), seeds, counts, params, WHOLE)
    assert packed.dtype == torch.int32
    tokens, logprobs = packed[0].long().numpy(), packed[1].view(torch.float32).numpy()
    scaled = logits.double().numpy() / params.temperature
    truth = scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
    np.testing.assert_allclose(logprobs, truth[np.arange(60), tokens], rtol=1e-5, atol=1e-5)
    young = counts.numpy() < least
    assert not set(tokens[young]) & {3, 11}
    assert set(tokens[~young]) & {3, 11}
    if params.greedy:  # a row is young until it has drawn as many as it must
        scaled[np.ix_(young, [3, 11])] = -np.inf
        assert tokens.tolist() == scaled.argmax(1).tolist()
    if not params.greedy:  # the same names draw the same, other names something else
        again = draw(logits.clone(), seeds, counts, params, WHOLE)
        assert torch.equal(packed, again)
        other = draw(logits.clone(), row_seeds(3, 0, numbers, numbers), counts, params, WHOLE)
        assert not torch.equal(packed[0], other[0])


CASES = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"top_k": 4},
    {"top_p": 0.7, "temperature": 1.5},
    {"top_k": 9, "top_p": 0.6},
]


def allowed(p, top_k, top_p):
    """The kept tokens by a plain loop: likeliest first, until top_k tokens or top_p mass."""
    order = np.argsort(-p, kind="stable")
    order = order[: top_k or len(p)]
    kept, mass = [], 0.0
    for token in order:
        if mass >= top_p:
            break
        kept.append(token)
        mass += p[token] / p[order].sum()
    return kept


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_filtered_distribution(case):
    count = 20_000
    logits, params = rows(1, seed=4), SamplingParams(**case)
    tokens, logprobs = pick(logits.expand(count, V), params)
    p = (logits[0] / params.temperature).softmax(0).double().numpy()
    torch.testing.assert_close(logprobs.double(), torch.from_numpy(np.log(p))[tokens], rtol=1e-4, atol=1e-4)
    kept = allowed(p, params.top_k, params.top_p)
    counts = np.bincount(tokens.numpy(), minlength=V)
    assert counts[kept].sum() == count, "a filtered token was drawn"
    likely = [token for token in kept if p[token] * count > 10]
    rest = [token for token in kept if token not in likely]
    observed = [*counts[likely], counts[rest].sum()] if rest else counts[likely]
    shares = [*p[likely], p[rest].sum()] if rest else p[likely]
    expected = np.array(shares) / np.sum(shares) * count
    assert stats.chisquare(observed, expected).pvalue > 1e-3


@given(st.integers(0, V), st.floats(0.05, 1.0), st.integers(0, 50))
def test_what_is_kept(top_k, top_p, seed):
    logits = rows(3, seed)
    kept = keep_likely(logits, top_k, top_p)
    for row, values in zip(kept, logits, strict=True):
        p = values.double().softmax(0).numpy()
        inside = np.flatnonzero(np.isfinite(row.numpy()))
        mass = p[allowed(p, top_k, 1.0)].sum()
        # At a boundary within rounding either set is right.
        sizes = {len(allowed(p, top_k, top_p * (1 + e))) for e in (-1e-6, 0, 1e-6)}
        assert len(inside) in sizes
        assert set(inside) == set(np.argsort(-p, kind="stable")[: len(inside)])
        assert p[inside].sum() >= top_p * mass - 1e-6
        assert torch.equal(row[inside], values[inside])


def test_young_rows_do_not_stop_but_keep_their_probabilities():
    logits = rows(6)
    best = logits.argmax(1)
    stops = tuple(set(best.tolist()))
    young = torch.tensor([True, False] * 3)
    tokens, logprobs = pick(logits, SamplingParams(greedy=True, stop_ids=stops), young=young)
    for i in range(6):
        assert (tokens[i].item() in stops) == (not young[i])
        assert logprobs[i] == pytest.approx(logits[i].log_softmax(0)[tokens[i]].item(), abs=1e-5)


def shard_rank(rank, world, vocabulary, case):
    """Rank `rank` sees its rows of the vocabulary alone."""
    group = TensorGroup(dist.group.WORLD)
    width = -(-vocabulary // world)
    params = SamplingParams(**case)
    logits = rows(40)[:, :vocabulary]
    mine = logits[:, rank * width : (rank + 1) * width]
    young = torch.arange(40) % 2 == 0
    return pick(mine, params, VocabShard(group, rank * width, width), young)


@pytest.mark.parametrize(
    ("world", "vocabulary", "case"),
    [
        (2, V, {"seed": 3, "stop_ids": (0, 22)}),
        (4, 5, {"greedy": True, "stop_ids": (1,)}),
        (2, V, {"top_k": 5, "top_p": 0.8, "stop_ids": (2, 17)}),
    ],
)
def test_shards_decide_as_one_rank(world, vocabulary, case):
    # Five tokens on four ranks: the last rank has padding alone.
    young = torch.arange(40) % 2 == 0
    whole = VocabShard(TensorGroup(), 0, vocabulary)
    expected = pick(rows(40)[:, :vocabulary], SamplingParams(**case), whole, young)
    for tokens, logprobs in run_ranks(shard_rank, world, world, vocabulary, case):
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(logprobs, expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"temperature": 0.0}, "temperature is 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens is 9"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
    ],
)
def test_impossible_parameters(case, words):
    with pytest.raises(UserError, match=words):
        SamplingParams(**case)


def test_parameters_at_their_limits():
    least = SamplingParams(temperature=1e-6, top_k=0, top_p=1.0, min_new_tokens=1, max_new_tokens=1)
    assert not least.filtered
    assert SamplingParams(top_k=1).filtered
    assert SamplingParams(top_p=1e-9).filtered
    assert not SamplingParams(greedy=True, top_k=1, top_p=0.5).filtered


def kept(values, top_k, top_p):
    return torch.isfinite(keep_likely(torch.tensor([values]), top_k, top_p))[0].tolist()


def test_filters_at_their_edges():
    """Four tokens of which each has half of the mass of the one before, and ties."""
    halves = [0.0, -0.6931471805599453, -1.3862943611198906, -1.3862943611198906]  # 1/2 1/4 1/8 1/8
    for top_p, count in (
        (0.3, 1),
        (0.4999, 1),
        (0.5001, 2),
        (0.7499, 2),
        (0.7501, 3),
        (0.8749, 3),
        (0.8751, 4),
    ):
        assert sum(kept(halves, 0, top_p)) == count
        assert kept(halves, 0, top_p)[:count] == [True] * count
    for top_k in (1, 2):
        assert kept(halves, top_k, 1.0) == [True] * top_k + [False] * (4 - top_k)
    # What is as likely as the last one that is kept is kept, too; as many as there are is all of them.
    assert kept(halves, 3, 1.0) == kept(halves, 4, 1.0) == kept(halves, 9, 1.0) == [True] * 4
    # The share that top_p speaks of is of what top_k left: 2/3 and 1/3.
    assert kept(halves, 2, 0.66) == [True, False, False, False]
    assert kept(halves, 2, 0.67) == [True, True, False, False]
    assert kept([0.0, 0.0, 0.0, 0.0], 0, 0.5) == [True, True, False, False]
    assert kept([-1.0, -torch.inf, 0.0, -torch.inf], 3, 0.999) == [True, False, True, False]
