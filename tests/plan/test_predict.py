"""Predictions against published runs, virtual time and numbers by hand."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.cli.plan_compare import compared, mean_errors
from puzzle.cli.workloads import Measured, measured_runs
from puzzle.errors import UserError
from puzzle.plan.layout import Layout
from puzzle.plan.pipeline.decode_ring import Ring
from puzzle.plan.predict.calibration import Calibration, profiles, read_calibration
from puzzle.plan.predict.costs import Pass
from puzzle.plan.predict.engines import PUBLISHED
from puzzle.plan.predict.fit import Sample, fit
from puzzle.plan.predict.iteration import Part, Workload, predict
from puzzle.plan.predict.passes import DecodeStages, decode_stages, stage_costs
from puzzle.plan.predict.rates import NAMES, Rates, layer_bytes
from puzzle.plan.simulate.cost import CostTable
from puzzle.plan.simulate.simulate import makespan
from puzzle.spec.published import published
from tests.plan.costs import uniform

LOGS = Path(__file__).parents[2] / "logs" / "published"
FIGURES = [LOGS / f"figure{number}" for number in (8, 9, 10, 11)]
# Percent: end to end, generation, inference, training; and the runs that they are means of.
BARS = {"orion": ((4, 6, 6, 7), 47), "phoenix": ((4, 6, 12, 7), 15)}
RATES = Rates(1e14, 1e12, 1e-3, 1e-3, 2e-4, 1e-2, 2e10, 5e-5, 2e10, 2e-4, 1e-4, 1.5, 40.0)


@pytest.fixture(scope="module")
def runs() -> list[Measured]:
    return measured_runs(FIGURES)


@pytest.mark.parametrize("cluster", BARS)
def test_published_runs_are_predicted(runs: list[Measured], cluster: str) -> None:
    """Two runs gave the constants; the bars hold for those of other settings."""
    rows = compared(
        [one for one in runs if one.run.cluster == cluster], read_calibration(f"published-{cluster}")
    )
    bars, held = BARS[cluster]
    assert sum(not row.calibrated_on for row in rows) == held
    errors = [100 * share for share in mean_errors(rows).values()]
    assert all(error <= bar for error, bar in zip(errors, bars, strict=True)), errors


def test_layouts_train_in_the_measured_order(runs: list[Measured]) -> None:
    """Kendall's tau 1 in every group of figure 10: no pair of its layouts is swapped."""
    rates, groups = read_calibration("published-orion").rates, {}
    for one in runs:
        if one.run.run_id.startswith("figure10/"):
            key = (one.run.actor, one.work.sequences, one.work.fuse_training)
            groups.setdefault(key, []).append(one)
    assert sorted(map(len, groups.values())) == [3, 3, 3, 3, 4, 4, 4, 4]
    for group in groups.values():
        for a, b in combinations(group, 2):
            measured = a.seconds.training - b.seconds.training
            assert measured * (predict(a.work, rates).training - predict(b.work, rates).training) > 0


@pytest.mark.parametrize(
    ("cluster", "expected"), [("orion", "expected-pcie"), ("phoenix", "expected-nvlink")]
)
def test_profiles_are_what_their_runs_give(runs: list[Measured], cluster: str, expected: str) -> None:
    shipped = read_calibration(f"published-{cluster}")
    used = [one for one in runs if one.run.run_id in shipped.runs]
    assert len(used) == 2
    samples = [Sample(o.work, o.seconds.generation, o.seconds.inference, o.seconds.training) for o in used]
    found = fit(samples, read_calibration(expected).rates)
    assert found.values() == pytest.approx(shipped.rates.values(), rel=2e-3)


def workload(tp: int = 2, pp: int = 4, **changes: Any) -> Workload:
    """7B and 7B on tp x pp devices."""
    spec = published("7b")
    part = Part(spec, Layout.even(tp, pp, 1, 32))
    judge = Part(replace(spec, head="value"), part.layout)
    plain = Workload(
        actor=part,
        generation=part.layout,
        trained=(part, judge),
        inferred=(part, judge, judge),
        stepped=2,
        sequences=64,
        minibatch=64,
        steps=1,
        prompt=256,
        response=128,
        microbatch=4,
        prefill=4,
        decode=16,
    )
    return replace(plain, **changes)


def test_a_fit_finds_what_made_the_times() -> None:
    """Runs of another machine: what they depend on is found, and others are predicted."""
    true = replace(RATES, products=1.3e14, layer_host=0.8e-3, bus=3e10)
    seen = [workload(tp, pp, decode=rows) for tp, pp in ((1, 8), (2, 4), (4, 2)) for rows in (4, 32)]
    samples = []
    for work in seen:
        seconds = predict(work, true)
        samples.append(Sample(work, seconds.generation, seconds.inference, seconds.training))
    found = fit(samples, RATES)
    assert found.products == pytest.approx(true.products, rel=0.05)
    assert found.layer_host == pytest.approx(true.layer_host, rel=0.05)
    other = workload(2, 8, sequences=128, minibatch=128)
    assert predict(other, found).total == pytest.approx(predict(other, true).total, rel=0.01)
    assert predict(other, RATES).total > 1.05 * predict(other, true).total


