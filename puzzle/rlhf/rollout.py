"""From prompts to an experience: answers, scores, log-probs and values, then advantages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from puzzle.config.algorithm import PassesConfig
from puzzle.config.evaluation import EvaluationConfig
from puzzle.config.run import AlgorithmConfig, GenerationConfig, TrainConfig
from puzzle.data.endings import Endings
from puzzle.data.prompts import Prompt
from puzzle.data.reading import Reader, without_padding
from puzzle.data.tokenizers import Tokenizer, response_text
from puzzle.engine.generate.decode_ring import Tally, generate
from puzzle.engine.generate.model_runner import ModelRunner
from puzzle.engine.generate.requests import Request
from puzzle.engine.generate.sampling import SamplingParams
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.pipeline.pipeline import PipelineInput
from puzzle.errors import UserError
from puzzle.rlhf.experience import Experience
from puzzle.rlhf.microbatches import Computation, MicroBatches
from puzzle.rlhf.rewards.batch import RewardBatch


def sampling_params(config: TrainConfig | EvaluationConfig, stop_ids: tuple[int, ...]) -> SamplingParams:
    """How the run draws responses."""
    g = config.generation
    return SamplingParams(
        greedy=g.greedy,
        temperature=g.temperature,
        top_k=g.top_k,
        top_p=g.top_p,
        min_new_tokens=g.min_new_tokens,
        max_new_tokens=g.max_new_tokens,
        stop_ids=stop_ids,
        seed=config.seed,
    )


def rollout(
    actor: ModelRuntime,
    prompts: Sequence[Prompt],
    samples: int,
    params: SamplingParams,
    iteration: int,
    generation: GenerationConfig,
    endings: Endings,
    passes: ModelRunner | None = None,
    heard: Callable[[int, Sequence[int]], None] | None = None,
) -> Experience:
    """Responses and their log-probs for every prompt, the same experience on every rank.

    `generation` says how large micro-batches are; `endings.rule` ends responses beside the stop tokens;
    `passes` are the actor's, if they go on from call to call. `heard` hears of responses of this replica as
    they end: row and tokens.
    """
    count = len(prompts) * samples
    rows = actor.rows(count)
    requests = [
        Request(prompts[row // samples].tokens, prompts[row // samples].index, row % samples, iteration)
        for row in rows
    ]
    tally = Tally()
    answers = generate(
        actor.decoder,
        requests,
        params,
        actor.executor,
        passes=passes,
        prefill=generation.prefill_microbatch,
        prefill_tokens=generation.prefill_tokens,
        decode=generation.decode_microbatch,
        most=generation.max_sequences,
        graphs=generation.graphs,
        early_stop=generation.early_stop,
        stop=endings.rule,
        heard=None if heard is None else lambda request, tokens: heard(rows[request], tokens),
        tally=tally,
    )
    width = params.max_new_tokens
    # A token t is sent as t + 1: what nobody wrote stays 0.
    tokens_RS = torch.zeros((len(rows), width), dtype=torch.int64)
    logprobs_RS = torch.zeros((len(rows), width))
    for row, answer in enumerate(answers):
        tokens_RS[row, : len(answer.tokens)] = torch.tensor(answer.tokens) + 1
        logprobs_RS[row, : len(answer.tokens)] = torch.tensor(answer.logprobs)
    tokens = actor.collect(tokens_RS, rows, (count, width)).tolist()
    experience = Experience(
        tuple(prompt.tokens for prompt in prompts),
        tuple(prompt.index for prompt in prompts),
        tuple(tuple(token - 1 for token in row if token) for row in tokens),
        samples,
    )
    longest = experience.mask_BS.shape[1]
    logprobs = actor.collect(logprobs_RS, rows, (count, width))[:, :longest]
    sampled = torch.tensor(tally.rows if actor.owns_results else 0, device=actor.world.device)
    sampled = int(actor.world.sum(sampled))
    return replace(experience, logprobs_BS=logprobs, sampled_logprobs_BS=logprobs, sampled_tokens=sampled)


def responses_of(parts: Sequence[Experience]) -> Experience:
    """Prompts and responses of several experiences, one after the other, without their tensors."""
    return Experience(
        tuple(prompt for part in parts for prompt in part.prompts),
        tuple(number for part in parts for number in part.prompt_ids),
        tuple(response for part in parts for response in part.responses),
        parts[0].samples,
    )


def texts(
    experience: Experience,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer | None,
    stops: Sequence[str] = (),
) -> tuple[list[str], list[str]]:
    """Prompt and response texts of every row, cut before stop texts; without a tokenizer, the ids."""
    asked = [prompts[row // experience.samples].text for row in range(len(experience))]
    if tokenizer is None:
        return asked, [" ".join(map(str, response)) for response in experience.responses]
    answered = [
        response_text(tokenizer, response, stops, prompt.tokens, prompt.lead)
        for row, response in enumerate(experience.responses)
        for prompt in (prompts[row // experience.samples],)
    ]
    return asked, answered


def reward_batch(
    experience: Experience,
    prompts: Sequence[Prompt],
    said: tuple[list[str], list[str]],
    endings: Endings,
    longest: int,
) -> RewardBatch:
    """The batch of an experience's rows. `said` are the texts of prompts and responses, row by row; responses
    are cut at `longest` tokens."""
    asked: list[Prompt] = [prompts[row // experience.samples] for row in range(len(experience))]
    kept: dict[str, list[Any]] = {name: [p.columns[name] for p in asked] for name in asked[0].columns}
    return RewardBatch(
        *said,
        [list(response) for response in experience.responses],
        [None if p.messages is None else [dict(turn) for turn in p.messages] for p in asked],
        [p.id for p in asked],
        [
            is_finished(p, response, endings, longest)
            for p, response in zip(asked, experience.responses, strict=True)
        ],
        kept,
    )


def is_finished(prompt: Prompt, response: Sequence[int], endings: Endings, longest: int) -> bool:
    """Whether a stop token or a stop text ended a response, and not that `longest` tokens were reached."""
    if len(response) < longest or response[-1] in endings.stop_ids:
        return True
    if endings.rule is None:
        return False
    watch = endings.rule(prompt.tokens)
    return [watch(token) for token in response][-1]


def reward_sequences(
    experience: Experience,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer | None,
    reader: Reader | None,
    stops: Sequence[str] = (),
    pad: int | None = None,
) -> list[Sequence[int]]:
    """What the reward model reads: the same ids, or what `reader` makes of them in its own tokenizer's,
    without a `pad` at their end (`without_padding`)."""
    rows = range(len(experience))
    if tokenizer is None or reader is None:
        return [without_padding(experience.sequence(row), pad) for row in rows]
    answered = texts(experience, prompts, tokenizer, stops)[1]
    found = (
        reader(prompts[row // experience.samples], experience.responses[row], answered[row]) for row in rows
    )
    return [without_padding(ids, pad) for ids in found]


def compute_tokens(
    model: ModelRuntime, experience: Experience, config: AlgorithmConfig, temperature: float | None
) -> Computation:
    """float32 (B, S): log-probs of the responses at `temperature`, or values where that is None."""
    count, device = len(experience), model.world.device
    cut = MicroBatches(model, range(count), [experience.sequence(row) for row in range(count)], config)

    def output_fn(index: int, hidden: Tensor) -> Tensor:
        states_N = cut.states_N(experience, index)
        if temperature is None:
            return model.decoder.values(hidden)[states_N]
        targets_N = experience.targets_N(cut.rows[index]).to(device)
        return model.decoder.token_stats(hidden, states_N, targets_N, temperature).logprobs

    def answer(results: list[Tensor]) -> Tensor:
        own = None
        if model.owns_results:
            parts = [experience.put_RS(x, part) for x, part in zip(results, cut.rows, strict=True)]
            own = torch.cat(parts) if parts else None
        return model.collect(own, cut.own, (count, experience.mask_BS.shape[1]))

    return Computation(PipelineInput(model, cut.batches, output_fn, max(cut.passes)), answer)


def compute_scores(
    model: ModelRuntime, sequences: Sequence[Sequence[int]], config: PassesConfig
) -> Computation:
    """float32 (B,): the reward head's output at the last token of each sequence.

    UserError for tokens or lengths that the model does not know.
    """
    count, spec = len(sequences), model.spec
    largest, longest = max(map(max, sequences)), max(map(len, sequences))
    if largest >= spec.vocab_size:
        raise UserError(f"{model.name}: token {largest} is outside its vocabulary of {spec.vocab_size}")
    if longest > spec.max_positions:
        raise UserError(
            f"{model.name}: a dialogue of {longest} tokens exceeds its {spec.max_positions} positions; "
            "lower generation.max_new_tokens or data.max_prompt_tokens"
        )
    cut = MicroBatches(model, range(count), sequences, config)

    def output_fn(index: int, hidden: Tensor) -> Tensor:
        return model.decoder.values(hidden)[cut.last_rows(index)]

    def answer(results: list[Tensor]) -> Tensor:
        own = torch.cat(results) if model.owns_results and results else None
        return model.collect(own, cut.own, (count,))

    return Computation(PipelineInput(model, cut.batches, output_fn, max(cut.passes)), answer)


def require_finite(experience: Experience, found: Mapping[str, Tensor | None]) -> None:
    """UserError with the name of the first of (B, S) or (B, 1) tensors that is not finite, and the row."""
    for what, x_BS in found.items():
        if x_BS is None:
            continue
        mask_BS = experience.mask_BS.to(x_BS.device)
        row = (mask_BS & ~x_BS.isfinite()).any(1).nonzero()
        if len(row):
            raise UserError(
                f"{what} of response {int(row[0]) + 1} of {len(experience)} is not finite; look at its"
                " weights, lower the learning rate, or resume from an earlier checkpoint"
            )


def require_summable(experience: Experience, scores_B: Tensor) -> None:
    """UserError naming the response of the first value, return or advantage that is too large to learn from.

    Losses, errors and their gradients are float32, and the largest are squares of differences of two: they
    are summed over the tokens of the experience, so of N tokens none may exceed sqrt(float32's largest / 4N).
    """
    tokens = int(experience.mask_BS.sum())
    limit = math.sqrt(torch.finfo(torch.float32).max / (4 * tokens))
    read = {
        "critic: a value": experience.values_BS,
        "a return": experience.returns_BS,
        "an advantage": experience.advantages_BS,
    }
    for what, x_BS in read.items():
        if x_BS is None:
            continue
        large_BS = experience.mask_BS.to(x_BS.device) & ~(x_BS.abs() <= limit)  # NaN is none
        rows = large_BS.any(1).nonzero()
        if len(rows):
            row = int(rows[0])
            value, score = float(x_BS[row][large_BS[row]][0]), float(scores_B[row])
            raise UserError(
                f"{what} of response {row + 1} of {len(experience)} is {value:.3g}, its score {score:.3g};"
                f" squares of more than {limit:.2g} have no float32 sum over {tokens} tokens: scale rewards,"
                " or set algorithm.reward_clip"
            )
