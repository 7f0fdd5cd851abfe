"""Prompts made by the tasks of the package reasoning-gym, with what their answers are judged by."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from puzzle.errors import UserError, lacking


def gym_prompts(task: str, count: int, seed: int, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """`count` rows of `prompt`, `answer` and `metadata`, as the reward `puzzle.rlhf.verifiers:reasoning_gym`
    reads them; row i depends on the task, its `options`, `seed` and i alone.

    UserError without the package, for a task or an option that it has not, and for a task whose answers are
    judged by what JSON cannot hold.
    """
    try:
        from reasoning_gym import get_score_answer_fn
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise UserError(lacking("reasoning_gym")) from None
    if task not in DATASETS:
        raise UserError(f"{task}: reasoning-gym has no such task; it has {', '.join(sorted(DATASETS))}")
    try:
        made = create_dataset(task, size=count, seed=seed, **options)
    except Exception as error:  # noqa: BLE001 - asserts and type errors of its configurations
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{task}: reasoning-gym does not take these options: {said}") from None
    score = get_score_answer_fn(task)
    for row in range(count):
        entry = made[row]
        try:
            read = json.loads(json.dumps(entry))
        except (TypeError, ValueError) as error:
            raise UserError(f"{task}: row {row} is no JSON: {error}") from None
        if score(entry["answer"], entry) != score(read["answer"], read):
            raise UserError(f"{task}: its answers are judged by what JSON cannot hold; choose another task")
        yield {"prompt": read["question"], "answer": read["answer"], "metadata": read["metadata"]}
