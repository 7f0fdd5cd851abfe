"""The order of a switch's messages and copies, and what its report says of bytes, for any two layouts."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.plan.cluster import Cluster
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.reshard import routing as switch_route
from puzzle.plan.reshard.overlap import Fragment
from puzzle.plan.reshard.plan import plan_switch
from puzzle.spec.published import published
from tests.plan.test_switch import STRATEGIES, _absent_bytes, published_plan, switches
from tests.plan.worlds import storages


@given(switches(), st.sampled_from([0, 100, 1 << 20]), st.sampled_from([0, 40, 1 << 20]))
@settings(max_examples=60)
def test_both_ends_expect_the_same_messages_from_the_next_neighbour_on(switch, staging_bytes, direct):
    """In every bucket a rank sends to the ranks after it, nearest first, and hears from those before it; of a
    pair, the packed message comes first and the others follow in the order of units."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(switch_route, "DIRECT", direct)
        plan = plan_switch(*switch, staging_bytes=staging_bytes)
    parts = {rank: plan.for_rank(rank) for rank in plan.ranks}
    world = plan.ranks[-1] + 1
    number = {name: i for i, unit in enumerate(plan.units) for name in unit.source.values()}
    for index in range(plan.num_buckets):
        wires = defaultdict(list)
        for rank, part in parts.items():
            sends, receives = part.buckets[index].sends, part.buckets[index].receives
            hops = [(message.peer - rank) % world for message in sends]
            assert hops == sorted(hops)
            assert 0 not in hops
            hops = [(rank - message.peer) % world for message in receives]
            assert hops == sorted(hops)
            assert 0 not in hops
            for peer in {message.peer for message in sends}:
                to_peer = [message for message in sends if message.peer == peer]
                assert all(len(message.parts) == 1 for message in to_peer[1:])
                units = [number[m.parts[0].name] for m in to_peer if len(m.parts) == 1]
                assert units == sorted(units)
            for message in sends:
                wires[rank, message.peer].append((len(message.parts), message.nbytes))
        for rank, part in parts.items():
            for message in part.buckets[index].receives:
                assert wires[message.peer, rank].pop(0) == (len(message.parts), message.nbytes)
        assert not any(wires.values())


@given(switches(), st.sampled_from(STRATEGIES), st.booleans(), st.sampled_from([1, 2, 4]))
@settings(max_examples=60)
def test_reported_bytes_are_counted_element_by_element(switch, strategy, zero, itemsize):
    """What is already there, what is not (of any strategy), its share, and what each direction takes."""
    plan = plan_switch(*switch, strategy=strategy, zero=zero, itemsize=itemsize)
    absent, needed = _absent_bytes(plan), {}
    for rank in plan.destination.ranks:
        wanted = storages(plan.spec, plan.destination.layout, plan.destination.coord_of(rank)).values()
        needed[rank] = sum(int((array != 0).sum()) for array in wanted) * itemsize
    assert plan.local_bytes == {rank: needed[rank] - absent[rank] for rank in needed}
    assert plan.lower_bound_bytes == sum(absent.values()) <= plan.bytes_received
    assert plan.local_share == pytest.approx(1 - sum(absent.values()) / sum(needed.values()))
    for rank in plan.ranks:
        sent = sum(n for (source, _), n in plan.pairs.items() if source == rank)
        received = sum(n for (_, destination), n in plan.pairs.items() if destination == rank)
        assert plan.traffic(rank) == (sent, received)


def test_the_time_is_that_of_the_busiest_direction():
    """Rank 0 sends half of 350M's weights to each of two neighbours at 200 GB/s, one latency per bucket."""
    plan = published_plan("350m", (1, 1, 1), (2, 1, 1))
    (pair,) = plan.pairs.items()
    assert pair[0][0] == 0
    assert plan.seconds_model == pytest.approx(pair[1] / 200e9 + plan.num_buckets * plan.cluster.latency)
    assert plan.num_buckets >= 1
    assert plan.depth == 2
    assert published_plan("350m", (1, 1, 1), (2, 1, 1), strategy="fixed-order").depth == 1


def test_a_gather_of_replicas_takes_the_slowest_link_of_its_ring():
    """Four replicas of 350M on two nodes of two: a ring between them crosses nodes at 25 GB/s."""
    far = plan_switch_on_nodes(2)
    near = plan_switch_on_nodes(4)
    total = sum(near.gather_bytes.values())
    assert total == pytest.approx(3 * near.spec.parameters * 2, rel=1e-3)
    assert near.gather_seconds == pytest.approx(max(near.gather_bytes.values()) / 200e9)
    assert far.gather_seconds == pytest.approx(max(far.gather_bytes.values()) / 25e9)


def plan_switch_on_nodes(devices: int):
    spec = published("350m")
    sides = [Placement.default(Layout.even(*n, spec.num_layers)) for n in ((1, 1, 4), (4, 1, 1))]
    return plan_switch(spec, *sides, Cluster(devices, 200, 25))


@given(switches())
@settings(max_examples=30)
def test_copies_out_of_peers_take_turns(switch):
    """Of every peer, in turns that begin with the next neighbour: no peer is read by all at once."""
    plan = plan_switch(*switch).by_peer_copies()
    world = plan.ranks[-1] + 1
    for rank in plan.ranks:
        pulls = plan.for_rank(rank).pulls
        turns: dict[int, int] = defaultdict(int)
        keys = []
        for pull in pulls:
            assert pull.peer != rank
            keys.append((turns[pull.peer], (pull.peer - rank) % world))
            turns[pull.peer] += 1
        assert keys == sorted(keys)
        assert sum(pull.nbytes for pull in pulls) == plan.traffic(rank)[1]


def test_rows_of_a_message_of_their_own_are_those_from_the_border_on(monkeypatch):
    """Rows of DIRECT bytes travel alone, rows of one byte less in a packed message with others."""
    plan = published_plan("350m", (2, 1, 1), (1, 1, 1))
    sizes = np.unique(plan.remote["nbytes"])
    border = int(sizes[len(sizes) // 2])
    monkeypatch.setattr(switch_route, "DIRECT", border)
    plan = published_plan("350m", (2, 1, 1), (1, 1, 1))
    packed = plan.remote["nbytes"][plan.remote["packed"]]
    alone = plan.remote["nbytes"][~plan.remote["packed"]]
    assert packed.max() < border
    assert alone.min() >= border
    assert border in alone


@given(st.lists(st.tuples(st.integers(1, 2000), st.integers(0, 2)), max_size=40))
def test_the_smallest_hundredth_of_what_a_rank_needs_is_small(wanted):
    """Byte by byte: what, with all that is no larger, makes up at most a hundredth of the rank's bytes."""
    wanted.sort(reverse=True)
    needs = [switch_route._Need(nbytes, 0, rank, Fragment(0, 1, {})) for nbytes, rank in wanted]
    small = switch_route._small(needs)
    for number, (_, rank) in enumerate(wanted):
        behind = sum(nbytes for nbytes, other in wanted[number:] if other == rank)
        whole = sum(nbytes for nbytes, other in wanted if other == rank)
        assert (number in small) == (100 * behind <= whole)
