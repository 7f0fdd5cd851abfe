"""Weights of tokens that generation drew by other log-probs than training computes, and what the log says of
the two, against numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puzzle.config.algorithm import CorrectionConfig
from puzzle.config.run import TrainConfig
from puzzle.errors import UserError
from puzzle.rlhf import draw as draw_module
from puzzle.rlhf.algorithms import policy
from puzzle.rlhf.algorithms.correction import correction_weights
from puzzle.rlhf.algorithms.policy import policy_loss
from puzzle.rlhf.algorithms.surrogate import Surrogate
from puzzle.rlhf.experience import Experience, minibatches
from tests.reference import numpy_ppo
from tests.rlhf import ppo_ranks
from tests.rlhf.one_process import configured, run, trainer_of

LOG_PROBS = st.floats(-12, -0.01)
ROWS = st.lists(
    st.lists(st.tuples(LOG_PROBS, st.floats(-2, 2)), min_size=1, max_size=5), min_size=1, max_size=4
)


def padded(rows: Sequence[Sequence[float]], fill: float = float("nan")) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.float32)


def ragged(x_BS: torch.Tensor, rows: Sequence[Sequence[Any]]) -> list[list[float]]:
    return [x_BS[i, : len(row)].tolist() for i, row in enumerate(rows)]


@given(ROWS, st.sampled_from(["truncate", "mask"]), st.sampled_from(["token", "sequence"]))
def test_weights_are_those_of_plain_loops(rows: Any, kind: Any, level: Any) -> None:
    options = {"cap": 1.5} if kind == "truncate" else {"low": 0.6, "high": 1.7}
    config = CorrectionConfig(kind=kind, level=level, **options)
    new_BS, gap_BS = (
        padded([[a for a, _ in row] for row in rows]),
        padded([[b for _, b in row] for row in rows]),
    )
    drawn_BS, mask_BS = new_BS - gap_BS, ~new_BS.isnan()
    weights_BS, held_BS = correction_weights(new_BS, drawn_BS, mask_BS, config)
    new, drawn = ragged(new_BS.double(), rows), ragged(drawn_BS.double(), rows)
    expected, count = numpy_ppo.correction(new, drawn, kind, level, config.cap, config.low, config.high)
    near = [
        abs(r - edge) < 1e-5 for row in ratios(new, drawn, level) for r in row for edge in (1.5, 0.6, 1.7)
    ]
    if not any(near):  # whether a ratio on the edge is beyond it is rounding
        assert int(held_BS.sum()) == count
        for got, wanted in zip(ragged(weights_BS, rows), expected, strict=True):
            assert got == pytest.approx(wanted, rel=1e-5)
    assert not weights_BS[~mask_BS].any(), "padding, NaN here, weighs nothing"
    assert not held_BS[~mask_BS].any()


def ratios(new: list[list[float]], drawn: list[list[float]], level: str) -> list[list[float]]:
    found = [np.exp(np.array(a) - np.array(b)) for a, b in zip(new, drawn, strict=True)]
    return [[float(r.prod())] if level == "sequence" else r.tolist() for r in found]


def test_hopeless_sequences_weigh_nothing_or_the_cap() -> None:
    """e^400 is no float: a product that overflows is truncated or masked, never NaN."""
    new_BS, drawn_BS = torch.tensor([[-1.0] * 4, [-101.0] * 4]), torch.tensor([[-101.0] * 4, [-1.0] * 4])
    mask_BS = torch.ones(2, 4, dtype=torch.bool)
    for options, expected in (({"kind": "truncate"}, [2.0, 0.0]), ({"kind": "mask"}, [0.0, 0.0])):
        config = CorrectionConfig.model_validate({"level": "sequence", **options})
        weights_BS, _ = correction_weights(new_BS, drawn_BS, mask_BS, config)
        assert weights_BS[:, 0].tolist() == pytest.approx(expected, abs=1e-30)


def test_the_weight_multiplies_the_surrogate_alone_and_masked_tokens_count() -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(3, 4, generator=generator) - 2
    new = (old + 0.3 * torch.randn(3, 4, generator=generator)).requires_grad_()
    advantages, reference = torch.randn(3, 4, generator=generator), old - 0.4
    weights_BS = torch.tensor([[0.0, 1.3, 0.7, 1.0]] * 3)
    every = torch.ones(3, 4, dtype=torch.bool)
    found = policy_loss(
        new,
        old,
        advantages,
        every,
        surrogate=Surrogate(0.2),
        weights=torch.full((3, 4), 1 / 12),
        ref_logprobs=reference,
        kl_coef=0.5,
        correction=weights_BS,
    )
    found.loss.backward()
    new_rows, old_rows = new.detach().double().tolist(), old.double().tolist()
    surrogate = numpy_ppo.policy_loss(new_rows, old_rows, advantages.tolist(), 0.2, weights_BS.tolist())
    penalty = numpy_ppo.kl_loss(new_rows, reference.double().tolist(), "k2")
    assert float(found.loss.detach()) == pytest.approx(surrogate.value + 0.5 * penalty.value, rel=1e-5)
    slopes = np.array(surrogate.gradient) + 0.5 * np.array(penalty.gradient)
    assert new.grad is not None
    np.testing.assert_allclose(new.grad.numpy(), slopes, rtol=1e-4, atol=1e-7)
    assert not np.array(surrogate.gradient)[:, 0].any()


def test_what_lies_outside_the_mask_weighs_nothing_whatever_it_is() -> None:
    """Padding of every argument may be NaN: loss and gradient are those of the tokens."""
    mask = torch.tensor([[True, True, False], [True, False, False]])

    def sums(fill: float) -> tuple[float, torch.Tensor]:
        generator = torch.Generator().manual_seed(3)

        def drawn() -> torch.Tensor:
            return torch.where(mask, torch.randn(2, 3, generator=generator), fill)

        new = drawn().requires_grad_()
        found = policy_loss(
            new, drawn(), drawn(), mask, surrogate=Surrogate(0.2), weights=mask / 3.0, entropy=drawn(),
            entropy_coef=0.1, ref_logprobs=drawn(), kl_coef=0.5, correction=drawn(),
        )  # fmt: skip
        found.loss.backward()
        assert new.grad is not None
        return float(found.loss.detach()), new.grad

    (loss, slopes), (plain, expected) = sums(float("nan")), sums(0.0)
    assert loss == plain
    assert torch.equal(slopes, expected)
    assert torch.isfinite(slopes).all()


def small_run(monkeypatch: pytest.MonkeyPatch, apart: float, **algorithm: Any) -> tuple[Any, list[Any]]:
    """The log of two iterations, and of each the log-probs and old log-probs of all forward passes."""
    calls: list[Any] = []
    plain, plain_rollout = policy.policy_loss, draw_module.rollout

    def watched(logprobs: torch.Tensor, old: torch.Tensor, *args: Any, **options: Any) -> Any:
        found = plain(logprobs, old, *args, **options)
        calls.append((logprobs.detach().double().numpy(), old.double().numpy(), float(found.clipped)))
        return found

    monkeypatch.setattr(policy, "policy_loss", watched)
    if apart:
        monkeypatch.setattr(
            draw_module, "rollout", lambda *args: ppo_ranks.draw_apart(plain_rollout, apart, *args)
        )
    options = {"minibatch": 4, "microbatch": 3, "clip": 0.1, **algorithm}
    lr = {"optimizer": {"lr": 0.02}}
    log = run(trainer_of(configured(actor=lr, algorithm=options, generation={"samples": 2})))
    return log, calls


def drawn_of_first_minibatch(experience: Experience, iteration: int) -> np.ndarray:
    rows = minibatches(len(experience), 4, 3, iteration, 0)[0]
    assert experience.sampled_logprobs_BS is not None
    return experience.take_N(experience.sampled_logprobs_BS, rows).double().numpy()


@pytest.mark.parametrize("old", ["generation", "recompute"])
def test_the_log_says_how_far_generation_is_from_training(monkeypatch: pytest.MonkeyPatch, old: str) -> None:
    """Two minibatches of two passes each: the metrics are of the first two passes."""
    apart = 0.3 if old == "recompute" else 0.0
    log, calls = small_run(monkeypatch, apart, old_logprobs=old)
    for iteration, metrics in enumerate(log.metrics):
        first = calls[4 * iteration : 4 * iteration + 2]
        new, start = (np.concatenate([call[i] for call in first]) for i in (0, 1))
        drawn = drawn_of_first_minibatch(log.experiences[iteration], iteration)
        gap, ratio = new - drawn, np.exp(new - start)
        expected = {
            "logprob_gap": np.abs(gap).mean(),
            "logprob_gap_max": np.abs(gap).max(),
            "logprob_gap_rms": np.sqrt((gap**2).mean()),
            "first_ratio": ratio.mean(),
            "first_ratio_gap": np.abs(ratio - 1).max(),
            "first_ratio_rms": np.sqrt(((ratio - 1) ** 2).mean()),
            "first_clip_frac": sum(call[2] for call in first) / len(new),
        }
        assert {n: metrics[n] for n in expected} == pytest.approx(expected, rel=1e-4, abs=1e-7)
        assert metrics["logprob_gap_rms"] == pytest.approx(apart, abs=1e-6 if not apart else 0.15)
        assert metrics["first_ratio_gap"] < 1e-5, "a step has not changed it yet"
        assert metrics["first_clip_frac"] == 0
        assert metrics["clip_frac"] > 0, "later steps clip"


def test_clipping_before_any_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where generation's log-probs are the old ones and far off, the clip holds tokens back at once."""
    plain = draw_module.rollout

    def far(*args: Any) -> Experience:
        found = ppo_ranks.draw_apart(plain, 0.3, *args)
        return replace(found, logprobs_BS=found.sampled_logprobs_BS)

    monkeypatch.setattr(draw_module, "rollout", far)
    log, calls = small_run(monkeypatch, 0.0)
    metrics, first = log.metrics[0], calls[:2]
    new, start = (np.concatenate([call[i] for call in first]) for i in (0, 1))
    assert metrics["first_ratio_rms"] == pytest.approx(
        np.sqrt(((np.exp(new - start) - 1) ** 2).mean()), rel=1e-4
    )
    assert metrics["first_clip_frac"] == pytest.approx(sum(call[2] for call in first) / len(new))
    assert 0.1 < metrics["first_clip_frac"] < 0.9


