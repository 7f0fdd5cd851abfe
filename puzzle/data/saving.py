"""The tokenizer that is saved with a model."""

import tempfile
from collections.abc import Collection, Generator
from contextlib import contextmanager
from pathlib import Path

from puzzle.data.tokenizers import BYTES, Tokenizer, load_tokenizer, special_tokens


def padding(tokenizer: Tokenizer, ends: Collection[int]) -> int | None:
    """A token that pads sequences which may end with any of `ends`, and is none of them: the tokenizer's own
    if it can be, else another special token; None without one.

    Classifiers of transformers read a sequence at its last token that is no padding.
    """
    own = tokenizer.pad_token_id
    others = sorted(special_tokens(tokenizer).values())
    return next((i for i in (own, *others) if i is not None and i not in ends), None)


@contextmanager
def tokenizer_folder(
    name: str | None, scratch: Path | None = None, pad: int | None = None
) -> Generator[Path | None]:
    """A folder with the files of tokenizer `name` while the context lasts, with token `pad` as padding if one
    is given; None where there is none.

    It may be made for this, in `scratch`, where whoever goes on after a kill finds it (`durable.settle`).
    """
    made = None
    if name is not None and (name == BYTES or pad is not None):
        made = load_tokenizer(name)
    if made is None or (name != BYTES and pad == made.pad_token_id):
        yield None if name is None else Path(name)
        return
    if pad is not None:
        made.pad_token = made.convert_ids_to_tokens(pad)
    with tempfile.TemporaryDirectory(prefix=".tokenizer-", suffix=".partial", dir=scratch) as folder:
        made.save_pretrained(folder)
        yield Path(folder)
