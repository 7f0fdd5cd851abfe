"""Chat templates of five families, each also as plain Python, and a small BPE tokenizer to use them with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

Turns = Sequence[tuple[str, str]]
Pieces = list[tuple[str, bool]]
"""Texts, and whether the assistant says them."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin|>' }}{% for m in messages %}<|start_header|>{{ m['role'] }}<|end_header|>\n\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim }}<|eot|>{% endgeneration %}"
    "{% else %}{{ m['content'] | trim }}<|eot|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header|>assistant<|end_header|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{% generation %} {{ m['content'] }}</s>{% endgeneration %}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ m['content'] }}</s>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}Assistant:{% generation %} {{ m['content'] }}{% endgeneration %}"
    "{{ '\\n\\n' }}{% else %}Human: {{ m['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def _chatml(turns: Turns) -> Pieces:
    found: Pieces = []
    for role, said in turns:
        found += [(f"<|im_start|>{role}\n", False), (f"{said}<|im_end|>", role == "assistant"), ("\n", False)]
    return found


def _llama3(turns: Turns) -> Pieces:
    found: Pieces = [("<|begin|>", False)]
    for role, said in turns:
        head = f"<|start_header|>{role}<|end_header|>\n\n"
        found += [(head, False), (f"{said.strip()}<|eot|>", role == "assistant")]
    return found


def _mistral(turns: Turns) -> Pieces:
    found: Pieces = [("<s>", False)]
    for role, said in turns:
        found.append((f"[INST] {said} [/INST]", False) if role == "user" else (f" {said}</s>", True))
    return found


def _zephyr(turns: Turns) -> Pieces:
    found: Pieces = []
    for role, said in turns:
        found += [(f"<|{role}|>\n", False), (f"{said}</s>", role == "assistant"), ("\n", False)]
    return found


def _plain(turns: Turns) -> Pieces:
    found: Pieces = []
    for role, said in turns:
        if role == "assistant":
            found += [("Assistant:", False), (f" {said.rstrip()}", True)]
            found += [(f"{said[len(said.rstrip()) :]}\n\n", False)]
        else:
            found.append((f"Human: {said}\n\n", False))
    return found


FAMILIES: dict[str, tuple[str, Callable[[Turns], Pieces]]] = {
    "chatml": (CHATML, _chatml),
    "llama3": (LLAMA3, _llama3),
    "mistral": (MISTRAL, _mistral),
    "zephyr": (ZEPHYR, _zephyr),
    "plain": (PLAIN, _plain),
}
SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|begin|>", "<|start_header|>", "<|end_header|>", "<|eot|>"),
    *("<s>", "</s>", "[INST]", "[/INST]"),
]


@cache
def _core(words: bool) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    core.decoder = decoders.ByteLevel()
    texts = [
        "the cat sat on the mat\n\nHuman: hello Assistant: hi there\n",
        "user assistant system\n\n\n",
        "cat\n\n" * 20,
    ] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet)
    core.train_from_iterator(texts, trainer)
    return core


def tokenizer(template: str, marked: bool, words: bool = True) -> Any:
    """A byte-level BPE tokenizer with this template, whose marks are taken out if it is not `marked`. Without
    `words`, tokens may reach from letters to line breaks."""
    made = PreTrainedTokenizerFast(tokenizer_object=_core(words), eos_token="</s>", bos_token="<s>")
    marks = ("{% generation %}", "{% endgeneration %}")
    for mark in marks if not marked else ():
        template = template.replace(mark, "")
    made.chat_template = template
    return made
