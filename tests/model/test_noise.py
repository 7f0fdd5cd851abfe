"""Keyed noise: the integers against big-number arithmetic, any split, and the statistics of the draws."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from puzzle.model.noise import gumbel, row_keys

M32, M64 = 2**32 - 1, 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
FROZEN = (4.01206111907959, -0.7115421295166016)


def mix64(z: int) -> int:
    z &= M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return z ^ (z >> 31)


def mix32(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & M32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & M32
    return x ^ (x >> 16)


def expected_noise(names: tuple[int, ...], entry: int) -> float:
    """The specification in unbounded integers and float64."""
    key = 0
    for name in names:
        key = mix64(key + GOLDEN + name)
    low, high = key & M32, key >> 32
    bits = mix32(((mix32(entry + 1) ^ low) * (high | 1)) & M32)
    k = np.float32(np.float32(bits & 0x7FFFFFFF) + np.float32(0.5))
    return -math.log(-math.log1p(-float(np.float32(k * np.float32(2**-31 - 2**-55)))))


def keys(seed=0, iteration=0, prompt=(0,), sample=(0,), position=(0,)):
    return row_keys(seed, iteration, torch.tensor(prompt), torch.tensor(sample), torch.tensor(position))


NAMES = st.tuples(
    st.integers(0, 2**63 - 1), st.integers(0, 2**40), *(st.integers(0, 2**62) for _ in range(3))
)


@given(NAMES, st.integers(0, 2**20))
def test_against_unbounded_integers(names, entry):
    seed, iteration, prompt, sample, position = names
    noise = gumbel(keys(seed, iteration, (prompt,), (sample,), (position,)), entry, 3)
    expected = [expected_noise(names, entry + i) for i in range(3)]
    np.testing.assert_allclose(noise[0].numpy(), expected, rtol=3e-6, atol=3e-6)


def test_frozen_values():
    """Two numbers nobody may change: logs of old runs are reproduced with them."""
    noise = gumbel(keys(7, 3, (11,), (2,), (5,)), 100, 2)[0]
    assert noise.tolist() == pytest.approx(FROZEN, rel=1e-6)


def test_any_split_of_batch_and_vocabulary():
    all_keys = keys(1, 2, range(10, 30), [0, 1] * 10, range(20))
    whole = gumbel(all_keys, 0, 50000)
    assert whole.dtype == torch.float32
    rows = torch.cat(
        [gumbel(all_keys[:1], 0, 50000), gumbel(all_keys[1:8], 0, 50000), gumbel(all_keys[8:], 0, 50000)]
    )
    columns = torch.cat([gumbel(all_keys, 0, 12501), gumbel(all_keys, 12501, 37499)], dim=1)
    # The integers are equal; the vector and the scalar path of a logarithm may round differently.
    torch.testing.assert_close(rows, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(columns, whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(all_keys[3:4], keys(1, 2, (13,), (1,), (3,)))
    assert gumbel(all_keys[:0], 0, 10).shape == (0, 10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_on_a_gpu():
    names = [torch.arange(64) * 977, torch.arange(64) % 4, torch.arange(64) % 7]
    on_cpu = row_keys(5, 6, *names)
    on_gpu = row_keys(5, 6, *(name.cuda() for name in names))
    assert torch.equal(on_gpu.cpu(), on_cpu)
    cpu, gpu = gumbel(on_cpu, 0, 32000), gumbel(on_gpu, 0, 32000).cpu()
    # One integer off would move the noise by far more wherever it is small in number: compare all of them.
    torch.testing.assert_close(gpu, cpu, rtol=1e-5, atol=1e-6)


def test_every_name_matters():
    base: dict[str, Any] = {"seed": 1, "iteration": 2, "prompt": (3,), "sample": (4,), "position": (5,)}
    rows = [keys(**base)]
    rows += [keys(**{**base, name: 9}) for name in ("seed", "iteration")]
    rows += [keys(**{**base, name: (9,)}) for name in ("prompt", "sample", "position")]
    rows += [keys(**{**base, "prompt": (4,), "sample": (3,)}), keys(**{**base, "seed": 2, "iteration": 1})]
    assert len({tuple(row[0].tolist()) for row in rows}) == len(rows)
    noise = torch.cat([gumbel(row, 0, 20000) for row in rows]).numpy()
    correlation = np.corrcoef(noise) - np.eye(len(rows))
    assert np.abs(correlation).max() < 5 / math.sqrt(20000)


def uniforms(noise: torch.Tensor) -> np.ndarray:
    return np.exp(-np.exp(-noise.double().numpy()))


def test_uniform_along_the_vocabulary_and_along_each_name():
    n = 50000
    zeros, count = torch.zeros(n, dtype=torch.int64), torch.arange(n)
    draws = {
        "vocabulary": gumbel(keys(seed=3), 0, n)[0],
        "prompts": gumbel(row_keys(3, 0, count, zeros, zeros), 17, 1)[:, 0],
        "samples": gumbel(row_keys(3, 0, zeros, count, zeros), 17, 1)[:, 0],
        "positions": gumbel(row_keys(3, 0, zeros, zeros, count), 17, 1)[:, 0],
    }
    for name, noise in draws.items():
        assert noise.isfinite().all()
        u = uniforms(noise)
        assert stats.kstest(u, "uniform").pvalue > 1e-3, name
        for lag in (1, 2, 64):
            assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 5 / math.sqrt(n), (name, lag)
        pairs = np.histogram2d(u[:-1], u[1:], bins=16)[0].ravel()
        assert stats.chisquare(pairs).pvalue > 1e-3, name


def test_rows_do_not_share_their_extremes():
    """Neighbouring rows and positions pick unrelated winners: as many coincidences as chance has it."""
    vocabulary, rows = 512, 4096
    count = torch.arange(rows)
    winners = gumbel(row_keys(0, 0, count // 64, count % 64, count % 64), 0, vocabulary).argmax(dim=1)
    assert stats.chisquare(np.bincount(winners.numpy(), minlength=vocabulary)).pvalue > 1e-3
    same = int((winners[:-1] == winners[1:]).sum())
    assert stats.binomtest(same, rows - 1, 1 / vocabulary).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_argmax_draws_from_the_softmax(temperature):
    logits_V = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 2
    n = 40000
    zeros = torch.zeros(n, dtype=torch.int64)
    noise_BV = gumbel(row_keys(11, 0, torch.arange(n), zeros, zeros + 4), 0, 40)
    drawn = (logits_V / temperature + noise_BV).argmax(dim=1)
    expected = torch.softmax(logits_V.double() / temperature, 0).numpy() * n
    observed = np.bincount(drawn.numpy(), minlength=40).astype(float)
    rare = expected < 10
    expected = np.append(expected[~rare], expected[rare].sum())
    observed = np.append(observed[~rare], observed[rare].sum())
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_no_ties_at_the_top():
    """The noise is fine where it decides: the two best of 50000 equal entries differ in every row."""
    top = gumbel(keys(prompt=range(64), sample=(0,), position=(0,)), 0, 50000).topk(2).values
    assert (top[:, 0] > top[:, 1]).all()
    assert stats.kstest(top[:, 0].numpy() - math.log(50000), "gumbel_r").pvalue > 1e-3
