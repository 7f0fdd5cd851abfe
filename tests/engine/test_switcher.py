"""Switches between layouts on 8 gloo ranks: bit-equal to weights cut afresh, in the planned memory."""

from dataclasses import replace
from itertools import cycle, permutations

import pytest
import torch

from puzzle.engine.switcher import lends_pages
from puzzle.plan.switch import Transport
from puzzle.plan.switch_route import Strategy
from tests.engine.switching import SPECS, Case, deserted, flipped, matrix, mismatched, unreadable
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


@pytest.mark.long
@pytest.mark.parametrize("spec", SPECS)
def test_all_ordered_pairs(spec):
    cases = [
        Case(spec, *pair, strategy=strategy, transport=transport)
        for pair in permutations(LAYOUTS, 2)
        for strategy, transport in WAYS
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
