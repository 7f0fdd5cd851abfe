from dataclasses import replace
from itertools import combinations, pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle.errors import UserError
from puzzle.plan.layout import Coord, GroupKind, Layout, Placement
from puzzle.spec.model import ModelSpec
from puzzle.spec.published import published
from tests.plan.worlds import layouts, specs

SMALL = ModelSpec("llama", 40, 8, 24, 6, 8, 2, 2)


def all_cuts(layers, parts):
    for cuts in combinations(range(1, layers), parts - 1):
        yield tuple(b - a for a, b in pairwise([0, *cuts, layers]))


def test_even_gives_the_remainder_to_the_first_stages():
    assert Layout.even(1, 16, 1, 40).stage_layers == (3,) * 8 + (2,) * 8
    assert Layout.even(2, 3, 1, 6).stage_layers == (2, 2, 2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["lm", "value"])
def test_balanced_is_the_best_of_all_cuts(tied, head):
    for vocab, pp in product((4, 60, 300), (1, 2, 3, 4)):
        spec = replace(SMALL, vocab_size=vocab, num_layers=7, tie_embeddings=tied, head=head)
        layer = sum(t.size for t in spec.tensors() if t.place == 0)
        embed = vocab * 8
        last = 8 + (8 if head == "value" else embed)
        if tied and head == "lm" and pp == 1:
            last = 8

        def largest(stages, layer=layer, embed=embed, last=last):
            loads = [n * layer for n in stages]
            loads[0] += embed
            loads[-1] += last
            return max(loads)

        chosen = Layout.balanced(1, pp, 1, spec).stage_layers
        assert sum(chosen) == 7
        assert largest(chosen) == min(map(largest, all_cuts(7, pp)))


@given(st.data())
def test_nested_borders_lie_on_borders(data):
    layers = data.draw(st.integers(1, 9))
    inside = data.draw(layouts(replace(SMALL, num_layers=layers), max_world=9))
    pp = data.draw(st.integers(1, layers))
    nested = Layout.nested(2, pp, 1, inside)
    assert sum(nested.stage_layers) == layers
    ours, theirs = set(nested.first_layers), set(inside.first_layers)
    assert ours <= theirs if pp <= inside.pp else theirs <= ours
    legal = [c for c in all_cuts(layers, pp) if _borders(c) <= theirs or theirs <= _borders(c)]
    assert max(nested.stage_layers) == min(map(max, legal))


def _borders(stages):
    return {sum(stages[:i]) for i in range(len(stages) + 1)}


def test_nested_in_even_stages_is_even_where_it_can_be():
    assert Layout.nested(4, 4, 1, Layout.even(2, 8, 1, 20)).stage_layers == (6, 6, 4, 4)
    assert Layout.nested(4, 4, 1, Layout.even(2, 8, 1, 40)).stage_layers == (10,) * 4


@given(st.data())
def test_ranks_and_groups(data):
    layout = data.draw(layouts(SMALL, max_world=12))
    ranks = tuple(data.draw(st.permutations(range(3, 3 + layout.world))))
    placement = Placement(layout, ranks)
    for coord in layout.coords():
        rank = placement.rank_of(coord)
        assert rank == ranks[coord.p * layout.dp * layout.tp + coord.d * layout.tp + coord.t]
        assert placement.coord_of(rank) == coord
        assert placement.tp_group(coord)[coord.t] == rank
        assert placement.dp_group(coord)[coord.d] == rank
        assert placement.pp_group(coord)[coord.p] == rank
    sizes: dict[GroupKind, int] = {"tp": layout.tp, "dp": layout.dp, "pp": layout.pp}
    for kind, size in sizes.items():
        groups = placement.groups(kind)
        assert sorted(rank for group in groups for rank in group) == sorted(ranks)
        assert {len(group) for group in groups} == {size}
    assert 2 not in placement
    assert ranks[0] in placement


def test_default_placement():
    placement = Placement.default(Layout.even(2, 2, 2, 6), first=4)
    assert placement.ranks == tuple(range(4, 12))
    assert placement.rank_of(Coord(t=1, p=1, d=0)) == 4 + 5


@given(specs(), st.integers(1, 16))
def test_tp_is_legal_exactly_by_the_rule(spec, tp):
    kv, blocks = spec.num_kv_heads, spec.ffn_blocks
    legal = spec.num_heads % tp == 0 and (tp % kv == 0 or kv % tp == 0) and blocks % tp == 0
    layout = Layout.even(tp, 1, 1, spec.num_layers)
    if legal:
        layout.check(spec)
    else:
        with pytest.raises(UserError, match="use one of 1"):
            layout.check(spec)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Layout(0, 1, 1, (6,)), "layout.tp is 0"),
        (lambda: Layout(1, 2, 1, (6,)), "layout.stage_layers 6: give pp=2 numbers"),
        (lambda: Layout(1, 2, 1, (6, 0)), "each at least 1"),
        (lambda: Layout.even(1, 7, 1, 6), "layout.pp=7 is more than the model's 6 layers"),
        (lambda: Layout.even(1, 0, 1, 6), "layout.pp is 0"),
        (lambda: Layout.balanced(1, 0, 1, SMALL), "layout.pp is 0"),
        (lambda: Layout.nested(1, 0, 1, Layout.even(1, 2, 1, 6)), "layout.pp is 0"),
        (lambda: Layout.even(1, 1, 1, 5).check(SMALL), "adds up to 5 layers, the model has 6"),
        (lambda: Layout.even(3, 1, 1, 6).check(SMALL), "layout.tp=3 does not divide 8 query heads"),
        (lambda: Layout.even(2, 1, 1, 6).check(replace(SMALL, num_kv_heads=8, intermediate_size=9)), "ffn"),
        (lambda: Layout.even(4, 1, 1, 40).check(replace(published("13b"), num_kv_heads=5)), "key/value"),
        (lambda: Placement(Layout.even(2, 1, 1, 6), (0,)), "needs 2 different ranks, 1 given"),
        (lambda: Placement(Layout.even(2, 1, 1, 6), (4, 4)), "needs 2 different ranks, 1 given"),
    ],
)
def test_refused(make, words):
    with pytest.raises(UserError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)
