from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.plan.cluster import Cluster
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.reshard.overlap import Rows
from puzzle.plan.reshard.roles import choose_roles, role_costs
from puzzle.spec.model import ModelSpec
from puzzle.spec.published import published
from tests.plan.worlds import layouts, specs, storages

FAR = 3  # a byte between nodes costs as much as three inside one


def lacking(spec, source, layout, ranks, cluster):
    """(ranks, coordinates): weighted and plain bytes that a rank lacks in a role, element by element."""
    held = {}
    for rank in source.ranks:
        arrays = storages(spec, source.layout, source.coord_of(rank)).values()
        held[rank] = np.concatenate([array.ravel() for array in arrays])
    nothing = np.zeros(1, np.int64)
    cost, missing = np.zeros((2, len(ranks), layout.world), np.int64)
    for column, coord in enumerate(layout.coords()):
        wanted = np.concatenate([a.ravel() for a in storages(spec, layout, coord).values()])
        wanted = wanted[wanted != 0]
        for row, rank in enumerate(ranks):
            absent = wanted[~np.isin(wanted, held.get(rank, nothing))]
            mates = [held[r] for r in held if cluster.node_of(r) == cluster.node_of(rank)]
            near = np.isin(absent, np.concatenate([nothing, *mates])).sum()
            missing[row, column] = len(absent)
            cost[row, column] = near + FAR * (len(absent) - near)
    return cost, missing


def legal(order, layout, ranks, cluster):
    """Whether tensor-parallel groups stay inside nodes, or fill blocks of neighbouring ones."""
    block = -(-layout.tp // cluster.devices_per_node)
    cells = [cluster.node_of(ranks[row]) // block for row in order]
    return all(len(set(cells[i : i + layout.tp])) == 1 for i in range(0, layout.world, layout.tp))


def brute_force(cost, missing, layout, ranks, cluster):
    orders = np.array(list(permutations(range(len(ranks)))))
    columns = np.arange(layout.world)
    found = list(zip(cost[orders, columns].max(axis=1), missing[orders, columns].sum(axis=1), strict=True))
    inside = [legal(order, layout, ranks, cluster) for order in orders]
    pool = [value for value, ok in zip(found, inside, strict=True) if ok] or found
    return min(pool), any(inside)


def compare(spec, source, layout, ranks, cluster):
    costs = role_costs(Rows(spec, source.layout, layout, 1), source, ranks, cluster)
    roles = choose_roles(costs, layout, cluster)
    cost, missing = lacking(spec, source, layout, ranks, cluster)
    best, can_be_inside = brute_force(cost, missing, layout, ranks, cluster)
    order = [ranks.index(rank) for rank in roles.placement.ranks]
    columns = np.arange(layout.world)
    assert (cost[order, columns].max(), missing[order, columns].sum()) == best
    assert roles.exact
    assert roles.inside_nodes == can_be_inside
    assert not can_be_inside or legal(order, layout, ranks, cluster)
    seconds, nbytes = costs.of(roles.placement)
    assert seconds * FAR * 1e9 == pytest.approx(best[0])
    assert nbytes == best[1]


@given(st.data())
@settings(max_examples=60)
def test_roles_are_those_of_brute_force(data):
    spec = data.draw(specs(max_layers=4))
    source, destination = data.draw(layouts(spec, 8)), data.draw(layouts(spec, 6))
    first = data.draw(st.sampled_from([0, 0, 2]))
    pool = range(first, first + 8)
    ranks = tuple(sorted(data.draw(st.permutations(pool))[: destination.world]))
    placement = Placement(source, tuple(data.draw(st.permutations(range(source.world)))))
    compare(spec, placement, destination, ranks, Cluster(data.draw(st.sampled_from([1, 2, 4, 8])), FAR, 1))


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize(
    ("source", "destination"),
    [
        ((2, 4, 1), (4, 2, 1)),
        ((1, 8, 1), (2, 4, 1)),
        ((1, 4, 2), (2, 2, 2)),
        ((4, 1, 2), (2, 4, 1)),
        ((8, 1, 1), (1, 2, 4)),
    ],
)
def test_eight_ranks(source, destination, devices):
    spec = ModelSpec("llama", 21, 4, 16, 8, 8, 4, 2, tie_embeddings=True)
    placement = Placement.default(Layout.even(*source, 8))
    compare(spec, placement, Layout.even(*destination, 8), tuple(range(8)), Cluster(devices, FAR, 1))


@pytest.mark.parametrize("source", [(2, 8, 4), (1, 16, 4), (4, 4, 4), (8, 8, 1)])
@pytest.mark.parametrize("destination", [(4, 4, 4), (2, 32, 1), (8, 2, 4)])
def test_64_ranks_never_cost_more_than_rank_order(source, destination):
    spec, cluster = published("33b"), Cluster(8, 200, 25)
    placement = Placement.default(Layout.even(*source, 64))
    layout = Layout.even(*destination, 64)
    costs = role_costs(Rows(spec, placement.layout, layout, 2), placement, tuple(range(64)), cluster)
    roles = choose_roles(costs, layout, cluster)
    assert roles.exact
    assert roles.inside_nodes
    assert costs.of(roles.placement) <= costs.of(Placement.default(layout))
    for group in roles.placement.groups("tp"):
        assert len({cluster.node_of(rank) for rank in group}) == 1


def test_a_group_larger_than_a_node_fills_neighbouring_nodes():
    spec = ModelSpec("llama", 21, 4, 16, 2, 8, 8, 2)
    cluster, layout = Cluster(2, 200, 25), Layout.even(4, 2, 1, 2)
    source = Placement.default(Layout.even(1, 2, 4, 2))
    costs = role_costs(Rows(spec, source.layout, layout, 2), source, tuple(range(8)), cluster)
    roles = choose_roles(costs, layout, cluster)
    assert roles.inside_nodes
    assert {frozenset(group) for group in roles.placement.groups("tp")} == {
        frozenset(range(4)),
        frozenset(range(4, 8)),
    }
