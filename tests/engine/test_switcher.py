"""Switches between layouts on 8 gloo ranks: bit-equal to weights cut afresh, in the planned memory."""

from dataclasses import replace
from itertools import cycle, permutations
from types import SimpleNamespace

import pytest
import torch

from puzzle.engine.reshard.resharder import Resharder, lends_pages
from puzzle.engine.runtime.world import World
from puzzle.model.packing import pack
from puzzle.plan.reshard.plan import Transport
from puzzle.plan.reshard.routing import Strategy
from tests.engine.switching import (
    LAYERS,
    SPECS,
    Case,
    deserted,
    flipped,
    matrix,
    mismatched,
    peers_in_turn,
    stage,
    unreadable,
)
from tests.helpers import run_ranks

LAYOUTS = [
    (1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1), (1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2),
    (1, 1, 8), (2, 1, 4), (8, 1, 1), (4, 2, 1), (1, 3, 2), (2, 4, 1),
]  # fmt: skip
CI_PAIRS = [
    ((1, 4, 1), (2, 2, 1)), ((1, 4, 1), (4, 1, 1)), ((2, 2, 1), (4, 1, 1)), ((1, 4, 1), (1, 1, 8)),
    ((2, 4, 1), (8, 1, 1)), ((8, 1, 1), (1, 4, 1)), ((1, 3, 2), (2, 2, 2)), ((2, 2, 2), (1, 3, 2)),
    ((1, 1, 2), (2, 1, 4)), ((4, 2, 1), (2, 1, 1)), ((1, 2, 2), (4, 1, 1)), ((1, 1, 1), (8, 1, 1)),
    ((1, 1, 8), (1, 1, 1)), ((2, 1, 2), (1, 2, 2)), ((4, 1, 2), (1, 4, 2)), ((1, 2, 1), (1, 3, 1)),
    ((1, 2, 4), (2, 2, 2)), ((8, 1, 1), (4, 1, 2)), ((2, 2, 1), (1, 1, 4)), ((1, 4, 2), (8, 1, 1)),
]  # fmt: skip
WAYS: list[tuple[Strategy, Transport]] = [
    ("planned", "messages"),
    ("planned", "peer"),
    ("fixed-order", "messages"),
    ("gather-all", "messages"),
]


def covering() -> list[Case]:
    """Every pair planned; models, transports, dtypes, disjoint ranks, small buckets take turns."""
    turns = zip(CI_PAIRS, cycle(SPECS), cycle([False, True, True]), cycle([True, False]), strict=False)
    cases = [
        Case(spec, *pair, last=last, small=small, dtype=torch.bfloat16 if number % 5 == 4 else torch.float32)
        for number, (pair, spec, last, small) in enumerate(turns)
    ]
    cases += [replace(case, zero=True) for case in cases if case.source[2] > 1]
    cases += [replace(case, transport="peer", small=False) for case in cases]
    cases = [replace(case, keep=number % 3 == 0) for number, case in enumerate(cases)]
    turns = zip(CI_PAIRS, cycle(SPECS), range(12), strict=False)
    for pair, spec, number in turns:
        cases.append(Case(spec, *pair, strategy="gather-all" if number % 2 else "fixed-order"))
    return cases


def test_any_layout_to_any_other():
    cases = covering()
    assert [line for lines in run_ranks(matrix, 8, cases, 0, timeout=300.0) for line in lines] == []


def test_extra_memory_is_what_the_plan_says():
    cases = [
        Case("lm", (1, 4, 1), (2, 2, 1), small=True),
        Case("tied", (2, 2, 1), (1, 3, 2)),
        Case("tied", (2, 2, 1), (1, 3, 2), transport="peer"),
        Case("tied", (1, 2, 3), (2, 1, 2), zero=True),
        Case("lm", (1, 2, 2), (4, 1, 1), zero=True, transport="peer"),
        Case("lm", (2, 1, 2), (4, 2, 1), "fixed-order"),
        Case("value", (1, 4, 1), (4, 1, 1), "gather-all"),
    ]
    assert [line for lines in run_ranks(matrix, 8, cases, len(cases), timeout=200.0) for line in lines] == []


