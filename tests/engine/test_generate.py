"""Generation of one process against transformers: greedy tokens, keyed draws, log-probs, ends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from puzzle.engine.generate import decode_ring as generation
from puzzle.engine.generate.decode_ring import Tally, generate
from puzzle.engine.generate.requests import Request, RequestStates
from puzzle.engine.generate.sampling import SamplingParams
from puzzle.engine.generate.scheduler import Prefill
from puzzle.model.packing import PackedBatch
from tests.engine.oracle import NEW, Oracle, check, enough, prompts, requests
from tests.model.tiny import VARIANTS, save_variant, stage


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("greedy", [True, False])
def test_tokens_equal_transformers(variant, greedy, tmp_path):
    folder = save_variant(tmp_path / "model", variant)
    params = SamplingParams(greedy=greedy, temperature=0.8, max_new_tokens=NEW, seed=2, stop_ids=(7, 100, 31))
    responses = generate(stage(folder), requests(), params)
    check(Oracle(folder, params).agreement(responses))


@torch.no_grad()
def teacher_forced(folder, responses, temperature):
    """transformers' log-probs of the responses' tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for prompt, response in zip(prompts(), responses, strict=True):
        logits = model(torch.tensor([[*prompt, *response.tokens]])).logits[0, len(prompt) - 1 : -1]
        tokens = torch.tensor(response.tokens)[:, None]
        yield (logits / temperature).log_softmax(-1).gather(1, tokens)[:, 0]


@pytest.mark.parametrize("filters", [{}, {"top_k": 20, "top_p": 0.9}])
def test_logprobs_equal_a_full_forward_before_filtering(filters, tmp_path):
    folder = save_variant(tmp_path / "model", "llama")
    params = SamplingParams(temperature=0.7, max_new_tokens=NEW, **filters)
    responses = generate(stage(folder), requests(), params)
    for response, expected in zip(responses, teacher_forced(folder, responses, 0.7), strict=True):
        assert (torch.tensor(response.logprobs) - expected).abs().max() <= 1e-5


def test_ends(tmp_path):
    folder = save_variant(tmp_path / "model", "llama")
    decoder = stage(folder)
    long = generate(decoder, requests(), SamplingParams(greedy=True, max_new_tokens=NEW))
    assert all(len(response.tokens) == NEW and not response.finished for response in long)
    # The third token of one row, and whatever that ends elsewhere.
    stop = long[2].tokens[2]
    params = SamplingParams(greedy=True, max_new_tokens=NEW, stop_ids=(stop,))
    few, all_rows = Tally(), Tally()
    ended = generate(decoder, requests(), params, tally=few)
    to_the_end = generate(decoder, requests(), params, tally=all_rows, early_stop=False)
    assert [r.tokens for r in to_the_end] == [r.tokens for r in ended]
    assert few.rows < all_rows.rows == NEW * len(ended)
    assert few.tokens == all_rows.tokens
    for a, b in zip(ended, long, strict=True):
        wanted = b.tokens[: b.tokens.index(stop) + 1] if stop in b.tokens else b.tokens
        assert a.tokens == wanted
        assert a.logprobs == pytest.approx(b.logprobs[: len(wanted)], abs=1e-4)
        assert a.finished == (stop in b.tokens)
    assert len(ended[2].tokens) <= 3
    fixed = SamplingParams(greedy=True, max_new_tokens=5, min_new_tokens=5, stop_ids=(stop,))
    assert all(len(r.tokens) == 5 and stop not in r.tokens for r in generate(decoder, requests(), fixed))
    everything = SamplingParams(max_new_tokens=NEW, stop_ids=tuple(range(259)))
    assert all(len(r.tokens) == 1 and r.finished for r in generate(decoder, requests(), everything))


def test_min_new_tokens_equals_transformers(tmp_path):
    folder = save_variant(tmp_path / "model", "qwen3")
    params = SamplingParams(seed=1, max_new_tokens=12, min_new_tokens=6, stop_ids=tuple(range(0, 259, 9)))
    responses = generate(stage(folder), requests(), params)
    check(Oracle(folder, params).agreement(responses))
    assert {len(response.tokens) for response in responses} - {12}


@pytest.mark.parametrize("least", [0, 1, 5, NEW])
def test_a_stop_rule_hears_every_token_and_ends_nothing_before_its_least_length(least, tmp_path):
    decoder = stage(save_variant(tmp_path / "model", "llama"))
    params = SamplingParams(max_new_tokens=NEW, min_new_tokens=least, seed=7)
    whole = generate(decoder, requests(), params)
    ended = generate(decoder, requests(), params, stop=enough(300))
    lengths = []
    for long, found in zip(whole, ended, strict=True):
        assert len(long.tokens) == NEW
        sums = [sum(long.tokens[: n + 1]) for n in range(NEW)]
        over = [n + 1 for n in range(NEW) if sums[n] > 300 and n + 1 >= least]
        length = over[0] if over else NEW
        assert found.tokens == long.tokens[:length]
        assert found.finished == bool(over)
        lengths.append(length)
    assert min(lengths) >= least
    assert least in (0, 1, NEW) or min(lengths) == least, "some rule was over before"