def test_a_fit_needs_tensor_parallelism() -> None:
    with pytest.raises(UserError, match="needs a run with tp of at least 2"):
        fit([Sample(workload(tp=1), 1.0, 1.0, 1.0)], RATES)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from([(1, 1), (1, 4), (2, 4), (4, 2)]), st.booleans())
def test_a_faster_machine_is_never_slower(name: str, layout: tuple[int, int], fused: bool) -> None:
    work = workload(*layout, fuse_training=fused)
    better = 1.5 if name in ("products", "memory", "bus", "message") else 1 / 1.5
    faster = predict(work, replace(RATES, **{name: getattr(RATES, name) * better}))
    slower = predict(work, RATES)
    assert all(getattr(faster, s) <= getattr(slower, s) for s in ("generation", "inference", "training"))


@given(st.integers(1, 5), st.integers(1, 7), st.lists(st.integers(1, 9), min_size=5, max_size=5))
@settings(max_examples=40, deadline=None)
def test_a_decode_step_is_that_of_the_ring(pp: int, count: int, device: list[int]) -> None:
    """With a host that takes no time: what a further round adds to a ring in virtual time."""
    stages = DecodeStages((0.0,) * pp, tuple(map(float, device[:pp])), 0.0)
    costs = {**uniform(["actor"]).seconds["actor"], "prefill": 0.0, "decode": stages.device}
    ring, table = Ring(pp, count, 1), CostTable({"actor": costs})
    rounds = [makespan(ring.unrolled(((),) * n), table) for n in (14, 17)]
    assert (rounds[1] - rounds[0]) / 3 == pytest.approx(stages.step(count))


def test_host_and_device_are_lanes() -> None:
    """By hand: a pass takes the longer one; so does a decode stage, but round the ring the devices' sum."""
    spec, layout = published("7b"), Layout.even(1, 2, 1, 32)
    one = Pass(2048, 512, 0)
    # 2 x 202.4e6 weights and 2 x 4 x 4096 x 513 / 2 of attention per token, at 1e14 FLOP/s.
    products = 2048 * (404_750_336 + 8_404_992) / 1e14
    passes = layer_bytes(spec, one, 1, PUBLISHED) / 1e12
    assert passes == pytest.approx(2 * 2048 * (22 * 4096 + 16 * 4096 + 5 * 11008 + 3 * 512 * 32) / 1e12)
    sent = 2 * 2048 * 4096 / 2e10
    costs = stage_costs(spec, layout, one, RATES)
    assert costs.forward[0] == pytest.approx(16 * (products + passes) + sent)
    assert costs.backward[1] == pytest.approx(16 * 2 * (products + passes) + sent)
    slow = stage_costs(spec, layout, replace(one, trained=True), replace(RATES, layer_host=0.5))
    assert slow.forward == pytest.approx((16 * 0.5 + 1e-3 + sent, 16 * 0.5 + 1e-3 + 1e-2))
    again = stage_costs(spec, layout, replace(one, trained=True), RATES, recompute=True)
    assert again.backward[1] == pytest.approx(16 * 3 * (products + passes) + sent)
    ring = decode_stages(spec, layout, 8, 300, RATES)
    assert ring.host == pytest.approx((16e-3 + 1e-3,) * 2)
    assert ring.step(8) == pytest.approx(8 * max(*ring.host, *ring.device))
    assert ring.step(1) == pytest.approx(max(sum(ring.device) + 1e-3, 17e-3))
    # n ranks in a ring: 2 (n - 1) / n of the bytes.
    assert RATES.all_reduce(4, 2e10) == pytest.approx(5e-5 + 1.5)
    assert RATES.all_reduce(1, 2e10) == 0


