"""Tokenizers, through transformers: load, encode prompts, render chats, decode responses behind prompts."""

import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from puzzle.data.clock import at
from puzzle.errors import UserError, fetching
from puzzle.files.jsonio import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = object

BYTES = "bytes"
TEMPLATE_SECONDS = 10.0
"""So long may a chat template, which others wrote, compute for one prompt."""
TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json")

StopRule = Callable[[Sequence[int]], Callable[[int], bool]]
"""Makes a watcher for one response from the ids of its prompt: given each of its tokens in turn, it says
whether it is over."""


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a model folder, or of UTF-8 bytes for `bytes`; raises UserError if there is none."""
    if name == BYTES:
        return byte_tokenizer()
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder to take a tokenizer from{fetching(folder)}")
    if not has_tokenizer(name):
        raise UserError(f"{folder}: has no tokenizer (no tokenizer.json, tokenizer.model or vocab.json)")
    for file in TOKENIZER_JSON:
        if (folder / file).exists():
            read_object(folder / file)
    from transformers import AutoTokenizer

    with foreign(f"{folder}: its tokenizer cannot be loaded"), standard_error_kept():
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if tokenizer is None:
        raise UserError(f"{folder}: transformers knows no tokenizer for this model")
    with foreign(f"{folder}: its tokenizer cannot be used"), standard_error_kept():
        tokenizer.decode(tokenizer("a text").input_ids)
        special_tokens(tokenizer)  # an unk_token that the vocabulary lacks is looked for without end
    return tokenizer


def has_tokenizer(name: str) -> bool:
    """Whether `name` is `bytes`, or a model folder with the files of a tokenizer."""
    if name == BYTES:
        return True
    return any((Path(name) / file).exists() for file in ("tokenizer.json", "tokenizer.model", "vocab.json"))


@contextmanager
def foreign(what: str) -> Generator[None]:
    """Whatever a tokenizer or a chat template raises becomes a UserError that begins with `what`.

    Their files decide what runs; the library raises bare Exceptions, and of its Rust panics, which are none.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - what a file makes the library do has no narrower type
        raise UserError(f"{what}: {_first_line(error)}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {_first_line(error)}") from None


@contextmanager
def standard_error_kept() -> Generator[None]:
    """What is written to standard error comes after the block, and not at all where it raises: a panic of the
    library prints its place in Rust, and the error says the rest."""
    try:
        before = os.dup(2)
    except OSError:  # it is closed: there is nothing to keep
        yield
        return
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
        kept.seek(0)
        with open(2, "wb", closefd=False) as stream:
            shutil.copyfileobj(kept, stream)


def byte_tokenizer() -> Tokenizer:
    """Tokens 0-255 are bytes in the order of the byte-level alphabet, 256 ends a text, 257 pads."""
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Core(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


def bare(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of `text` alone: special tokens only where it names them."""
    with foreign("the tokenizer refuses a text"):
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of `text` that something shall follow: with the BOS that the tokenizer adds, once, without
    what it adds behind (EOS: a text that has ended is not continued)."""
    with foreign("the tokenizer refuses a text"):
        whole = list(tokenizer(text)["input_ids"])
    own = bare(tokenizer, text)
    before = next((n for n in range(len(whole)) if whole[n : n + len(own)] == own), 0)
    tokens = whole[: before + len(own)]
    bos = tokenizer.bos_token_id
    return tokens[1:] if bos is not None and tokens[:2] == [bos, bos] else tokens


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    answer: bool = True,
    now: datetime | None = None,
) -> str:
    """The chat as the tokenizer's template renders it; `answer` opens the assistant's turn.

    `now` is the time that a template may write, the clock's by default. The template writes the special
    tokens, BOS among them: `bare` gives the ids. UserError without a template, and for one that computes for
    more than TEMPLATE_SECONDS.
    """
    if not tokenizer.chat_template:
        raise UserError("data.chat_template is set, but the tokenizer has no chat template; unset it")
    with foreign("the chat template refuses a prompt"), _computing_for(TEMPLATE_SECONDS):
        turns = [dict(turn) for turn in messages]
        template = None if now is None else at(str(tokenizer.get_chat_template()), now)
        return str(
            tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=answer
            )
        )