@pytest.mark.parametrize(
    "correction",
    [{"kind": "truncate", "cap": 1.2}, {"kind": "mask", "level": "sequence", "low": 0.7, "high": 1.5}],
)
def test_the_log_says_what_was_corrected(monkeypatch: pytest.MonkeyPatch, correction: dict[str, Any]) -> None:
    log, _ = small_run(monkeypatch, 0.3, old_logprobs="recompute", correction=correction)
    config = CorrectionConfig.model_validate(correction)
    options = (config.kind, config.level, config.cap, config.low, config.high)
    for experience, metrics in zip(log.experiences, log.metrics, strict=True):
        rows = experience.responses
        assert experience.logprobs_BS is not None
        assert experience.sampled_logprobs_BS is not None
        pair = (experience.logprobs_BS.double(), experience.sampled_logprobs_BS.double())
        weights, held = numpy_ppo.correction(*(ragged(x, rows) for x in pair), *options)
        tokens = sum(map(len, rows))
        assert metrics["correction_frac"] == pytest.approx(held / tokens)
        assert metrics["correction_weight"] == pytest.approx(sum(map(sum, weights)) / tokens, rel=1e-5)
        assert 0 < held < tokens


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"correction": {"kind": "truncate"}}, "correction needs old_logprobs recompute"),
        ({"old_logprobs": "recompute", "correction": {"kind": "truncate", "cap": 0.9}}, "give 1 or more"),
        ({"old_logprobs": "recompute", "correction": {"kind": "mask", "low": 1.5}}, "low below 1"),
        ({"old_logprobs": "recompute", "correction": {"kind": "mask", "high": 0.9}}, "high above 1"),
        (
            {"old_logprobs": "recompute", "correction": {"kind": "mask", "cap": 3.0}},
            "cap: kind mask has no use",
        ),
        ({"old_logprobs": "recompute", "correction": {"kind": "truncate", "low": 0.1}}, "low: kind truncate"),
        ({"correction": {"level": "sequence"}}, "level: kind none has no use"),
    ],
)
def test_senseless_corrections_are_refused_in_a_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises((UserError, ValueError), match=said):
        configured(algorithm=options)


def test_nothing_is_corrected_unless_asked() -> None:
    assert isinstance(config := configured(), TrainConfig)
    assert config.algorithm.correction.kind == "none"
