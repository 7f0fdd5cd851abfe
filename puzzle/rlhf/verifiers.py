"""Rewards of verifiable answers by packages of the extra `verifiers` (docs/rewards.md)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from puzzle.errors import UserError, lacking
from puzzle.files import jsonio
from puzzle.rlhf.rewards.builtin import exact_answer

SECONDS = 5
"""For reading an answer, and for comparing two."""


def math_verify(responses: Sequence[str], answer: Sequence[Any]) -> list[float]:
    """1 where the package math-verify finds a response's last formula or number equal to the column `answer`,
    else 0. An `answer` that it cannot read is compared by `exact_answer`.

    UserError without the package.
    """
    parse, verify = _math_verify()
    found = []
    for response, right in zip(responses, answer, strict=True):
        text = str(right)
        marked = text if "$" in text or "\\boxed" in text else f"${text}$"  # else half a formula may be read
        gold = parse(marked, parsing_timeout=SECONDS)
        if gold:
            said = parse(response, parsing_timeout=SECONDS)
            found.append(float(verify(gold, said, timeout_seconds=SECONDS)))
        else:
            found += exact_answer([response], [right])
    return found


@cache
def _math_verify() -> tuple[Callable[..., Any], Callable[..., bool]]:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise UserError(f"puzzle.rlhf.verifiers:math_verify: {lacking('math_verify')}") from None
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # each answer that is none would be told
    return parse, verify


def reasoning_gym(
    responses: Sequence[str], answer: Sequence[Any], metadata: Sequence[Any], prompts: Sequence[str]
) -> list[float]:
    """What the task of reasoning-gym that made a prompt (`puzzle prompts`) gives a response, from 0 to 1.

    The answer is what stands in the last <answer>...</answer>, else the whole response. UserError without the
    package; ValueError for a row whose `metadata` names no task.
    """
    rows = zip(responses, answer, metadata, prompts, strict=True)
    return [_gym_score(response, right, about, prompt) for response, right, about, prompt in rows]


def _gym_score(response: str, right: Any, about: Any, prompt: str) -> float:
    fields = jsonio.parse(about, f"metadata of {prompt[:40]!r}") if isinstance(about, str) else about
    task = fields.get("source_dataset") if isinstance(fields, Mapping) else None
    if not isinstance(task, str):
        raise ValueError(f"metadata of {prompt[:40]!r} names no task (source_dataset); see `puzzle prompts`")
    score, extract = _gym_task(task)
    found = extract(response)
    entry = {"question": prompt, "answer": right, "metadata": fields}
    return float(score(response.strip() if found is None else found, entry))


@cache
def _gym_task(name: str) -> tuple[Callable[..., float], Callable[[str], str | None]]:
    try:
        from reasoning_gym import get_score_answer_fn
        from reasoning_gym.utils import extract_answer
    except ImportError:
        raise UserError(f"puzzle.rlhf.verifiers:reasoning_gym: {lacking('reasoning_gym')}") from None
    return get_score_answer_fn(name), extract_answer
