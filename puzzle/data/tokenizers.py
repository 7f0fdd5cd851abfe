"""Tokenizers, through transformers: load, encode without a second BOS, render chats, tokenise again."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from puzzle.data.clock import at
from puzzle.errors import UserError
from puzzle.jsonio import Fields, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = object

BYTES = "bytes"
TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json")

StopRule = Callable[[], Callable[[int], bool]]
"""Makes a watcher for one response: given each of its tokens in turn, it says whether it is over."""


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a model folder, or of UTF-8 bytes for `bytes`; raises UserError if there is none."""
    if name == BYTES:
        return byte_tokenizer()
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder to take a tokenizer from")
    if not has_tokenizer(folder):
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
        tokenizer.decode(tokenizer("a text").input_ids, skip_special_tokens=True)
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder has the files of a tokenizer."""
    return any((folder / file).exists() for file in ("tokenizer.json", "tokenizer.model", "vocab.json"))


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


@contextmanager
def tokenizer_folder(name: str | None) -> Generator[Path | None]:
    """A folder with the files of tokenizer `name` while the context lasts; None where there is none."""
    if name != BYTES:
        yield None if name is None else Path(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        byte_tokenizer().save_pretrained(folder)
        yield Path(folder)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of `text`, with the BOS that the tokenizer adds, once."""
    with foreign("the tokenizer refuses a text"):
        tokens = list(tokenizer(text)["input_ids"])
    bos = tokenizer.bos_token_id
    return tokens[1:] if bos is not None and tokens[:2] == [bos, bos] else tokens


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    answer: bool = True,
    now: datetime | None = None,
) -> tuple[str, list[int]]:
    """The chat as the tokenizer's template renders it, and its ids; `answer` opens the assistant's turn.

    `now` is the time that a template may write, the clock's by default. The template writes the special
    tokens, BOS among them; none are added. Raises UserError without one.
    """
    if not tokenizer.chat_template:
        raise UserError("data.chat_template is set, but the tokenizer has no chat template; unset it")
    with foreign("the chat template refuses a prompt"):
        turns = [dict(turn) for turn in messages]
        template = None if now is None else at(str(tokenizer.get_chat_template()), now)
        text = str(
            tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=answer
            )
        )
    with foreign("the tokenizer refuses what the chat template makes"):
        return text, list(tokenizer(text, add_special_tokens=False)["input_ids"])


def stop_ids(tokenizer: Tokenizer, folder: Path | None) -> tuple[int, ...]:
    """Ids that end a response, sorted: the tokenizer's EOS and those of generation_config.json."""
    ids = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    file = folder / "generation_config.json" if folder is not None else None
    if file is not None and file.exists():
        ids.update(Fields(read_object(file), str(file)).ids("eos_token_id"))
    return tuple(sorted(ids))


UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no character, or not yet."""


def response_text(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str] = ()) -> str:
    """The text of a response without special tokens; cut before a stop text that its last token completed."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    if not stops or not ids:
        return text
    before = len(str(tokenizer.decode(list(ids[:-1]), skip_special_tokens=True)).rstrip(UNFINISHED))
    # A stop text that lies before the last token's was passed over (min_new_tokens).
    found = [text.find(stop, max(0, before - len(stop) + 1)) for stop in stops]
    return text[: min((start for start in found if start >= 0), default=len(text))]


class TextStream:
    """Text of a response while its tokens come, a character of several tokens when it is whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Tokens before `_start` change no later text; text up to `_read` has been given out.
        self._ids: list[int] = []
        self._start = self._read = 0
        self._known = ""

    def add(self, token: int) -> tuple[str, str]:
        """The text that `token` makes certain, and what else there would be if no token followed."""
        self._ids.append(token)
        text = self._decoded(self._start)
        new = text[len(self._known) :]
        if text.endswith(UNFINISHED):
            return "", new.rstrip(UNFINISHED)
        if new:
            self._start, self._read = self._read, len(self._ids)
            self._known = self._decoded(self._start)
        return new, ""

    def _decoded(self, start: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:], skip_special_tokens=True))


def stop_rule(tokenizer: Tokenizer, stops: Sequence[str]) -> StopRule | None:
    """Makes watchers for single responses: given token after token, they say when one completes a stop text.

    None where there are no stop texts.
    """
    if not stops:
        return None
    reach = max(map(len, stops)) - 1

    def watcher() -> Callable[[int], bool]:
        stream, tail, seen = TextStream(tokenizer), "", 0

        def completes(token: int) -> bool:
            nonlocal tail, seen
            certain, uncertain = stream.add(token)
            text, before = tail + certain + uncertain, len(tail) + seen
            ends = any(text.find(stop, max(0, before - len(stop) + 1)) >= 0 for stop in stops)
            tail, seen = (tail + certain)[-reach:] if reach else "", len(uncertain)
            return ends

        return completes

    return watcher


def same_tokenizer(first: Tokenizer, second: Tokenizer) -> bool:
    """Whether both give the same ids to the same text: then ids need not be made again."""
    if first.get_vocab() != second.get_vocab():
        return False
    one, other = (getattr(tokenizer, "backend_tokenizer", None) for tokenizer in (first, second))
    return one is not None and other is not None and one.to_str() == other.to_str()


def dialogue_ids(
    tokenizer: Tokenizer, prompt: str, messages: Sequence[Mapping[str, str]] | None, response: str
) -> list[int]:
    """Ids of prompt and response for a model with another tokenizer: the text is tokenised again.

    A chat goes through that tokenizer's template when it has one; plain text is prompt + response.
    """
    if messages is not None and tokenizer.chat_template:
        turns = [*messages, {"role": "assistant", "content": response}]
        return render(tokenizer, turns, answer=False)[1]
    return encode(tokenizer, prompt + response)


def _first_line(error: BaseException) -> str:
    """With the second one, the reason, where the first ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
