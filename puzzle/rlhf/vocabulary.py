"""Models whose embeddings are padded to different sizes agree on the tokens that all of them read."""

from __future__ import annotations

from collections.abc import Sequence

from puzzle.config.run import TrainConfig
from puzzle.data.prepare import RunData
from puzzle.data.reading import same_tokens
from puzzle.data.tokenizers import has_tokenizer, load_tokenizer
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.errors import UserError
from puzzle.rlhf.algorithms.base import INFERRED
from puzzle.rlhf.models import Models


def agree_on_vocabulary(config: TrainConfig, data: RunData, models: Models, retokenised: bool) -> None:
    """Rows from the smallest vocabulary on become padding of the actor and the reference: tokens that one of
    the models lacks are never drawn.

    `retokenised`: the reward model reads text, not the actor's ids. UserError naming a model that has another
    tokenizer, or lacks a token that the actor's tokenizer gives.
    """
    reads = {role: not (retokenised and what == "scores_B") for role, what in INFERRED.items()}
    readers = [model for role, model in models.by_role.items() if reads[role]]
    others = [m for m in readers if m.spec.vocab_size != models.actor.spec.vocab_size]
    for model in others:
        _check(config, data, models.actor, model)
    if not others:
        return
    known = min(model.spec.vocab_size for model in readers)
    for model in (models.generator.runtime, *models.all()):
        if model.spec.head == "lm":
            model.decoder.vocabulary = known


def _check(config: TrainConfig, data: RunData, actor: ModelRuntime, model: ModelRuntime) -> None:
    """UserError unless `model` reads the same tokens as the actor: all that a tokenizer or prompts give."""
    name, size = model.name, model.spec.vocab_size
    folder = getattr(config, name).model
    used = _used(data)
    if data.tokenizer is not None:
        theirs = load_tokenizer(folder) if folder is not None and has_tokenizer(folder) else None
        if theirs is not None and not same_tokens(data.tokenizer, theirs):
            raise UserError(f"{name}: the tokenizer of {folder} is not the actor's; all read the same tokens")
        # What the actor lacks too is drawn by nobody.
        ids = data.tokenizer.get_vocab().values()
        used = max(used, max(i for i in ids if i < actor.spec.vocab_size))
    if used >= size:
        raise UserError(
            f"{name}: token {used}, which the actor may read or draw, is outside its vocabulary of {size}"
        )


def _used(data: RunData) -> int:
    """The largest token of all prompts and of what ends a response."""
    sets: Sequence = [s for s in (data.train.prompts, data.held_out) if s is not None]
    return max(
        [*data.endings.stop_ids, *(max(prompt.tokens) for prompts in sets for prompt in prompts.prompts)]
    )
