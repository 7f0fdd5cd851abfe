"""Everything a run needs of its data, made and checked in one call before the run's log begins."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from puzzle.config.run import TrainConfig
from puzzle.data.endings import Endings, endings
from puzzle.data.prompts import Choose, PromptSet, PromptStream, load_prompts, no_columns, random_prompts
from puzzle.data.reading import Reader
from puzzle.data.tokenizers import Tokenizer, load_tokenizer
from puzzle.errors import UserError


@dataclass(frozen=True)
class RunData:
    """`tokenizer` is None for random tokens, which have no text; `endings` say what ends responses.

    `reader` makes the reward model's ids of the actor's; None where they are the same.
    """

    tokenizer: Tokenizer | None
    endings: Endings
    train: PromptStream
    held_out: PromptSet | None
    reader: Reader | None = None


def prepare(
    config: TrainConfig, vocab_size: int, began: datetime | None = None, choose: Choose = no_columns
) -> RunData:
    """Load tokenizer and prompts of a run, with the columns that `choose` takes of their files; `vocab_size`
    is the actor's; chat templates take `began` for now. Raises UserError."""
    data = config.data
    folder = None if config.actor.model is None else Path(config.actor.model)
    if data.random_tokens is not None:
        count = config.batch * config.iterations
        prompts = random_prompts(count, data.random_tokens, vocab_size, config.seed)
        stream = PromptStream(prompts, config.batch, config.seed, data.shuffle)
        return RunData(None, endings(None, folder), stream, None)
    assert data.prompts is not None, "validated by TrainConfig"
    name = data.tokenizer or config.actor.model
    assert name is not None, "validated by TrainConfig"
    tokenizer = load_tokenizer(name)
    train = load_prompts(Path(data.prompts), data, tokenizer, began, choose)
    held_out = None
    if data.eval_prompts is not None:
        held_out = load_prompts(Path(data.eval_prompts), data, tokenizer, began, choose)
    for prompts in filter(None, (train, held_out)):
        largest = max(max(prompt.tokens) for prompt in prompts.prompts)
        if largest >= vocab_size:
            limit = f"the actor's vocabulary has {vocab_size}"
            raise UserError(f"the tokenizer {name} gives token {largest}, {limit}")
    stream = PromptStream(train, config.batch, config.seed, data.shuffle)
    ends = endings(tokenizer, folder, config.generation.stop)
    if config.reward.model is None:
        return RunData(tokenizer, ends, stream, held_out)
    reader = Reader(tokenizer, load_tokenizer(config.reward.model), ends.eos, began)
    return RunData(tokenizer, ends, stream, held_out, None if reader.same else reader)
