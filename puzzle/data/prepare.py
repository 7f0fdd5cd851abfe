"""Everything a run needs of its data, made and checked in one call before the run's log begins."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from puzzle.config import TrainConfig
from puzzle.data.prompts import PromptSet, PromptStream, load_prompts, random_prompts
from puzzle.data.tokenizers import StopRule, Tokenizer, load_tokenizer, stop_ids, stop_rule
from puzzle.errors import UserError


@dataclass(frozen=True)
class RunData:
    """`tokenizer` is None for random tokens, which have no text; `stop_ids`, `stop_rule` end responses."""

    tokenizer: Tokenizer | None
    stop_ids: tuple[int, ...]
    train: PromptStream
    held_out: PromptSet | None
    stop_rule: StopRule | None = None


def prepare(config: TrainConfig, vocab_size: int, began: datetime | None = None) -> RunData:
    """Load tokenizer and prompts of a run; `vocab_size` is the actor's; chat templates take `began`
    for now. Raises UserError."""
    data = config.data
    if data.random_tokens is not None:
        count = config.batch * config.iterations
        prompts = random_prompts(count, data.random_tokens, vocab_size, config.seed)
        return RunData(None, (), PromptStream(prompts, config.batch, config.seed, data.shuffle), None)
    assert data.prompts is not None, "validated by TrainConfig"
    name = data.tokenizer or config.actor.model
    assert name is not None, "validated by TrainConfig"
    tokenizer = load_tokenizer(name)
    train = load_prompts(Path(data.prompts), data, tokenizer, began)
    held_out = None
    if data.eval_prompts is not None:
        held_out = load_prompts(Path(data.eval_prompts), data, tokenizer, began)
    for prompts in filter(None, (train, held_out)):
        largest = max(max(prompt.tokens) for prompt in prompts.prompts)
        if largest >= vocab_size:
            limit = f"the actor's vocabulary has {vocab_size}"
            raise UserError(f"the tokenizer {name} gives token {largest}, {limit}")
    folder = None if config.actor.model is None else Path(config.actor.model)
    stream = PromptStream(train, config.batch, config.seed, data.shuffle)
    rule = stop_rule(tokenizer, config.generation.stop)
    return RunData(tokenizer, stop_ids(tokenizer, folder), stream, held_out, rule)
