"""One stage, one rank: the decoder against transformers, for every family."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from puzzle.errors import UserError
from puzzle.model.decoder import Decoder
from puzzle.model.hf import load
from puzzle.model.packing import pack
from puzzle.model.parallel import TensorGroup
from puzzle.plan.layout import Coord, Layout
from puzzle.spec.model import ModelSpec
from tests.model.tiny import (
    VARIANTS,
    gradient,
    gradient_boxes,
    save_variant,
    saved_elements,
    sequences,
    stage,
    summed,
)

TOLERANCE = 1e-5


def hf_logits(model, sequence):
    return model(sequence[None]).logits[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_equal_transformers(variant, tmp_path):
    folder = save_variant(tmp_path / "model", variant)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    decoder = stage(folder)
    batch = pack(sequences())
    logits = decoder.logits(decoder(batch.tokens_T, batch))
    expected = torch.cat([hf_logits(reference, s) for s in sequences()])
    assert (logits - expected).abs().max() <= TOLERANCE * max(1, expected.abs().max())

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weights).sum().backward()
    (logits * weights).sum().backward()
    theirs = {name: gradient(p) for name, p in reference.named_parameters()}
    ours = summed(gradient_boxes(decoder), {name: g.shape for name, g in theirs.items()})
    for name, grad in theirs.items():
        assert (ours[name] - grad).abs().max() <= TOLERANCE * grad.abs().max(), name


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_values_equal_a_sequence_classifier(family, tmp_path):
    folder = save_variant(tmp_path / "model", family, value=True)
    reference = AutoModelForSequenceClassification.from_pretrained(folder)
    decoder = stage(folder)
    batch = pack(sequences())
    values = decoder.values(decoder(batch.tokens_T, batch))
    assert values.dtype == torch.float32
    last = values[batch.last_rows]
    expected = torch.cat([reference(s[None]).logits[0] for s in sequences()])
    assert (last - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "qwen3"])
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_stages_in_a_row_equal_one(variant, pp, tmp_path):
    folder = save_variant(tmp_path / "model", variant)
    whole = stage(folder)
    parts = [stage(folder, pp=pp, coord=Coord(0, p, 0)) for p in range(pp)]
    batch = pack(sequences())
    hidden = batch.tokens_T
    for part in parts:
        hidden = part(hidden, batch)
    expected = whole(batch.tokens_T, batch)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(parts[-1].logits(hidden), whole.logits(expected), rtol=0, atol=1e-5)


def silent(rank, size):
    """A tensor rank that never communicates."""
    group = TensorGroup()
    group.rank, group.size = rank, size
    return group


@pytest.mark.parametrize("variant", ["llama", "llama-tied"])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 2), (8, 1)])
def test_logits_of_all_tensor_ranks_are_those_of_one_without_padding(variant, tp, pp, tmp_path):
    """259 rows do not divide by 2, 4 or 8: the last rank's storage ends in rows that are no tokens."""
    folder = save_variant(tmp_path / "model", variant)
    whole = stage(folder)
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    layout = Layout.even(tp, pp, 1, whole.spec.num_layers)
    parts, rows = [], 0
    for t in range(tp):
        decoder = Decoder(whole.spec, layout, Coord(t, pp - 1, 0), silent(t, tp))
        load(decoder, folder)
        rows += decoder.head_weight.shape[0]
        with torch.no_grad():  # what is no token must not show
            decoder.head_weight[max(0, 259 - t * decoder.head_weight.shape[0]) :] = 1e4
        parts.append(decoder.logits(hidden))
    assert rows > 259
    expected = (
        hidden.double() @ whole.embed.double().t() if whole.spec.tied else whole.logits(hidden).double()
    )
    assert expected.shape == (5, 259)
    torch.testing.assert_close(torch.cat(parts, 1).double(), expected, rtol=0, atol=1e-5)


def test_a_rank_beyond_the_vocabulary_has_no_logits():
    """Five rows on four ranks: two, two, one and none."""
    sizes = {"model_type": "llama", "vocab_size": 5, "hidden_size": 8, "intermediate_size": 16}
    spec = ModelSpec.from_hf(sizes | {"num_hidden_layers": 1, "num_attention_heads": 4})
    widths = []
    for t in range(4):
        decoder = Decoder(spec, Layout.even(4, 1, 1, 1), Coord(t, 0, 0), silent(t, 4))
        assert decoder.head_weight.shape[0] == 2
        widths.append(decoder.logits(torch.zeros(3, 8)).shape[1])
    assert widths == [2, 2, 1, 0]


def test_a_tied_head_is_the_embedding_itself_on_one_stage_and_a_copy_on_the_last_of_several(tmp_path):
    folder = save_variant(tmp_path / "model", "llama-tied")
    alone, untied = stage(folder), stage(save_variant(tmp_path / "untied", "llama"))
    assert alone.head_weight is alone.embed
    assert "head" not in dict(alone.named_parameters())
    assert untied.head_weight is untied.head
    first, last = (stage(folder, pp=2, coord=Coord(0, p, 0)) for p in range(2))
    assert torch.equal(last.head_weight, first.embed)
    assert last.head_weight is last.head


def test_recomputation_changes_nothing_but_memory(tmp_path):
    folder = save_variant(tmp_path / "model", "llama")
    batch = pack(sequences())
    grads, saved = [], []
    for recompute in (False, True):
        decoder = stage(folder, recompute=recompute)
        with saved_elements() as sizes:
            loss = decoder(batch.tokens_T, batch).square().sum()
        saved.append(sum(sizes))
        loss.backward()
        grads.append([p.grad for p in decoder.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert saved[1] < saved[0] / 5


def test_neighbours_in_a_pack_do_not_see_each_other(tmp_path):
    decoder = stage(save_variant(tmp_path / "model", "llama"))
    first, second = sequences()[:2]
    alone = pack([first])
    both = pack([second, first], multiple=8)
    torch.testing.assert_close(
        decoder(both.tokens_T, both)[len(second) : len(second) + len(first)],
        decoder(alone.tokens_T, alone),
        rtol=0,
        atol=1e-5,
    )


def test_parameters_are_the_local_storages(tmp_path):
    decoder = stage(save_variant(tmp_path / "model", "qwen3"), pp=2, coord=Coord(0, 1, 0))
    named = {name: tuple(p.shape) for name, p in decoder.named_parameters()}
    assert named == {storage.name: storage.shape for storage in decoder.storages}


def test_impossible_models_are_refused():
    config = {
        "architectures": ["LlamaForSequenceClassification"],
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "id2label": {"0": "a", "1": "b"},
    }
    spec = ModelSpec.from_hf(config)
    with pytest.raises(UserError, match="num_labels"):
        Decoder(spec, Layout.even(1, 1, 1, 1), Coord(0, 0, 0), TensorGroup())
    spec = ModelSpec.from_hf(config, head="lm")
    with pytest.raises(UserError, match="tp=3"):
        Decoder(spec, Layout.even(3, 1, 1, 1), Coord(0, 0, 0), TensorGroup())
