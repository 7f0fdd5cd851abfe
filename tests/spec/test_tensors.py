"""Rules by which tensor ranks cut tensors, against lists of rows."""

import math

import pytest

from puzzle.spec.model import ModelSpec
from puzzle.spec.tensors import Split, VocabSplit


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("units", [1, 2, 4, 6, 8])
def test_blocks_go_to_ranks_in_order_and_few_are_shared(units: int, tp: int) -> None:
    """tp divides the units or is a multiple of them, as `Layout.check` demands."""
    if units % tp and tp % units:
        pytest.skip("no layout")
    rows = list(range(5 * units))  # blocks of five rows
    blocks = [rows[5 * i : 5 * (i + 1)] for i in range(units)]
    if tp <= units:
        share = units // tp
        wanted = [[row for b in blocks[t * share : (t + 1) * share] for row in b] for t in range(tp)]
    else:
        copies = tp // units
        wanted = [blocks[t // copies] for t in range(tp)]
    split = Split(0, units)
    found = [rows[slice(*split.interval(len(rows), tp, t))] for t in range(tp)]
    assert found == wanted
    for t in range(tp):
        assert list(split.holders(tp, t)) == [other for other in range(tp) if wanted[other] == wanted[t]]


@pytest.mark.parametrize("size", [1, 5, 8, 259])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_vocabulary_is_cut_into_chunks_whose_last_ones_may_be_short_or_empty(size: int, tp: int) -> None:
    chunk = size if tp == 1 else math.ceil(size / 8) * 8 // tp
    ranks = [row // chunk for row in range(size)]
    for t in range(tp):
        low, high = VocabSplit().interval(size, tp, t)
        assert list(range(low, high)) == [row for row, rank in enumerate(ranks) if rank == t]
        assert 0 <= low <= high <= size
        assert list(VocabSplit().holders(tp, t)) == [t]
    assert VocabSplit().dim == 0  # rows of (V, D)


@pytest.mark.parametrize("tp", [3, 6, 16])
def test_other_cuts_of_a_vocabulary_have_its_share_rounded_up(tp: int) -> None:
    borders = [VocabSplit().interval(259, tp, t) for t in range(tp)]
    assert borders == [
        (min(259, t * math.ceil(259 / tp)), min(259, (t + 1) * math.ceil(259 / tp))) for t in range(tp)
    ]


def test_every_tensor_has_its_place_and_the_heads_its_name() -> None:
    sizes = {"model_type": "llama", "vocab_size": 40, "hidden_size": 12, "intermediate_size": 18}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2}
    for head, tied in (("lm", False), ("lm", True), ("value", False), ("value", True)):
        spec = ModelSpec.from_hf({**sizes, "tie_word_embeddings": tied}, head)
        tensors = {t.name: t for t in spec.tensors()}
        assert spec.tied == (head == "lm" and tied)
        assert spec.head_tensor in tensors
        assert tensors[spec.head_tensor].place == ("tied" if spec.tied else "head")
        assert tensors["model.embed_tokens.weight"].place == ("tied" if spec.tied else "embed")
        for name, tensor in tensors.items():
            if name.startswith("model.layers."):
                assert tensor.place == int(name.split(".")[2])
        # Blocks of the ffn are as many as divide heads and rows alike; matrices that sum are cut by columns.
        assert spec.ffn_blocks == 6
        layer = "model.layers.1."
        for name, split in (
            ("self_attn.q_proj", Split(0, 6)),
            ("self_attn.k_proj", Split(0, 2)),
            ("self_attn.v_proj", Split(0, 2)),
            ("self_attn.o_proj", Split(1, 6)),
            ("mlp.gate_proj", Split(0, 6)),
            ("mlp.up_proj", Split(0, 6)),
            ("mlp.down_proj", Split(1, 6)),
        ):
            assert tensors[f"{layer}{name}.weight"].split == split
        assert tensors[f"{layer}input_layernorm.weight"].split is None
        assert isinstance(tensors["model.embed_tokens.weight"].split, VocabSplit)
        if head == "lm" and not tied:
            assert isinstance(tensors["lm_head.weight"].split, VocabSplit)
