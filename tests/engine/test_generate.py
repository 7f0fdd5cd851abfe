"""Generation against transformers: greedy tokens, keyed draws, log-probs, ends of sequences, tensor ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from puzzle.engine.generate import decode_ring as generation
from puzzle.engine.generate.decode_ring import Tally, generate
from puzzle.engine.generate.model_runner import ModelRunner
from puzzle.engine.generate.requests import Request, RequestStates
from puzzle.engine.generate.sampling import SamplingParams
from puzzle.engine.generate.scheduler import Prefill
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.model import hf
from puzzle.model.noise import gumbel, row_keys
from puzzle.model.packing import PackedBatch
from puzzle.plan.layout import Coord, Layout, Placement
from tests.helpers import run_ranks
from tests.model.tiny import VARIANTS, save_variant, stage
from tests.reference.same_tokens import TokenAgreement, same_tokens

LENGTHS = (9, 3, 17, 1, 9, 26, 4, 12)
NEW = 18


def prompts():
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(0, 259, (n,), generator=generator).tolist() for n in LENGTHS]


def requests():
    return [Request(p, prompt_id=40 + i // 2, sample=i % 2, iteration=5) for i, p in enumerate(prompts())]


class Oracle:
    """transformers, one sequence at a time and without a cache; noise added by name."""

    def __init__(self, folder, params):
        self.model, self.params = AutoModelForCausalLM.from_pretrained(folder), params
        self.rows = {}

    @torch.no_grad()
    def row(self, index):
        """Tokens, and the perturbed logits of each, of request `index`."""
        if index not in self.rows:
            request, params = requests()[index], self.params
            tokens, scores = [], []
            while len(tokens) < params.max_new_tokens:
                logits = self.model(torch.tensor([[*request.prompt, *tokens]])).logits[0, -1].double()
                if not params.greedy:
                    names = (torch.tensor([n]) for n in (request.prompt_id, request.sample, len(tokens)))
                    noise = gumbel(row_keys(params.seed, request.iteration, *names), 0, len(logits))[0]
                    logits = logits / params.temperature + noise.double()
                if len(tokens) < params.min_new_tokens:
                    logits[list(params.stop_ids)] = -torch.inf
                scores.append(logits)
                tokens.append(int(logits.argmax()))
                if tokens[-1] in params.stop_ids:
                    break
            self.rows[index] = tokens, scores
        return self.rows[index]

    def agreement(self, responses):
        expected = [self.row(i)[0] for i in range(len(responses))]
        got = [response.tokens for response in responses]
        return same_tokens(expected, got, lambda row, place: self.row(row)[1][place])


def check(agreement: TokenAgreement):
    assert not agreement.wrong
    assert agreement.near <= 1, "few rows here: at most one near tie"


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


def enough(total):
    """A stop rule: over from the token on with which the sum of all exceeds `total`."""

    def rule(prompt):
        heard = []
        return lambda token: heard.append(token) or sum(heard) > total

    return rule


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


def tp_rank(rank, folder, tp, params):
    decoder = stage(folder, tp=tp, coord=Coord(rank, 0, 0), group=dist.group.WORLD)
    return generate(decoder, requests(), params)


@pytest.mark.parametrize(
    ("variant", "tp", "greedy"),
    [
        ("llama-tied", 2, True),
        ("qwen2", 4, False),
        pytest.param("llama-thirds", 3, False, marks=pytest.mark.long),
        pytest.param("qwen3", 8, False, marks=pytest.mark.long),
        pytest.param("mistral-window", 4, True, marks=pytest.mark.long),
        pytest.param("llama", 8, True, marks=pytest.mark.long),
    ],
)
def test_tensor_ranks_agree_with_transformers(variant, tp, greedy, tmp_path):
    folder = save_variant(tmp_path / "model", variant)
    params = SamplingParams(greedy=greedy, max_new_tokens=NEW, seed=6, stop_ids=(9, 41))
    results = run_ranks(tp_rank, tp, folder, tp, params)
    assert all(result == results[0] for result in results)
    check(Oracle(folder, params).agreement(results[0]))


def grouped():
    """Three samples of four prompts, in which pages of four positions are filled, partly filled or empty."""
    generator = torch.Generator().manual_seed(9)
    texts = [torch.randint(0, 259, (n,), generator=generator).tolist() for n in (9, 1, 11, 4)]
    return [Request(text, number, sample, 5) for number, text in enumerate(texts) for sample in range(3)]


def ring_rank(rank, folder, layout, cases, few):
    world = World(rank, layout.world, torch.device("cpu"))
    placement = Placement.default(layout)
    runtime = ModelRuntime("actor", hf.read_spec(folder), placement, world)
    hf.load(runtime.decoder, folder)
    found = []
    for params, options in cases:
        told = dict(options)
        asked = (grouped() if told.pop("grouped", False) else requests())[: few or None]
        rule, passes = told.pop("rule", None), ModelRunner(runtime.decoder, page=told.pop("page", None))
        told["stop"] = None if rule is None else enough(rule)
        share = runtime.rows(len(asked))
        answers = generate(
            runtime.decoder, asked[share.start : share.stop], params, runtime.executor, passes=passes, **told
        )
        found.append((share.start, answers))
    return found


def in_layout(folder, layout, cases, few=0):
    """Responses of every case, the same on all ranks of a replica."""
    ranks = run_ranks(ring_rank, layout.world, folder, layout, cases, few)
    for case in range(len(cases)):
        replicas = {}
        for found in ranks:
            start, answers = found[case]
            assert replicas.setdefault(start, answers) == answers
        yield [answer for start in sorted(replicas) for answer in replicas[start]]


RINGS = [("llama-tied", (2, 2, 1)), ("qwen3", (1, 3, 1))]
LONG_RINGS = [
    (variant, (tp, pp, dp))
    for variant in ("llama", "mistral-window", "qwen2", "qwen3")
    for tp in (1, 2, 4, 8)
    for pp in (1, 2, 4)
    for dp in (1, 2, 4, 8)
    if tp * pp * dp <= 8
]


@pytest.mark.parametrize(
    ("variant", "shape"),
    [
        *RINGS,
        *(pytest.param(*case, marks=pytest.mark.long) for case in LONG_RINGS),
    ],
)
def test_rings_agree_with_transformers(variant, shape, tmp_path):
    """Ragged prompts, ends at different steps, micro-batches of all sizes, tokens read at once or a step
    late: the same responses."""
    folder = save_variant(tmp_path / "model", variant)
    try:
        layout = Layout.even(*shape, hf.read_spec(folder).num_layers)
        layout.check(hf.read_spec(folder))
    except UserError as error:
        pytest.skip(str(error))
    greedy = SamplingParams(greedy=True, max_new_tokens=NEW, stop_ids=(9, 41, 100))
    drawn = SamplingParams(
        temperature=0.8, max_new_tokens=NEW, seed=6, stop_ids=tuple(range(0, 259, 16)), min_new_tokens=2
    )
    cases = [
        (greedy, {}),
        (drawn, {}),
        (drawn, {"prefill": 3, "decode": 2, "lookahead": 1}),
        (drawn, {"prefill": 1, "decode": 3, "prefill_tokens": 2}),
        (drawn, {"decode": 8, "lookahead": 1}),
        (drawn, {"most": 1}),
        (drawn, {"most": 3, "lookahead": 1, "page": 4, "prefill_tokens": 5}),
        (drawn, {"most": 5, "prefill": 1, "decode": 1, "early_stop": False}),
        (drawn, {"pages": 12, "page": 4}),
    ]
    queued = [(params, {**how, "grouped": True}) for params, how in QUEUED]
    first, *others = in_layout(folder, layout, cases + queued)
    others, groups = others[: len(cases) - 1], others[len(cases) - 1 :]
    check_queued(folder, groups)
    check(Oracle(folder, greedy).agreement(first))
    oracle = Oracle(folder, drawn)
    for found in others:
        check(oracle.agreement(found))
    assert len({len(response.tokens) for response in others[0]}) > 2


ENDING = SamplingParams(
    temperature=0.8, max_new_tokens=24, min_new_tokens=3, seed=6, stop_ids=(3, 40, 77, 150, 201, 240)
)
QUEUED = [
    (ENDING, {"rule": 2000, "page": 4}),
    (ENDING, {"rule": 2000, "page": 4, "most": 1, "lookahead": 1, "prefill_tokens": 3}),
    (ENDING, {"rule": 2000, "page": 4, "most": 3, "decode": 2, "prefill": 1, "prefill_tokens": 7}),
    (ENDING, {"rule": 2000, "page": 4, "most": 3, "early_stop": False, "lookahead": 1}),
    (ENDING, {"rule": 2000, "page": 4, "pages": 9, "prefill_tokens": 4}),
    (ENDING, {"rule": 2000, "page": 4, "pages": 13, "most": 5, "lookahead": 1}),
]
"""Few rows, few pages (nine hold the longest sequence), prompts and sequences that were put back cached in
parts: stop ids, a stop rule, least lengths, groups."""


def check_queued(folder, found):
    """The tokens of every request alone, in its own cache."""
    decoder = stage(folder)
    alone = [generate(decoder, [request], ENDING, stop=enough(2000))[0] for request in grouped()]
    lengths = {len(response.tokens) for response in alone}
    assert min(lengths) >= 3
    assert len(lengths) > 3
    assert len(found) == len(QUEUED)
    for answers in found:
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in alone]
        assert [answer.finished for answer in answers] == [answer.finished for answer in alone]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (1, 1, 2)])
def test_tokens_do_not_depend_on_who_waits(shape, tmp_path):
    """Layouts without pipelines; those with them have the same cases beside transformers."""
    folder = save_variant(tmp_path / "model", "qwen2")
    queued = [(params, {**how, "grouped": True}) for params, how in QUEUED]
    check_queued(folder, list(in_layout(folder, Layout.even(*shape, 4), queued)))


@pytest.mark.parametrize("most", [2, 3, None])
def test_greedy_tokens_of_a_queue_are_those_of_transformers_generate(most, tmp_path):
    folder = save_variant(tmp_path / "model", "llama")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    params = SamplingParams(greedy=True, max_new_tokens=NEW, stop_ids=(9, 41))
    passes = ModelRunner(stage(folder), page=4)
    found = generate(passes.decoder, grouped(), params, passes=passes, most=most, pages=most and 8 * most)
    for request, response in zip(grouped(), found, strict=True):
        ids = torch.tensor([list(request.prompt)])
        how = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": [9, 41], "pad_token_id": 0}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        assert response.tokens == made[0, len(request.prompt) :].tolist()


def test_samples_of_a_prompt_are_prefilled_once(tmp_path):
    """But for their last token, which every sample reads by itself."""
    decoder = stage(save_variant(tmp_path / "model", "llama"))
    params, tally, apart = SamplingParams(max_new_tokens=3), Tally(), Tally()
    generate(decoder, grouped(), params, most=4, tally=tally)
    assert tally.prefilled == 8 + 0 + 10 + 3
    generate(decoder, requests(), params, most=4, tally=apart)
    assert apart.prefilled == sum(LENGTHS) - len(LENGTHS)
    assert (apart.put_back, tally.put_back) == (0, 0)


def test_few_pages_put_sequences_back(tmp_path):
    """What the cases of QUEUED with few pages are there for."""
    decoder = stage(save_variant(tmp_path / "model", "qwen2"))
    for how, wanted in ((QUEUED[3][1], 0), (QUEUED[4][1], 1), (QUEUED[5][1], 1)):
        told: dict[str, Any] = dict(how)
        tally = Tally()
        passes, rule = ModelRunner(decoder, page=told.pop("page")), enough(told.pop("rule"))
        generate(decoder, grouped(), ENDING, passes=passes, stop=rule, tally=tally, **told)
        assert min(tally.put_back, 1) == wanted


def test_a_replica_without_requests_stands_by(tmp_path):
    folder = save_variant(tmp_path / "model", "llama")
    params = SamplingParams(max_new_tokens=5)
    layout = Layout.even(1, 2, 2, 4)
    (found,) = in_layout(folder, layout, [(params, {})], few=1)
    assert [r.tokens for r in found] == [generate(stage(folder), requests()[:1], params)[0].tokens]


def test_impossible_requests(tmp_path):
    decoder = stage(save_variant(tmp_path / "model", "llama"))
    assert generate(decoder, [], SamplingParams()) == []
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generate(decoder, [Request([1]), Request([])], SamplingParams())
    with pytest.raises(UserError, match=r"prompt 0 has 250 tokens.*256 positions"):
        generate(decoder, [Request([1] * 250)], SamplingParams(max_new_tokens=7))
    assert len(generate(decoder, [Request([1] * 250)], SamplingParams(max_new_tokens=6))[0].tokens) == 6