def test_passes_await_what_they_read_next(monkeypatch):
    """With names for events: the embedding's before all, each layer's before the layer, the rest behind."""
    case = Case("lm", (1, 1, 1), (1, 1, 1))
    plan, cpu = case.plan(), torch.device("cpu")
    source, destination = (stage(plan, plan.source, 0, where, torch.float32) for where in ("cpu", "meta"))
    assert destination is not None
    switcher = Resharder(plan, World(0, 1, cpu), source, destination)
    switcher.fill()
    seen: list[str] = []
    stream = SimpleNamespace(wait_event=seen.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    switcher._await_in(destination)
    for number, layer in destination.layers.items():
        layer.register_forward_pre_hook(lambda *_, number=number: seen.append(f"pass {number}"))
    for storage in destination.storages:
        switcher.transport.arrived[storage.name].append(storage.name)  # ty: ignore[invalid-argument-type]
    batch = pack([[1, 2, 3], [4]], 1, cpu)
    destination(batch.tokens_T, batch)
    names = [storage.name for storage in destination.storages]
    passes = [place for place, name in enumerate(seen) if name.startswith("pass")]
    for number, place in enumerate(passes):
        layers = [
            name for name in names if name.split(".")[0] == "layers" and int(name.split(".")[1]) <= number
        ]
        assert set(seen[:place]) - {f"pass {n}" for n in range(number)} == {"embed", *layers}
    assert set(seen) == {*names, *(f"pass {number}" for number in range(LAYERS))}
    del seen[:]
    destination(batch.tokens_T, batch)
    assert seen == [f"pass {number}" for number in range(LAYERS)]


@pytest.mark.long
@pytest.mark.parametrize("spec", SPECS)
def test_all_ordered_pairs(spec):
    cases = [
        Case(spec, *pair, strategy=strategy, transport=transport)
        for pair in permutations(LAYOUTS, 2)
        for strategy, transport in WAYS
    ]
    assert [line for lines in run_ranks(matrix, 8, cases, 0, timeout=3600.0) for line in lines] == []


@pytest.mark.long
@pytest.mark.parametrize("spec", SPECS)
def test_all_pairs_out_of_zero_shards(spec):
    cases = [
        Case(spec, *pair, strategy=strategy, transport=transport, zero=True)
        for pair in permutations(LAYOUTS, 2)
        for strategy, transport in WAYS
        if pair[0][2] > 1
    ]
    assert [line for lines in run_ranks(matrix, 8, cases, 0, timeout=3600.0) for line in lines] == []


@pytest.mark.parametrize(
    ("which", "tensor"),
    [("layers.2.down", "model.layers.2.mlp.down_proj.weight"), ("final_norm", "model.norm.weight")],
)
def test_verify_finds_one_flipped_bit(which, tensor):
    case = Case("tied", (1, 4, 1), (2, 1, 2), last=True)  # other ranks: nothing is aliased
    for said in run_ranks(flipped, 8, case, which):
        assert said.startswith(f"switch: {tensor} differs in the destination placement (replica 1, holder ")
        assert "\n" not in said


def test_ranks_with_other_plans_refuse():
    for said in run_ranks(mismatched, 2):
        assert said.startswith("UserError: switch: ranks 1 made another plan than rank 0 (hashes ")
        assert "\n" not in said


@pytest.mark.parametrize(
    ("transport", "what"),
    [
        ("messages", ["switch, bucket 0: ", "peer rank 1"]),
        ("peer", ["switch: wait until the weights of ranks 0, 1 are ready"]),
    ],
)
def test_a_missing_peer_is_named(transport, what):
    said = run_ranks(deserted, 2, transport)[0]
    assert said.startswith(f"RuntimeError: {what[0]}")
    assert all(words in said for words in what)
    assert "\n" not in said


def test_peer_copies_are_refused_where_they_cannot_be():
    for rank, (other_host, gather_all, moved) in enumerate(run_ranks(unreadable, 2)):
        assert other_host == (
            "switch.transport peer: rank 0 cannot read rank 1's weights: it is on another host;"
            " use auto or messages"
        ), rank
        assert gather_all == "switch.transport peer: the strategy gather-all needs messages; use auto"
        assert moved == "switch: training weights have moved since peers opened them"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, False),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, False),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True"}, True),
    ],
)
def test_memory_stays_with_torch_where_it_is_mapped_by_pages(settings, expected, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert lends_pages() == expected


@pytest.mark.parametrize("destination", [(1, 1, 4), (4, 1, 1)])
def test_at_each_time_another_rank_reads_from_every_peer(destination):
    """One peer after another, of which all ranks begin with another one: no two ranks read from one."""
    found = run_ranks(peers_in_turn, 4, (1, 4, 1), destination)
    orders = [list(dict.fromkeys(read)) for read in found]
    assert [sorted(read, key=order.index) for read, order in zip(found, orders, strict=True)] == found
    for step in range(3):
        assert sorted(order[step] for order in orders) == [0, 1, 2, 3]
