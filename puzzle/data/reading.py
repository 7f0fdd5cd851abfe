"""What a reward model reads: the actor's token ids where its tokenizer agrees, else the text once more."""

import json
from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path

from puzzle.data.prompts import Prompt
from puzzle.data.tokenizers import Tokenizer, bare, dialogue_ids, encode, render
from puzzle.files.jsonio import read_object

_WITHOUT_EFFECT = ("truncation", "padding", "decoder")
"""Parts of a tokenizer that change no ids: a tokenizer that has padded is saved so."""


def same_tokenizer(first: Tokenizer, second: Tokenizer) -> bool:
    """Whether both are made of the same parts, so that they give the same ids to every text.

    Chat templates are no part of it.
    """
    parts = []
    for tokenizer in (first, second):
        core = getattr(tokenizer, "backend_tokenizer", None)
        if core is None:
            return False
        found = json.loads(core.to_str())
        parts.append({name: part for name, part in found.items() if name not in _WITHOUT_EFFECT})
    return parts[0] == parts[1]


def same_tokens(first: Tokenizer, second: Tokenizer) -> bool:
    """Whether no id means one token to the one and another token to the other; either may have more."""
    ours, theirs = ({i: token for token, i in t.get_vocab().items()} for t in (first, second))
    return all(ours[i] == theirs[i] for i in ours.keys() & theirs.keys())


def padding_of(folder: Path, eos: Collection[int]) -> int | None:
    """The token that the reward model in `folder` pads with, where it is one of `eos`, which end responses;
    else None, as where there is no config.json. UserError for one that is none."""
    config = folder / "config.json"
    pad = read_object(config).get("pad_token_id") if config.is_file() else None
    return pad if isinstance(pad, int) and not isinstance(pad, bool) and pad in eos else None


def without_padding(ids: Sequence[int], pad: int | None) -> Sequence[int]:
    """What a classifier of transformers that pads with `pad` reads of a dialogue: up to its last token that
    is no padding, also where that padding ended the response, at which such a model has learned no score."""
    end = len(ids)
    while end > 1 and ids[end - 1] == pad:
        end -= 1
    return ids[:end]


class Reader:
    """Turns dialogues in the ids of `ours` into those of `theirs`, the reward model's tokenizer."""

    def __init__(
        self, ours: Tokenizer, theirs: Tokenizer, eos: Collection[int], now: datetime | None = None
    ) -> None:
        """`eos` are the ids that end a response of ours; `now` is the time for chat templates."""
        self._ours, self._theirs, self._eos, self._now = ours, theirs, frozenset(eos), now
        known = theirs.get_vocab()
        self._common = {i for token, i in ours.get_vocab().items() if known.get(token) == i}
        templates = ours.chat_template, theirs.chat_template
        self.same = same_tokenizer(ours, theirs) and (templates[1] is None or templates[0] == templates[1])
        """Whether they agree on every dialogue, so that nobody need ask."""

    def __call__(self, prompt: Prompt, response: Sequence[int], said: str) -> Sequence[int]:
        """The ids to read for a prompt and its response, whose text is `said`.

        Where both tokenizers give the same ids to this text, they are the ids that the actor read and wrote.
        """
        if self._agree(prompt, response, said):
            return [*prompt.tokens, *response]
        end = self._end(response[-1]) if response[-1] in self._eos else None
        return dialogue_ids(self._theirs, prompt.text, prompt.messages, said, end, self._now)

    @property
    def ends(self) -> frozenset[int]:
        """Their tokens that end a response of ours."""
        return frozenset(end for token in self._eos if (end := self._end(token)) is not None)

    def _agree(self, prompt: Prompt, response: Sequence[int], said: str) -> bool:
        if not self._common.issuperset([*prompt.tokens, *response]):
            return False
        if prompt.messages is None:
            text = prompt.text + said
            return encode(self._ours, text) == encode(self._theirs, text)
        opened = render(self._ours, prompt.messages, now=self._now)
        if self._theirs.chat_template and render(self._theirs, prompt.messages, now=self._now) != opened:
            return False
        return bare(self._ours, opened + said) == bare(self._theirs, opened + said)

    def _end(self, token: int) -> int | None:
        """Their token for what ended a response of ours: of the same name, else their EOS."""
        name = self._ours.convert_ids_to_tokens(token)
        return self._theirs.get_vocab().get(str(name), self._theirs.eos_token_id)
