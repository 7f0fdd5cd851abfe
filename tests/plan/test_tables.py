"""Measured tables: at their rows, between them, and outside."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from puzzle.errors import UserError
from puzzle.plan.layout import Layout
from puzzle.plan.predict.calibration import Calibration, read_calibration
from puzzle.plan.predict.costs import Fixed, Nodes, Pass, layer_products
from puzzle.plan.predict.iteration import Part, Workload, pipeline_costs
from puzzle.plan.predict.passes import decode_stages, stage_costs
from puzzle.plan.predict.tables import (
    CollectiveRow,
    DecodeRow,
    HeadRow,
    LayerRow,
    MessageRow,
    Shape,
    StepRow,
    Tables,
)
from puzzle.spec.published import published

SPEC = published("7b")
RATES = read_calibration("published-orion").rates
SHAPE = Shape.of(SPEC)


def layer(tokens: int, tp: int = 1, scale: float = 1.0) -> LayerRow:
    """At 100 TFLOP/s per 1024 tokens, up to that twice; a backward twice as long as the forward."""
    flops = layer_products(SPEC, Pass(tokens, 512, 0)) / tp
    forward = scale * flops / (1e14 * min(2.0, tokens / 1024))
    times = (0.9 * forward, forward, 2 * forward, 0.7 * forward, 1e-4, 2e-4, 3e-4)
    return LayerRow(SHAPE, tp, tokens, 512, *times)


def decode(rows: int, cached: float, tp: int = 1) -> DecodeRow:
    graph = (1e-4 + 1e-6 * rows + 1e-9 * rows * cached) / tp
    return DecodeRow(SHAPE, 32000, tp, rows, cached, graph, 1e-3, 5e-4, 2e-3, 1e-4 + 3e-6 * rows)


TABLES = Tables(
    item=2,
    layers=tuple(layer(tokens, tp) for tp in (1, 2) for tokens in (512, 1024, 2048, 8192)),
    heads=tuple(HeadRow(4096, 32000, tp, 1024, 1e-3, 2e-3, 3e-3, 4e-4, 5e-4, 6e-4) for tp in (1, 2)),
    decodes=tuple(decode(rows, cached) for cached in (64, 512) for rows in (1, 32, 256)),
    collectives=tuple(
        CollectiveRow(op, 2, 1, size, 1e-5 + size / 1e11)
        for op in ("all_reduce", "all_gather", "reduce_scatter")
        for size in (1 << 14, 1 << 20, 1 << 28)
    ),
    messages=(MessageRow(1 << 14, True, 1e-5), MessageRow(1 << 28, True, 1e-5 + (1 << 28) / 2e11)),
    step_s_per_parameter=1e-11,
    pass_host=1e-5,
    fixed=Fixed(4e-12, 0.07, 0.01),
    steps=(StepRow(8, 2e-11),),
)


def fresh() -> Tables:
    """Without marks of other tests."""
    return replace(TABLES, marks={})


def test_rows_are_met_and_what_lies_between_them_is_between() -> None:
    tables = fresh()
    for row in TABLES.layers:
        one = Pass(row.tokens, 512, 0, trained=True)
        got = tables.layer(SPEC, row.tp, one, False)
        assert (got.forward, got.backward, got.weights) == pytest.approx(
            (row.forward_s, row.backward_s, row.weights_s)
        )
        assert (got.issue_forward, got.issue_backward) == (row.issue_forward_s, row.issue_backward_s)
        untrained = tables.layer(SPEC, row.tp, replace(one, trained=False), False)
        assert (untrained.forward, untrained.backward) == (pytest.approx(row.infer_s), 0.0)
    low, high = (layer_products(SPEC, Pass(n, 512, 0)) / layer(n).forward_s for n in (1024, 2048))
    between = Pass(1448, 512, 0, trained=True)
    rate = layer_products(SPEC, between) / tables.layer(SPEC, 1, between, False).forward
    assert rate == pytest.approx((low + high) / 2, rel=1e-3)
    more = Pass(16384, 512, 0, trained=True)
    assert tables.layer(SPEC, 1, more, False).forward == pytest.approx(2 * layer(8192).forward_s)
    less = Pass(256, 512, 0, trained=True)
    assert tables.layer(SPEC, 1, less, False).forward == pytest.approx(layer(512).forward_s)
    assert not tables.notes()


def test_less_work_takes_no_longer() -> None:
    """A row that a disturbed host made long gives way to those of more work."""
    long = replace(layer(1024), forward_s=1.0, infer_s=1.0)
    rows = [layer(512), long, layer(2048), layer(8192)]
    tables = replace(fresh(), layers=tuple(rows), marks={})
    one = Pass(1024, 512, 0, trained=True)
    assert tables.layer(SPEC, 1, one, False).forward == pytest.approx(layer(2048).forward_s)
    sent = (MessageRow(1 << 10, True, 1.0), *TABLES.messages)
    assert replace(fresh(), messages=sent).send(1 << 10, False) == pytest.approx(1e-5)


def test_decode_is_linear_in_rows_and_in_cached_tokens() -> None:
    tables = fresh()
    for rows, cached in ((1, 64), (32, 512), (100, 64), (100, 300), (300, 700)):
        got = tables.decode(SPEC, 1, rows, cached, True, False)
        assert got.device == pytest.approx(decode(rows, cached).graph_s)
        assert got.host == 0
    launched = tables.decode(SPEC, 1, 32, 64, False, False)
    assert (launched.device, launched.host) == (5e-4, 5e-4)
    # A model of half the layer's weights, without a cache to speak of.
    narrow = replace(SPEC, intermediate_size=5504 - 2 * 4096 // 3, max_positions=4096)
    share = (4 * 4096 + 3 * narrow.intermediate_size) / (4 * 4096 + 3 * 11008)
    got = tables.decode(narrow, 1, 1, 64, True, False).device
    assert got == pytest.approx(share * decode(1, 64).graph_s, rel=1e-2)
    assert any("no layers of hidden size" in note for note in tables.notes())


def test_decode_lies_between_models_that_were_measured() -> None:
    """Linear in the bytes of a layer: kernels of a narrow one have their own time."""
    narrow = published("350m")
    rows = tuple(
        replace(row, shape=Shape.of(narrow), graph_s=3e-5 + 1e-7 * row.rows) for row in TABLES.decodes
    )
    tables = replace(fresh(), decodes=(*TABLES.decodes, *rows))
    wide, thin = (tables.decode(spec, 1, 32, 64, True, False).device for spec in (SPEC, narrow))
    assert wide == pytest.approx(decode(32, 64).graph_s)
    assert thin == pytest.approx(3e-5 + 32e-7)

    def read(hidden: int, ffn: int) -> float:
        return hidden * (4 * hidden + 3 * ffn) + 2 * hidden * 64 * 32

    between = replace(SPEC, hidden_size=2048, num_heads=16, num_kv_heads=16, intermediate_size=5504)
    share = (read(2048, 5504) - read(512, 11008)) / (read(4096, 11008) - read(512, 11008))
    got = tables.decode(between, 1, 32, 64, True, False).device
    assert got == pytest.approx(thin + share * (wide - thin))
    assert tables.decode(replace(SPEC, intermediate_size=2 * 11008), 1, 32, 64, True, False).device > wide


def test_what_was_not_measured_is_said_or_refused() -> None:
    tables = fresh()
    tables.layer(SPEC, 1, Pass(8192 * 5, 512, 0), False)
    assert tables.notes() == ["a layer's pass: far more than the 2.12e+11 to 3.38e+12 that were measured"]
    with pytest.raises(UserError, match=r"rows of a decode pass: 2e\+04 is asked for, 1 to 256 were"):
        tables.decode(SPEC, 1, 20000, 64, True, False)
    assert tables.layer(SPEC, 1, Pass(1, 512, 0), False).forward == pytest.approx(layer(512).infer_s)
    alone = replace(fresh(), collectives=())
    with pytest.raises(UserError, match="has no all_gather: take it again with at least 2 devices"):
        alone.layer(SPEC, 4, Pass(2048, 512, 0), False)
    with pytest.raises(UserError, match="has no messages"):
        replace(fresh(), messages=()).send(1e6, False)


def test_another_tp_is_a_cut_layer_and_its_collectives() -> None:
    tables, one = fresh(), Pass(4096, 512, 0, trained=True)
    got = tables.layer(SPEC, 4, one, False).forward
    quarter = tables.layer(SPEC, 1, Pass(1024, 512, 0, trained=True), False).forward
    moved = 3 / 4 * 2 * 4096 * 4096
    one_of_four = 1e-5 + moved * 2 / 1e11  # rows say how long half of the bytes take
    assert got == pytest.approx(quarter + 4 * one_of_four, rel=1e-3)
    assert "tp 4 was not measured: from tp 1 and collectives" in tables.notes()
    apart = replace(fresh(), nodes=Nodes(8, 1e10, 1e10, 1e-4))
    between = apart.layer(SPEC, 16, one, True).forward
    cut = apart.layer(SPEC, 1, Pass(256, 512, 0, trained=True), False).forward
    assert between == pytest.approx(cut + 4 * (1e-4 + 15 / 16 * 2 * 4096 * 4096 / 1e10), rel=1e-3)


def test_logits_are_made_at_answers_alone_by_this_engine() -> None:
    """Half of the positions, so that the head takes half; of the published engine all have logits."""
    part, value = Part(SPEC, Layout.even(1, 1, 1, 32)), replace(SPEC, head="value")
    work = Workload(
        actor=part,
        generation=part.layout,
        trained=(part,),
        inferred=(part,),
        stepped=1,
        sequences=8,
        minibatch=8,
        steps=1,
        prompt=256,
        response=256,
        microbatch=4,
    )
    head = HeadRow(4096, 32000, 1, 1024, 0.1, 1.0, 2.0, 1e-3, 2e-3, 3e-3)
    twice = replace(head, tokens=2048, infer_s=0.2, forward_s=2.0, backward_s=4.0)
    tables = replace(fresh(), heads=(head, twice))
    (stages,), (count,) = pipeline_costs([part], work, 8, tables, True)
    row = layer(2048)
    assert count == 2
    assert stages.forward == pytest.approx((32 * row.forward_s + 1.0,))
    for rates, positions in ((RATES, 2048), (replace(RATES, this_engine=True), 1024)):
        (stages,), _ = pipeline_costs([part], work, 8, rates, True)
        (alone,), _ = pipeline_costs([replace(part, spec=value)], work, 8, rates, True)
        per_position = 2 * 4096 * (32000 - 1) / rates.products
        per_position += (32000 - 1) * rates.engine.logits / rates.memory
        assert stages.forward[0] - alone.forward[0] == pytest.approx(positions * per_position)


def test_stages_are_made_of_them() -> None:
    layout, one = Layout.even(1, 4, 1, 32), Pass(2048, 512, 1024, trained=True)
    stages = stage_costs(SPEC, layout, one, fresh())
    row, sent = layer(2048), fresh().send(2 * 2048 * 4096, False)
    assert stages.forward == pytest.approx((*[8 * row.forward_s + sent] * 3, 8 * row.forward_s + 2e-3))
    assert stages.backward[0] == pytest.approx(8 * row.backward_s)
    host = [8 * row.issue_forward_s + 1e-5] * 4, [8 * row.issue_backward_s + 1e-5] * 4
    host[0][-1] += 5e-4
    host[1][-1] += 6e-4
    assert (stages.issued, stages.issued_back) == (
        pytest.approx(tuple(host[0])),
        pytest.approx(tuple(host[1])),
    )
    ring = decode_stages(SPEC, layout, 32, 64, fresh(), graphs=True)
    message = fresh().send(2 * 32 * 4096, False)
    assert sum(ring.device) == pytest.approx(32 * decode(32, 64).graph_s + 1e-3 + 4 * message)
    assert ring.host == pytest.approx([1e-4 + 3e-6 * 32] * 4), (
        "a replayed pass takes its host no layer's time"
    )
    launched = decode_stages(SPEC, layout, 32, 64, fresh(), graphs=False)
    assert launched.host == pytest.approx([8 * 5e-4 + 1e-5] * 4)


def test_steps_sum_fp32_gradients_and_spread_weights() -> None:
    held, tables = 1e9, fresh()
    assert tables.step(held, 1, False) == pytest.approx(0.01)
    bus = 2e11 / 2  # half of a whole tensor's bytes at 1e11 bytes of it a second
    spread = (4 + 2) * held / 2 / (bus / 2)
    assert tables.step(held, 2, False) == pytest.approx(0.005 + spread, rel=1e-2)


def test_measured_steps_of_replicas_win() -> None:
    tables = replace(fresh(), steps=(StepRow(4, 7e-11),))
    assert tables.step(1e9, 4, False) == pytest.approx(0.07)
    assert tables.step(1e9, 2, False) == fresh().step(1e9, 2, False)


def test_files_read_back(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    made = Calibration("d", 80, "e", "h", "t", (), True, TABLES, {"torch": "2"})
    path.write_text(made.text())
    read = read_calibration(str(path))
    assert replace(read, costs=TABLES) == made
    assert isinstance(read.costs, Tables)
    for name in ("layers", "heads", "decodes", "collectives", "messages", "steps"):
        for ours, theirs in zip(getattr(read.costs, name), getattr(TABLES, name), strict=True):
            for key, value in vars(theirs).items():
                same = math.isclose(getattr(ours, key), value, rel_tol=1e-3) if key.endswith("s") else None
                assert same or getattr(ours, key) == value
    with pytest.raises(UserError, match="holds tables; give one of constants"):
        _ = read.rates


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["layers"].clear(), "layers, heads and decodes must have rows"),
        (lambda t: t["layers"][0].pop("tp"), r"tables: layers\[0\]: tp is missing"),
        (lambda t: t["layers"][0].update(forward_s=0), r"layers\[0\]: forward_s must be a finite number"),
        (lambda t: t["messages"][0].update(same_node=1), r"messages\[0\]: same_node must be true or false"),
        (lambda t: t.update(item="2"), "item must be a whole number"),
        (lambda t: t["decodes"][0].update(hidden=-1), r"decodes\[0\]: hidden must be a whole number"),
    ],
)
def test_damaged_tables_are_refused_in_one_line(tmp_path: Path, change, said: str) -> None:
    values = json.loads(Calibration("d", 80, "e", "h", "t", (), True, TABLES).text())
    change(values["tables"])
    (tmp_path / "c.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=said) as caught:
        read_calibration(str(tmp_path / "c.json"))
    assert "\n" not in str(caught.value)
