"""Small tokenizers of the kinds that models come with."""

from collections.abc import Callable

from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from puzzle.data.tokenizers import Tokenizer

WORDS = ("my", "dog", "is", "a", "good", "boy")
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what sentencepiece writes for a space
BYTES = {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}


def wrapped(core: Core) -> Tokenizer:
    """With special tokens; BOS is put before each text, EOS behind it, as `add_eos_token` does."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", extra_special_tokens=["<|end|>"]
    )
    ends = [("<s>", tokenizer.convert_tokens_to_ids("<s>")), ("</s>", tokenizer.eos_token_id)]
    core = tokenizer.backend_tokenizer
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return tokenizer


def sentencepiece(metaspace: str | None = None) -> Tokenizer:
    """As LLaMA 2's: words begin with a space, also the first, which loses it again when it is decoded.

    `metaspace` puts the first one by a pre-tokenizer of that scheme, as newer files do.
    """
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | BYTES
    for letter in SPACE + "abcdefghijklmnopqrstuvwxyz":
        vocab[letter] = len(vocab)
    merges = []
    for word in WORDS:
        begun = SPACE
        for letter in word:
            merges.append((begun, letter))
            begun += letter
            vocab.setdefault(begun, len(vocab))
    core = Core(models.BPE(vocab=vocab, merges=list(dict.fromkeys(merges)), byte_fallback=True))
    if metaspace is None:
        core.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
    parts = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    core.decoder = decoders.Sequence(parts)
    return wrapped(core)


def unigram() -> Tokenizer:
    """A unigram model with T5's pre-tokenizer."""
    words = [(SPACE + word, -2.0) for word in WORDS]
    letters = [(letter, -5.0) for letter in SPACE + "abcdefghijklmnopqrstuvwxyz"]
    special = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    bytes_ = [(name, -9.0) for name in BYTES]
    core = Core(models.Unigram([*special, *bytes_, *words, *letters], unk_id=0, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return wrapped(core)


def bytes_with_ends() -> Tokenizer:
    """A token per byte, with BOS before and EOS behind."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Core(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return wrapped(core)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": bytes_with_ends,
    "sentencepiece": sentencepiece,
    "metaspace": lambda: sentencepiece("first"),
    "unigram": unigram,
}
