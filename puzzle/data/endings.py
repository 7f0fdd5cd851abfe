"""What ends a response: decided here for generation, PPO, evaluation and the models that a run writes."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puzzle.data.tokenizers import StopRule, Tokenizer, special_tokens, stop_rule
from puzzle.files.jsonio import Fields, read_object

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""The keys of config.json that name special tokens."""


@dataclass(frozen=True)
class Endings:
    """A response ends with one of `stop_ids` (`eos`, and stop texts that are one special token), or where
    `rule` says so (the other stop texts); neither before the least number of new tokens.

    `config` and `generation` are what config.json and generation_config.json (None: there is none) of a model
    say, so that transformers' `generate` ends its responses with `eos` too.
    """

    eos: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    rule: StopRule | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] | None = None


def endings(
    tokenizer: Tokenizer | None,
    folder: Path | None,
    stops: Sequence[str] = (),
    learned: Collection[int] = (),
) -> Endings:
    """What ends the responses of the model in `folder` (None: a model without one) under stop texts `stops`,
    when it has `learned` to end them with further tokens. Without a tokenizer nothing does.

    EOS is what transformers' `generate` takes: that of generation_config.json, without that file that of
    config.json. Where neither names one it is the tokenizer's. Raises UserError naming file and key.
    """
    config = None if folder is None else _object(folder / "config.json")
    generation = None if folder is None else _object(folder / "generation_config.json")
    given = config if generation is None else generation
    eos = () if given is None else tuple(sorted(set(given.ids("eos_token_id"))))
    kept = {key: config.values[key] for key in TOKEN_IDS if key in config} if config is not None else {}
    written = None if generation is None else generation.values
    if tokenizer is None:
        return Endings(config=kept, generation=written)
    if config is None:
        kept = {key: getattr(tokenizer, key) for key in TOKEN_IDS}
    if not eos:
        own = tokenizer.eos_token_id
        eos = () if own is None else (int(own),)
        kept["eos_token_id"] = own
        written = None if written is None else {**written, "eos_token_id": own}
    if not {*learned} <= {*eos}:
        eos = tuple(sorted({*eos, *learned}))
        kept["eos_token_id"] = list(eos)
        written = None if written is None else {**written, "eos_token_id": list(eos)}
    names = special_tokens(tokenizer)
    ids = {*eos, *(names[stop] for stop in stops if stop in names)}
    rule = stop_rule(tokenizer, [stop for stop in stops if stop not in names])
    return Endings(eos, tuple(sorted(ids)), rule, kept, written)


def _object(file: Path) -> Fields | None:
    """The JSON object in `file`, None where there is no file."""
    return Fields(read_object(file), str(file)) if file.exists() else None
