"""Generation by several ranks, and by queues in few rows and pages, against transformers."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from puzzle.engine.generate.decode_ring import Tally, generate
from puzzle.engine.generate.model_runner import ModelRunner
from puzzle.engine.generate.requests import Request
from puzzle.engine.generate.sampling import SamplingParams
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.model import hf
from puzzle.plan.layout import Coord, Layout, Placement
from tests.engine.oracle import LENGTHS, NEW, Oracle, check, enough, requests
from tests.helpers import run_ranks
from tests.model.tiny import save_variant, stage


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
