import json

import pytest

from puzzle.plan.cluster import Cluster
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.reshard.describe import switch_json, switch_table
from puzzle.plan.reshard.plan import plan_switch
from puzzle.spec.published import published


@pytest.fixture(scope="module")
def plan():
    spec = published("13b")
    sides = [Placement.default(Layout.even(*sizes, 40)) for sizes in ((2, 8, 1), (4, 4, 1))]
    return plan_switch(spec, *sides, Cluster(8, 200, 25))


def test_json_adds_up(plan):
    numbers = json.loads(json.dumps(switch_json(plan)))
    ranks = numbers["ranks"]
    assert numbers["local_share"] == pytest.approx(0.5)
    assert (
        numbers["bytes_received"] == numbers["lower_bound_bytes"] == sum(r["received_bytes"] for r in ranks)
    )
    assert sum(r["sent_bytes"] for r in ranks) == sum(pair["bytes"] for pair in numbers["pairs"])
    assert numbers["fixed_order_bytes"] == pytest.approx(1.5 * numbers["bytes_received"], rel=1e-3)
    for row in ranks:
        assert row["needed_bytes"] == row["local_bytes"] + row["received_bytes"]
        assert row["node"] == row["rank"] // 8
    assert {tuple(r["destination"].values()) for r in ranks} == {
        (t, p, 0) for t in range(4) for p in range(4)
    }
    busiest = max(max(r["received_bytes"], r["sent_bytes"]) for r in ranks)
    assert numbers["seconds_model"] == pytest.approx(busiest / 200e9)


def test_table_says_the_same(plan):
    text = switch_table(plan)
    assert "local share        50.0%" in text
    assert f"received           {plan.bytes_received / 1e9:.3f} GB" in text
    assert "proven best; tensor-parallel groups inside nodes" in text
    lines = text.splitlines()
    rows = [line for line in lines if line.lstrip().startswith(tuple("0123456789")) and "GB" in line]
    assert len(rows) == 16
    drawing = lines[lines.index("") :][-17:]
    assert len(drawing[0].split()) == 16
    for source, line in enumerate(drawing[1:]):
        cells = [line[3 + 3 * i : 6 + 3 * i].strip() for i in range(16)]
        to = {i for i, cell in enumerate(cells) if cell}
        assert to == {destination for s, destination in plan.pairs if s == source}


def test_large_plans_are_drawn_by_node_and_idle_ranks_shown():
    spec = published("350m")
    sides = [
        Placement.default(Layout.even(1, 16, 1, 16)),
        Placement.default(Layout.even(1, 1, 48, 16), first=8),
    ]
    plan = plan_switch(spec, *sides, Cluster(8, 200, 25), strategy="fixed-order")
    text = switch_table(plan)
    assert "by node" in text
    assert len(text.splitlines()[-1]) <= 3 + 3 * 7
    assert switch_json(plan)["ranks"][0]["destination"] is None
    assert "proven" not in text


def test_nothing_moves():
    side = Placement.default(Layout.even(2, 2, 1, 16))
    assert switch_table(plan_switch(published("350m"), side, side, Cluster(8, 200, 25))).endswith(
        "nothing moves"
    )