def test_passes_of_this_engine() -> None:
    """By hand: kernels that are fused, a host that issues passes of training longer, graphs that draw."""
    spec, one = published("7b"), Pass(2048, 512, 1024, trained=True)
    ours = replace(RATES, this_engine=True)
    layer = ours.layer(spec, 1, one, False)
    products = 2048 * (404_750_336 + 4_202_496) / 1e14  # attention over the pairs that causality leaves
    passes = 2 * 2048 * (8 * 4096 + 9 * 4096 + 3 * 11008) / 1e12
    assert layer.forward == pytest.approx(products + passes)
    assert (layer.issue_forward, layer.issue_backward) == pytest.approx((1.7e-3, 3.2e-3))
    assert ours.layer(spec, 1, replace(one, trained=False), False).issue_forward == 1e-3
    assert ours.layer(spec, 2, one, False).issue_backward == pytest.approx(3.2e-3 + 2e-4)
    head, logits = ours.head(spec, 1, one), 1024 * 32000
    product = 2 * 4096 * logits / 1e14
    assert head.forward == pytest.approx(product + 36 * logits / 1e12)
    assert head.backward == pytest.approx(3 * product + 54 * logits / 1e12)
    issued = replace(ours, layer_host=1.0).head(spec, 1, one)  # two blocks of 2**24 logits
    assert (issued.issue_forward, issued.issue_backward) == pytest.approx((1e-2 + 2 * 0.63, 2 * 0.95))
    assert (issued.forward, issued.backward) == (head.forward, head.backward)
    published_one = replace(ours, this_engine=False).head(spec, 1, one)
    assert (published_one.issue_forward, published_one.issue_backward) == (0.0, 0.0)
    value = replace(ours, layer_host=1.0).head(replace(spec, head="value"), 1, one)
    assert value.backward < 1e-3
    decode = ours.decode(spec, 1, 8, 300, True, False)
    cache = 1.5 * 2 * 8 * 300 * 2 * 4096 / 1e12
    weights = 202_375_168 * (2 / 1e12 + 0.4 * 2 * 8 / 1e14)
    assert (decode.device, decode.host) == pytest.approx((weights + cache + 1e-4, 0.0))
    read = 2 * 4096 * 32000 / 1e12
    assert ours.decode_head(spec, 1, 8, True) == pytest.approx((read + 2e-4, 0.0))
    assert ours.decode_head(spec, 1, 8, False) == pytest.approx((read, 1e-3))
    assert RATES.decode_head(spec, 1, 8, True) == pytest.approx((read, 1e-3))
    # fp32 gradients are reduced to their replica, half-precision weights gathered from it.
    assert ours.step(1e9, 4, False) == pytest.approx(40e9 / 4 / 1e12 + 3 / 4 * 6e9 / 2e10)
    assert RATES.step(1e9, 4, False) == pytest.approx(40e9 / 4 / 1e12 + 2 * 3 / 4 * 2e9 / 2e10)


def test_steps_replicas_and_switches_count() -> None:
    once = predict(workload(), RATES)
    twice = predict(workload(minibatch=32, steps=2), RATES)
    assert twice.training > once.training
    assert twice.generation == once.generation
    spec, layout = published("7b"), Layout.even(1, 8, 1, 32)
    moved = predict(workload(actor=Part(spec, layout)), RATES)
    # 1,8 -> 2,4: half of an eighth of 6.738e9 weights of 2 bytes is not there.
    assert moved.switch == pytest.approx(6.738e9 / 8 / 2e10, rel=1e-3)
    assert once.switch == 0
    beside = replace(RATES, fixed=replace(RATES.fixed, step_s=0.25))  # of two models, in each of two steps
    assert predict(workload(minibatch=32, steps=2), beside).training - twice.training == pytest.approx(1.0)
    assert once.total == once.generation + once.inference + once.training
    bulk = predict(workload(stepped=1, fuse_training=True), RATES)
    fused = predict(workload(fuse_training=True), RATES)
    step = 40 * 6.607e9 / 8 / 1e12
    assert fused.training - bulk.training == pytest.approx(step, rel=1e-3)


def test_profiles_read_back() -> None:
    assert {"published-orion", "published-phoenix"} <= set(profiles())
    for name in profiles():
        read_calibration(name)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    made = Calibration("device", 80, "engine", "host", "2026-01-01", ("a", "b"), True, RATES)
    (tmp_path / "c.json").write_text(made.text())
    assert read_calibration(str(tmp_path / "c.json")) == made


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": 2}, "schema is 2, this version reads 1; take the calibration again"),
        ({"device": 3}, "device must be a text, found 3"),
        ({"memory_bytes": "80GB"}, "memory_bytes must be a whole number of at least 1, found '80GB'"),
        ({"rates": None}, "rates must be an object, found null"),
        ({"rates": {"speed": 1.0}}, "rates: speed is no constant; there are products, memory"),
        ({"rates": {**RATES.values(), "bus": 0}}, "rates: bus must be a finite number at least 1e-18"),
        ({"rates": {**RATES.values(), "bus": "fast"}}, "rates: bus must be a finite number"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, changes: dict, said: str) -> None:
    whole = json.loads(Calibration("d", 80, "e", "h", "t", (), True, RATES).text())
    (tmp_path / "c.json").write_text(json.dumps({**whole, **changes}))
    with pytest.raises(UserError, match=said) as caught:
        read_calibration(str(tmp_path / "c.json"))
    assert "\n" not in str(caught.value)
