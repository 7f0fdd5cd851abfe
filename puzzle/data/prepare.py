"""Everything a run needs of its data, made and checked in one call before the run's log begins."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from puzzle.config.reward import RewardConfig
from puzzle.config.run import TrainConfig
from puzzle.config.supervised import SupervisedConfig
from puzzle.data.endings import Endings, endings
from puzzle.data.examples import Example, ExampleSet, load_examples
from puzzle.data.prompts import Choose, PromptSet, PromptStream, RandomStream, load_prompts, no_columns
from puzzle.data.reading import Reader, padding_of
from puzzle.data.records import drop_is_a_remedy
from puzzle.data.stream import Stream
from puzzle.data.tokenizers import Tokenizer, load_tokenizer, special_tokens
from puzzle.errors import UserError


@dataclass(frozen=True)
class RunData:
    """`tokenizer` is None for random tokens, which have no text; `endings` say what ends responses.

    `reader` makes the reward model's ids of the actor's; None where they are the same. `reward_pad` is of
    `padding_of`.
    """

    tokenizer: Tokenizer | None
    endings: Endings
    train: PromptStream
    held_out: PromptSet | None
    reader: Reader | None = None
    reward_pad: int | None = None


def prepare(
    config: TrainConfig, vocab_size: int, began: datetime | None = None, choose: Choose = no_columns
) -> RunData:
    """Load tokenizer and prompts of a run, with the columns that `choose` takes of their files; `vocab_size`
    is the actor's; chat templates take `began` for now. Raises UserError."""
    data = config.data
    folder = None if config.actor.model is None else Path(config.actor.model)
    if data.random_tokens is not None:
        stream = RandomStream(config.batch, data.random_tokens, vocab_size, config.seed)
        return RunData(None, endings(None, folder), stream, None)
    assert data.prompts is not None, "validated by TrainConfig"
    name = data.tokenizer or config.actor.model
    assert name is not None, "validated by TrainConfig"
    tokenizer = load_tokenizer(name)
    with drop_is_a_remedy():
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
    reader = reader_of(config.reward, tokenizer, ends, began)
    return RunData(tokenizer, ends, stream, held_out, reader, reward_pad_of(config.reward, ends, reader))


def reward_pad_of(reward: RewardConfig, ends: Endings, reader: Reader | None) -> int | None:
    """`padding_of` the reward model; None without one."""
    if reward.model is None:
        return None
    return padding_of(Path(reward.model), ends.eos if reader is None else reader.ends)


def reader_of(
    reward: RewardConfig, tokenizer: Tokenizer, ends: Endings, began: datetime | None
) -> Reader | None:
    """What makes a reward model's ids of those of `tokenizer`; None where they are the same, or there is
    none."""
    if reward.model is None:
        return None
    reader = Reader(tokenizer, load_tokenizer(reward.model), ends.eos, began)
    return None if reader.same else reader


@dataclass(frozen=True)
class ExampleData:
    """What a supervised run reads; `endings` are those that its model is saved with, `remarks` what people
    should know."""

    tokenizer: Tokenizer
    endings: Endings
    train: Stream[Example]
    held_out: ExampleSet | None
    remarks: tuple[str, ...] = ()


def prepare_examples(config: SupervisedConfig, vocab_size: int, began: datetime | None = None) -> ExampleData:
    """Load tokenizer and examples of a run, whose model has `vocab_size` tokens; chat templates take `began`
    for now. Raises UserError."""
    data, name = config.data, config.tokenizer
    assert name is not None, "validated by the configuration"
    assert data.examples is not None, "validated by the configuration"
    tokenizer = load_tokenizer(name)
    with drop_is_a_remedy():
        train = load_examples(Path(data.examples), data, tokenizer, began)
        held_out = None
        if data.eval_examples is not None:
            held_out = load_examples(Path(data.eval_examples), data, tokenizer, began)
    for examples in filter(None, (train, held_out)):
        largest = max(max(s.tokens) for e in examples.examples for s in e.sequences)
        if largest >= vocab_size:
            limit = f"the model's vocabulary has {vocab_size}"
            raise UserError(f"the tokenizer {name} gives token {largest}, {limit}")
    folder = None if config.main.model is None else Path(config.main.model)
    ends = endings(tokenizer, folder, learned=_last_said(tokenizer, train))
    stream = train.stream(config.batch, config.seed, data.shuffle)
    remarks = [remark for examples in filter(None, (train, held_out)) for remark in examples.remarks]
    return ExampleData(tokenizer, ends, stream, held_out, tuple(remarks))


def _last_said(tokenizer: Tokenizer, examples: ExampleSet) -> set[int]:
    """The special tokens that end all that is learned, if there is one: a model that has learned to say it
    ends its answers with it."""
    said = {s.tokens[stop - 1] for e in examples.examples for s in e.sequences for _, stop in s.spans}
    return said if len(said) == 1 and said <= set(special_tokens(tokenizer).values()) else set()
