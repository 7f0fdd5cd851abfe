"""The decoder over 1, 2, 4 and 8 real tensor ranks, against transformers in one process."""

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from puzzle.model.packing import pack
from puzzle.plan.layout import Coord
from tests.helpers import run_ranks
from tests.model.tiny import gradient, gradient_boxes, save_variant, sequences, stage, summed

TOLERANCE = 1e-5
# 8 query heads and 2 key/value heads: tp = 4 and 8 replicate key/value heads.
CASES = [("llama-tied", 2), ("qwen2", 4), ("qwen3", 2), ("llama-thirds", 3)]
LONG = [
    ("llama", 2),
    ("llama-tied", 4),
    ("llama-biases", 4),
    ("llama", 8),
    ("qwen2-tied", 8),
    ("qwen3", 8),
    ("mistral-window", 4),
    ("llama-wide-heads", 8),
]
every_case = pytest.mark.parametrize(
    ("variant", "tp"), [*CASES, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)]
)


def next_tokens(batch):
    """Rows that predict a token of their own sequence, and that token."""
    rows = torch.cat([torch.arange(n - 1) + sum(batch.lengths[:i]) for i, n in enumerate(batch.lengths)])
    return rows, batch.tokens_T[rows + 1]


def lm_rank(rank, folder, tp, weights, ranks):
    coord = Coord(ranks.index(rank), 0, 0)
    decoder = stage(folder, tp=tp, coord=coord, group=dist.group.WORLD, ranks=ranks)
    assert decoder.group.broadcast(torch.tensor([rank])).item() == ranks[0]
    batch = pack(sequences(), multiple=tp)
    hidden = decoder(batch.tokens_T, batch)
    rows, targets = next_tokens(batch)
    stats = decoder.token_stats(hidden, rows, targets, temperature=0.7, entropy=True)
    assert stats.entropy is not None
    ((stats.logprobs + 0.1 * stats.entropy) * weights).sum().backward()
    return stats.logprobs.detach(), stats.entropy.detach(), gradient_boxes(decoder), decoder.group.moved


@every_case
def test_logprobs_entropy_and_gradients(variant, tp, tmp_path):
    same_as_transformers(variant, tuple(range(tp)), tmp_path)


@pytest.mark.parametrize("ranks", [(2, 0, 3, 1), pytest.param((1, 0), marks=pytest.mark.long)])
def test_tensor_ranks_in_another_order_than_global_ranks(ranks, tmp_path):
    same_as_transformers("llama", ranks, tmp_path)


def same_as_transformers(variant, ranks, tmp_path):
    tp = len(ranks)
    folder = save_variant(tmp_path / "model", variant)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    rows, _ = next_tokens(pack(sequences()))
    weights = torch.randn(len(rows), generator=torch.Generator().manual_seed(5))
    logprobs, entropy = [], []
    for s in sequences():
        all_p = (reference(s[None]).logits[0, :-1] / 0.7).log_softmax(-1)
        logprobs.append(all_p.gather(1, s[1:, None])[:, 0])
        entropy.append(-(all_p.exp() * all_p).sum(-1))
    expected, expected_entropy = torch.cat(logprobs), torch.cat(entropy)
    ((expected + 0.1 * expected_entropy) * weights).sum().backward()

    results = run_ranks(lm_rank, tp, folder, tp, weights, ranks)
    for got, got_entropy, _, moved in results:
        assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()
        assert (got_entropy - expected_entropy).abs().max() <= TOLERANCE * expected_entropy.abs().max()
        assert moved > 0
    theirs = {name: gradient(p) for name, p in reference.named_parameters()}
    parts = [part for result in results for part in result[2]]
    ours = summed(parts, {name: g.shape for name, g in theirs.items()})
    for name, grad in theirs.items():
        assert (ours[name] - grad).abs().max() <= TOLERANCE * grad.abs().max(), name


def value_rank(rank, folder, tp, weights):
    decoder = stage(folder, tp=tp, coord=Coord(rank, 0, 0), group=dist.group.WORLD)
    batch = pack(sequences(), multiple=tp)
    values = decoder.values(decoder(batch.tokens_T, batch))[batch.last_rows]
    (values * weights).sum().backward()
    return values.detach(), gradient_boxes(decoder)


@pytest.mark.parametrize(("variant", "tp"), [pytest.param("llama", 4, marks=pytest.mark.long), ("qwen2", 2)])
def test_values_and_gradients(variant, tp, tmp_path):
    folder = save_variant(tmp_path / "model", variant, value=True)
    reference = AutoModelForSequenceClassification.from_pretrained(folder)
    expected = torch.cat([reference(s[None]).logits[0] for s in sequences()])
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    (expected * weights).sum().backward()
    results = run_ranks(value_rank, tp, folder, tp, weights)
    theirs = {name: gradient(p) for name, p in reference.named_parameters()}
    ours = summed([p for r in results for p in r[1]], {name: g.shape for name, g in theirs.items()})
    for values, _ in results:
        assert (values - expected).abs().max() <= TOLERANCE
    for name, grad in theirs.items():
        assert (ours[name] - grad).abs().max() <= TOLERANCE * grad.abs().max(), name


def region_rank(rank, folder, tp):
    """Shapes that the norms see, and the largest tensors that autograd keeps with the hidden size last."""
    decoder = stage(folder, tp=tp, coord=Coord(rank, 0, 0), group=dist.group.WORLD if tp > 1 else None)
    batch = pack(sequences(), multiple=8)
    seen, kept = set(), []
    for layer in decoder.layers.values():
        layer.register_forward_hook(
            lambda _m, inputs, outs: seen.update({inputs[0].shape, *(x.shape for x in outs)})
        )

    def keep(tensor):
        if tensor.dim() == 2 and tensor.shape[1] == decoder.spec.hidden_size and not tensor.is_leaf:
            kept.append(tensor.shape[0])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder(batch.tokens_T, batch)
    return seen, max(kept), batch.total


@pytest.mark.parametrize("tp", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_activations_between_matrices_are_cut_along_tokens(tp, tmp_path):
    # Attention output (heads * head_dim = 80) and ffn (96) differ from the hidden size 64.
    folder = save_variant(tmp_path / "model", "llama-wide-heads")
    for seen, kept, total in run_ranks(region_rank, tp, folder, tp):
        assert seen == {(total // tp, 64)}
        assert kept == total // tp