class _TooLong(BaseException):
    """Raised in a template whose time is over; no Exception, which the library would take for its own."""


@contextmanager
def _computing_for(seconds: float) -> Generator[None]:
    """UserError if the block, the rendering of a template, computes for more than `seconds` of this process's
    time, however busy its host is. Signals interrupt the main thread alone: elsewhere there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    except _TooLong:
        raise UserError(
            f"the chat template has computed for {seconds:g} s for one prompt, perhaps in an endless loop;"
            " mend chat_template"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no character, or not yet."""


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the tokens that decoding leaves out, by what they are called."""
    found = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return found | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


class _Decoder:
    """Decodes what follows a prompt, behind that prompt: alone it may lose the space that it begins with.

    An empty prompt stands for an unknown one. `special` says whether special tokens are written too.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), special: bool = False) -> None:
        self._tokenizer, self._special = tokenizer, special
        self.prompt = list(prompt) or bare(tokenizer, "a")
        self._said = self.decode(self.prompt)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` alone."""
        skip = not self._special
        return str(
            self._tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        )

    def behind(self, ids: Sequence[int]) -> str:
        """What `ids` add to the text of the prompt."""
        return beyond(self._said, self.decode([*self.prompt, *ids]))


def beyond(known: str, text: str) -> str:
    """What `text` has after the part that it shares with `known`, whose end it may have changed."""
    if text.startswith(known):
        return text[len(known) :]
    pairs = enumerate(zip(known, text, strict=False))
    return text[next((i for i, (a, b) in pairs if a != b), len(text)) :]


def response_text(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    stops: Sequence[str] = (),
    prompt: Sequence[int] = (),
    lead: str = "",
) -> str:
    """The text of a response without special tokens; cut before a stop text that its last token completed.

    `prompt` are the ids that it answers. A `lead` (`answer_lead`) at its beginning is no part of it.
    """
    decoder = _Decoder(tokenizer, prompt)
    text = decoder.behind(ids)
    named, plain = _with_special(tokenizer, stops)
    end = _completed(decoder, ids, plain)
    if named:
        written = _Decoder(tokenizer, prompt, special=True)
        start = _completed(written, ids, named)
        if start is not None:
            whole = next(n for n in range(len(ids), -1, -1) if len(written.behind(ids[:n])) <= start)
            at = len(decoder.behind(ids[:whole])) + start - len(written.behind(ids[:whole]))
            end = at if end is None else min(at, end)
    return text[:end].removeprefix(lead)


def _with_special(tokenizer: Tokenizer, stops: Sequence[str]) -> tuple[list[str], list[str]]:
    """Stop texts with special tokens in them, and the others."""
    names = special_tokens(tokenizer) if stops else {}
    named = [stop for stop in stops if any(name in stop for name in names)]
    return named, [stop for stop in stops if stop not in named]


def _completed(decoder: _Decoder, ids: Sequence[int], stops: Sequence[str]) -> int | None:
    """Where the first stop text that the last token completes begins; None where there is none."""
    if not stops or not ids:
        return None
    text = decoder.behind(ids)
    # A stop text that lies before the last token's was passed over (min_new_tokens). The begin of a character
    # of up to four tokens may hide what came before it.
    before = max(len(decoder.behind(ids[:-n]).rstrip(UNFINISHED)) for n in range(1, min(4, len(ids)) + 1))
    found = [text.find(stop, max(0, before - len(stop) + 1)) for stop in stops]
    return min((start for start in found if start >= 0), default=None)


def answer_lead(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], now: datetime | None = None
) -> str:
    """The space that chat template and tokenizer write before an answer to `messages`, or nothing.

    What follows a prompt begins with it where an answer does not. `now` is as for `render`.
    """
    try:
        opened = bare(tokenizer, render(tokenizer, messages, now=now))
        turns = [*messages, {"role": "assistant", "content": "a"}]
        closed = bare(tokenizer, render(tokenizer, turns, answer=False, now=now))
    except UserError:
        return ""  # a template that writes no answers
    if closed[: len(opened)] != opened:
        return ""
    return " " if _Decoder(tokenizer, opened).behind(closed[len(opened) :]).startswith(" a") else ""


class TextStream:
    """Text of a response while its tokens come, a character of several tokens when it is whole."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), special: bool = False) -> None:
        """`prompt` are the ids that it answers; `special` writes special tokens too."""
        self._decoder = _Decoder(tokenizer, prompt, special)
        # Tokens before `_start` change no later text; text up to `_read` has been given out.
        self._ids = list(self._decoder.prompt)
        self._start, self._read = 0, len(self._ids)
        self._known = self._decoder.decode(self._ids)

    def add(self, token: int) -> tuple[str, str]:
        """The text that `token` makes certain, and what else there would be if no token followed."""
        self._ids.append(token)
        text = self._decoder.decode(self._ids[self._start :])
        new = beyond(self._known, text)
        if text.endswith(UNFINISHED):
            return "", new.rstrip(UNFINISHED)
        if new:
            self._start, self._read = self._read, len(self._ids)
            self._known = self._decoder.decode(self._ids[self._start :])
        return new, ""


def stop_rule(tokenizer: Tokenizer, stops: Sequence[str]) -> StopRule | None:
    """Makes watchers for single responses: given token after token, they say when one completes a stop text.

    None where there are no stop texts. Special tokens are text only for stop texts that name one.
    """
    if not stops:
        return None
    named, plain = _with_special(tokenizer, stops)

    def watcher(prompt: Sequence[int] = ()) -> Callable[[int], bool]:
        watches = [
            _watch(TextStream(tokenizer, prompt, special), texts)
            for special, texts in ((False, plain), (True, named))
            if texts
        ]

        def completes(token: int) -> bool:
            return True in [watch(token) for watch in watches]  # each hears every token

        return completes

    return watcher


def _watch(stream: TextStream, stops: Sequence[str]) -> Callable[[int], bool]:
    """Says of every token of a stream whether it completes one of `stops`."""
    reach = max(map(len, stops)) - 1
    tail, seen = "", 0

    def completes(token: int) -> bool:
        nonlocal tail, seen
        certain, uncertain = stream.add(token)
        text, before = tail + certain + uncertain, len(tail) + seen
        ends = any(text.find(stop, max(0, before - len(stop) + 1)) >= 0 for stop in stops)
        tail, seen = (tail + certain)[-reach:] if reach else "", len(uncertain)
        return ends

    return completes


def dialogue_ids(
    tokenizer: Tokenizer,
    prompt: str,
    messages: Sequence[Mapping[str, str]] | None,
    response: str,
    end: int | None = None,
    now: datetime | None = None,
) -> list[int]:
    """Ids of prompt and response for a model with another tokenizer: the text is tokenised again.

    A chat goes through that tokenizer's template when it has one; plain text is prompt + response. `end` is
    the id that says that the response has ended. None: it was cut off, and a chat's last turn stays open.
    """
    if messages is None or not tokenizer.chat_template:
        return [*encode(tokenizer, prompt + response), *([] if end is None else [end])]
    opened = render(tokenizer, messages, now=now)
    turns = [*messages, {"role": "assistant", "content": response}]
    text = render(tokenizer, turns, answer=False, now=now)
    said = response.strip()
    at = text.rfind(said) + len(said) if said and said in text else None
    if end is None:
        return bare(tokenizer, opened + response if at is None else text[:at])
    rest = bare(tokenizer, beyond(opened, text) if at is None else text[at:])
    closed = not set(rest).isdisjoint(special_tokens(tokenizer).values())
    return [*bare(tokenizer, text), *([] if closed else [end])]


def _first_line(error: BaseException) -> str:
    """With the second one, the reason, where the first ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