def test_books_end_by_stop_ids_rules_and_lengths():
    """Against a plain loop, over tokens that come in any order, those behind an end included."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 30, (9, 12), generator=generator).tolist()
    for least, most, ids in ((0, 12, (4, 9)), (3, 8, ()), (5, 5, (4,)), (2, 12, (1, 2, 3))):
        params = SamplingParams(min_new_tokens=least, max_new_tokens=most, stop_ids=ids)
        seen = []
        asked = [Request([1], i) for i in range(9)]
        books = RequestStates(asked, params, enough(60), lambda i, token, seen=seen: seen.append((i, token)))
        for step in range(12):
            books.write(range(9), [row[step] for row in drawn], [-float(row[step]) for row in drawn])
        truth = []
        for row in drawn:
            tokens, finished = [], False
            while not finished and len(tokens) < most:
                tokens.append(row[len(tokens)])
                finished = tokens[-1] in ids or (sum(tokens) > 60 and len(tokens) >= least)
            truth.append((tokens, finished))
        assert [(r.tokens, r.finished) for r in books.responses()] == truth
        assert [r.logprobs for r in books.responses()] == [[-float(t) for t in tokens] for tokens, _ in truth]
        assert sorted(seen) == sorted((i, t) for i, (tokens, _) in enumerate(truth) for t in tokens)
        assert all(books.ended)


@pytest.mark.parametrize(
    ("ids", "rule", "least", "expected"),
    [((), None, 0, False), ((3,), None, 0, True), ((), enough(9), 0, True), ((3,), enough(9), 8, False)],
)
def test_whether_a_response_may_be_shorter(ids, rule, least, expected):
    params = SamplingParams(stop_ids=ids, min_new_tokens=least, max_new_tokens=8)
    assert RequestStates([Request([1])], params, rule).may_end == expected


def test_draws_do_not_depend_on_the_batch(tmp_path, monkeypatch):
    decoder = stage(save_variant(tmp_path / "model", "llama"))
    params = SamplingParams(max_new_tokens=NEW, seed=4, stop_ids=(3, 50, 90))
    together = generate(decoder, requests(), params)
    alone = [generate(decoder, [request], params)[0] for request in requests()]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    for tokens in (1, 3, 20):  # prompts are cached in parts
        pieces = generate(decoder, requests(), params, prefill_tokens=tokens)
        assert [r.tokens for r in together] == [r.tokens for r in pieces]
    for prefill, decode in ((1, None), (2, 3), (5, 1)):
        parts = generate(decoder, requests(), params, prefill=prefill, decode=decode)
        assert [r.tokens for r in together] == [r.tokens for r in parts]
    other = generate(decoder, requests(), SamplingParams(max_new_tokens=NEW, seed=5))
    assert [r.tokens for r in together] != [r.tokens for r in other]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=12), st.integers(1, 5), st.integers(1, 12))
def test_prefill_passes_hold_every_token_once_in_order(counts, most, limit):
    """Of sequences and tokens a pass has no more than it may; only its first part goes on behind others; what
    fits into a pass is not cut."""
    whole = [Prefill(list(range(n)), (number,)) for number, n in enumerate(counts)]
    passes = generation.cut(whole, most, limit)
    read = {number: [] for number in range(len(counts))}
    for parts in passes:
        assert 0 < len(parts) <= most
        assert 0 < sum(len(part.tokens) for part in parts) <= limit
        assert not any(part.past for part in parts[1:])
        for part in parts:
            (number,) = part.pages
            assert part.past == len(read[number])
            read[number] += part.tokens
    assert read == {number: list(range(n)) for number, n in enumerate(counts)}
    pieces = [number for parts in passes for part in parts for number in part.pages]
    assert [pieces.count(number) for number in range(len(counts))] == [-(-n // limit) for n in counts]
    assert pieces == sorted(pieces)


def test_a_long_prompt_is_cached_in_passes_of_so_many_tokens(tmp_path):
    """As logged: what the ring has before its first round."""
    decoder = stage(save_variant(tmp_path / "model", "llama"))
    tally, params = Tally(), SamplingParams(max_new_tokens=4, seed=3)
    prompt = torch.randint(0, 259, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    asked = [Request(prompt, 1), Request(prompt[:9], 2)]
    truth = generate(decoder, asked, params, tally=tally)
    seen = []
    forward = decoder.forward

    def watched(x, batch, cache=None):
        if isinstance(batch, PackedBatch):
            seen.append((batch.lengths, batch.past))
        return forward(x, batch, cache)

    decoder.forward = watched
    parts = generate(decoder, asked, params, prefill_tokens=64)
    assert seen == [((64,), 0), ((64,), 64), ((64,), 128), ((7, 8), 192)]
    for ours, whole in zip(parts, truth, strict=True):
        assert ours.tokens == whole.tokens
        assert ours.logprobs == pytest.approx(whole.logprobs, abs=1e-5)
