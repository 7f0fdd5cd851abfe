"""Row maps of a rollout batch against plain loops."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puzzle.engine.pipeline.model import share
from puzzle.model.packing import pack
from puzzle.rlhf.experience import Experience, joined, minibatches
from puzzle.rlhf.microbatches import microbatches

TOKENS = st.lists(st.integers(0, 99), min_size=1, max_size=6).map(tuple)


@st.composite
def experiences(draw):
    samples = draw(st.integers(1, 3))
    prompts = draw(st.lists(TOKENS, min_size=1, max_size=4).map(tuple))
    count = len(prompts) * samples
    responses = tuple(draw(st.lists(TOKENS, min_size=count, max_size=count)))
    return Experience(prompts, tuple(range(100, 100 + len(prompts))), responses, samples)


@st.composite
def experiences_and_rows(draw):
    experience = draw(experiences())
    rows = draw(st.lists(st.sampled_from(range(len(experience))), max_size=6))
    return experience, rows


@given(experiences_and_rows(), st.integers(1, 4))
def test_packed_places(case, multiple):
    experience, rows = case
    targets, states = experience.targets_N(rows), experience.states_N(rows)
    assert len(targets) == len(states) == experience.tokens(rows)
    assert targets.dtype == states.dtype == torch.int64
    if not rows:
        return
    batch = pack([experience.sequence(row) for row in rows], multiple)
    assert batch.lengths == tuple(experience.lengths(rows))
    # The token after a state is the target; the first state is the last token of its row's prompt.
    assert torch.equal(batch.tokens_T[states + 1], targets)
    expected = [
        len(experience.prompt(row)) - 1 + k for row in rows for k in range(len(experience.responses[row]))
    ]
    assert batch.positions_T[states].tolist() == expected


@given(experiences_and_rows())
def test_take_and_put(case):
    experience, rows = case
    x_BS = torch.randn(experience.mask_BS.shape)
    taken = experience.take_N(x_BS, rows)
    plain = [float(x_BS[row, k]) for row in rows for k in range(len(experience.responses[row]))]
    assert taken.tolist() == plain
    put = experience.put_RS(taken, rows)
    index = torch.tensor(rows, dtype=torch.int64)
    assert torch.equal(put, torch.where(experience.mask_BS, x_BS, 0.0)[index])


@given(experiences())
def test_rows_of_prompts(experience):
    for row, response in enumerate(experience.responses):
        assert experience.sequence(row) == experience.prompts[row // experience.samples] + response
    assert experience.mask_BS.sum(1).tolist() == [len(response) for response in experience.responses]


@given(st.data(), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 3))
def test_joined_groups_keep_what_is_known_of_them(data, sizes, samples):
    """Of parts whose log-probs are those of generation, and of others; what a part lacks, all lack."""
    known = [data.draw(st.sampled_from(["same", "apart", "none"])) for _ in sizes]
    parts, numbers = [], itertools.count(1)
    for size, what in zip(sizes, known, strict=True):
        lengths = data.draw(st.lists(st.integers(1, 5), min_size=size * samples, max_size=size * samples))
        responses = tuple((next(numbers),) * n for n in lengths)
        rows_BS = torch.tensor([float(r[0]) for r in responses])[:, None].expand(-1, max(lengths))
        parts.append(
            Experience(
                tuple((next(numbers),) for _ in range(size)),
                tuple(next(numbers) for _ in range(size)),
                responses,
                samples,
                scores_B=-rows_BS[:, 0],
                score_parts={"own": rows_BS[:, 0] / 2},
                logprobs_BS=rows_BS,
                sampled_logprobs_BS={"same": rows_BS, "apart": rows_BS + 0.5, "none": None}[what],
                sampled_tokens=sum(lengths),
            )
        )
    every = [(part, group) for part, size in enumerate(sizes) for group in range(size)]
    groups = data.draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
    found = joined(parts, groups)
    assert found.prompt_ids == tuple(parts[part].prompt_ids[group] for part, group in groups)
    assert found.prompts == tuple(parts[part].prompts[group] for part, group in groups)
    own = [parts[p].responses[g * samples + s] for p, g in groups for s in range(samples)]
    apart = [0.5 * (known[p] == "apart") for p, g in groups for s in range(samples)]
    assert found.responses == tuple(own)
    assert (found.samples, found.sampled_tokens) == (samples, sum(p.sampled_tokens for p in parts))
    assert found.scores_B is not None
    assert found.score_parts is not None
    assert found.logprobs_BS is not None
    assert found.scores_B.tolist() == [-r[0] for r in own]
    assert found.score_parts["own"].tolist() == [r[0] / 2 for r in own]
    for row, response in enumerate(own):
        assert set(found.logprobs_BS[row, : len(response)].tolist()) == {float(response[0])}
    assert found.logprobs_BS.shape == found.mask_BS.shape
    assert (found.sampled_logprobs_BS is None) == ("none" in known)
    if found.sampled_logprobs_BS is None:
        return
    for row, response in enumerate(own):
        assert set(found.sampled_logprobs_BS[row, : len(response)].tolist()) == {response[0] + apart[row]}
    assert (found.sampled_logprobs_BS is found.logprobs_BS) == (set(known) == {"same"})


def test_replacing_keeps_rows():
    experience = Experience(((1, 2), (3,)), (0, 1), ((4,), (5, 6)))
    scored = dataclasses.replace(experience, scores_B=torch.ones(2))
    assert scored.scores_B is not None
    assert scored.responses == experience.responses


@pytest.mark.parametrize(
    "bad",
    [
        (((1,),), (0,), ((2,), (3,)), 1),
        (((1,),), (0, 1), ((2,),), 1),
        (((1,),), (0,), ((),), 1),
        (((),), (0,), ((2,),), 1),
    ],
)
def test_refused(bad):
    with pytest.raises(ValueError):
        Experience(*bad)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 3), st.integers(0, 9), st.integers(0, 3))
def test_minibatches(count, size, seed, iteration, epoch):
    cut = minibatches(count, size, seed, iteration, epoch)
    assert sorted(row for rows in cut for row in rows) == list(range(count))
    assert all(len(rows) == size for rows in cut[:-1])
    assert cut == minibatches(count, size, seed, iteration, epoch)


def test_minibatch_orders_differ_and_are_fair():
    orders = {
        tuple(minibatches(24, 24, seed, iteration, epoch)[0])
        for seed in range(2)
        for iteration in range(3)
        for epoch in range(2)
    }
    assert len(orders) == 12
    firsts = [minibatches(8, 1, 0, iteration, 0)[0][0] for iteration in range(800)]
    assert min(firsts.count(row) for row in range(8)) > 60  # 100 expected, deviation 9.4


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=20),
    st.none() | st.integers(1, 5),
    st.none() | st.integers(1, 60),
    st.integers(1, 4),
)
def test_microbatches_of_each_replica(lengths, size, tokens, dp):
    """Whatever dp is, the replicas' micro-batches hold every row once and keep to the limits."""
    everything = []
    for d in range(dp):
        rows = [1000 + row for row in share(len(lengths), dp, d)]
        cut = microbatches(rows, [lengths[row - 1000] for row in rows], size, tokens)
        assert [row for part in cut for row in part] == rows
        for part in cut:
            assert size is None or len(part) <= size
            assert tokens is None or len(part) == 1 or sum(lengths[row - 1000] for row in part) <= tokens
        for left, right in itertools.pairwise(cut):  # no cut without need
            fits = size is None or len(left) < size
            fits &= tokens is None or sum(lengths[r - 1000] for r in [*left, right[0]]) <= tokens
            assert not fits
        everything += rows
    assert everything == [1000 + row for row in range(len(lengths))]
