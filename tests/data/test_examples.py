"""Rows of examples: what becomes of each kind, which are refused or dropped, what a digest tells apart."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from puzzle.config.supervised import DialoguesConfig, ExamplesConfig, PairsConfig
from puzzle.data.examples import Example, ExampleSet, load_examples
from puzzle.data.masks import Labelled
from puzzle.data.records import EmptyRow
from puzzle.data.stream import LeftOut
from puzzle.data.tokenizers import Tokenizer, byte_tokenizer
from puzzle.errors import UserError
from tests.data.templates import CHATML, tokenizer

CHAT = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "on"},
    {"role": "assistant", "content": "the mat"},
]
SYSTEM = {"role": "system", "content": "hello"}
FULL = {"chat_template": True}


def chatml(*turns: dict[str, str]) -> str:
    return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)


def file(folder: Path, *rows: dict[str, Any]) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def told(own: Tokenizer, labelled: Labelled) -> tuple[str, list[str]]:
    """A sequence as text, and the texts that are learned of it."""
    tokens = list(labelled.tokens)
    return str(own.decode(tokens)), [str(own.decode(tokens[start:stop])) for start, stop in labelled.spans]


def asked(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


DIALOGUES = [
    ({"messages": CHAT}, {}, chatml(*CHAT), ["sat<|im_end|>", "the mat<|im_end|>"]),
    ({"messages": CHAT}, {"learn": "last"}, chatml(*CHAT), ["the mat<|im_end|>"]),
    # A row with both is a chat, and its own system turn stays the only one.
    ({"messages": [SYSTEM, *CHAT[:2]], "prompt": "x", "response": "y"}, {"system": "cat"},
     chatml(SYSTEM, *CHAT[:2]), ["sat<|im_end|>"]),
    ({"messages": CHAT[:2]}, {"system": "hello"}, chatml(SYSTEM, *CHAT[:2]), ["sat<|im_end|>"]),
    ({"prompt": "the", "response": "cat"}, {}, chatml(asked("the"), answer("cat")), ["cat<|im_end|>"]),
    # What a prompt has the assistant say is a prompt.
    ({"prompt": CHAT[:3], "response": "hi"}, {}, chatml(*CHAT[:3], answer("hi")), ["hi<|im_end|>"]),
    ({"q": "the", "a": "cat"}, {"prompt_field": "q", "response_field": "a"},
     chatml(asked("the"), answer("cat")), ["cat<|im_end|>"]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "options", "whole", "learned"), DIALOGUES)
def test_a_dialogue_is_one_sequence(
    tmp_path: Path, row: dict[str, Any], options: dict[str, Any], whole: str, learned: list[str]
) -> None:
    own = tokenizer(CHATML, marked=True)
    found = load_examples(file(tmp_path, row), DialoguesConfig(**FULL, **options), own)
    ((sequence,),) = (example.sequences for example in found.examples)
    assert told(own, sequence) == (whole, learned)
    assert (len(found.left), found.examples[0].margin, len(found.examples[0])) == (0, 0.0, len(sequence))


PAIRS = [
    # An answer as text, one as the turns behind the prompt, one as a whole chat.
    ({"prompt": "the", "chosen": "cat", "rejected": [answer("mat")]},
     [chatml(asked("the"), answer("cat")), chatml(asked("the"), answer("mat"))], ["cat", "mat"]),
    ({"prompt": CHAT[:3], "chosen": "cat", "rejected": [answer("a"), asked("b"), answer("mat")]},
     [chatml(*CHAT[:3], answer("cat")), chatml(*CHAT[:3], answer("a"), asked("b"), answer("mat"))],
     ["cat", "mat"]),
    ({"prompt": "x", "chosen": CHAT, "rejected": CHAT[:2]}, [chatml(*CHAT), chatml(*CHAT[:2])],
     ["the mat", "sat"]),
    ({"chosen": CHAT, "rejected": CHAT[:2]}, [chatml(*CHAT), chatml(*CHAT[:2])], ["the mat", "sat"]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "wholes", "learned"), PAIRS)
def test_of_a_pair_the_last_answers_are_learned_up_to_their_ends(
    tmp_path: Path, row: dict[str, Any], wholes: list[str], learned: list[str]
) -> None:
    own = tokenizer(CHATML, marked=True)
    (found,) = load_examples(file(tmp_path, row), PairsConfig(**FULL), own).examples
    expected = [(w.removesuffix("\n"), [f"{a}<|im_end|>"]) for w, a in zip(wholes, learned, strict=True)]
    assert [told(own, sequence) for sequence in found.sequences] == expected
    assert len(found) == sum(len(sequence.tokens) for sequence in found.sequences)


def test_texts_without_a_template_follow_one_another(tmp_path: Path) -> None:
    own = byte_tokenizer()
    row = {"prompt": "ab", "response": "cde", "chosen": "f", "rejected": "gh", "margin": 2}
    (dialogue,) = load_examples(file(tmp_path, row), DialoguesConfig(), own).examples
    assert [told(own, one) for one in dialogue.sequences] == [("abcde<eos>", ["cde<eos>"])]
    data = PairsConfig(margin_field="margin")
    (pair,) = load_examples(file(tmp_path, row), data, own).examples
    expected = [("abf<eos>", ["f<eos>"]), ("abgh<eos>", ["gh<eos>"])]
    assert [told(own, one) for one in pair.sequences] == expected
    assert pair.margin == 2.0


ROW: dict[str, Any] = {"prompt": "a", "response": "b", "chosen": "c", "rejected": "d", "margin": 1.0}
MARGIN = {"margin_field": "margin"}
TURNS = "must be turns with role and content"
DIALOGUE, PAIR = DialoguesConfig, PairsConfig
REFUSED = [
    (DIALOGUE, FULL, {"messages": []}, "messages is empty"),
    (DIALOGUE, FULL, {"messages": "the cat"}, f"messages {TURNS}"),
    (DIALOGUE, FULL, {"messages": {"role": "user"}}, f"messages {TURNS}"),
    (DIALOGUE, FULL, {"messages": [*CHAT[:2], "on"]}, f"messages {TURNS}"),
    (DIALOGUE, FULL, {"messages": [{"role": 1, "content": "the"}]}, f"messages {TURNS}"),
    (DIALOGUE, FULL, {"messages": [{"role": "user", "content": None}]}, f"messages {TURNS}"),
    (DIALOGUE, FULL, {"messages": [*CHAT[:2], asked(" ")]}, "messages: turn 3, the user's, is empty"),
    (DIALOGUE, FULL, {"messages": [CHAT[0], answer("\ud800")]}, "messages: turn 2: '.ud800' at character 1"),
    (DIALOGUE, {}, {"messages": CHAT}, "the example is a chat; set data.chat_template"),
    (DIALOGUE, {}, ROW | {"prompt": " \n"}, "prompt is empty"),
    (DIALOGUE, {}, ROW | {"response": ""}, "the response is empty"),
    (DIALOGUE, {}, ROW | {"response": 1}, "the response must be text"),
    (DIALOGUE, {}, ROW | {"response": "\udfff"}, "the response: '.udfff' at character 1"),
    (DIALOGUE, {}, {"prompt": "a"}, "no field 'response'; it has prompt"),
    (DIALOGUE, {}, ROW | {"response": "b" * 8}, "the example has 10 tokens, data.max_tokens is 9"),
    (PAIR, {}, ROW | {"rejected": "b" * 8}, "the example has 10 tokens, data.max_tokens is 9"),
    (PAIR, {}, {"prompt": "a", "chosen": "b"}, "no field 'rejected'; it has prompt, chosen"),
    (PAIR, {}, {"chosen": "b", "rejected": "c"}, "no field 'prompt', which chosen answers"),
    (PAIR, FULL, {"chosen": CHAT, "rejected": CHAT[:3]}, "rejected must end with the assistant's turn"),
    (PAIR, MARGIN, {k: v for k, v in ROW.items() if k != "margin"}, "no field 'margin'"),
    *((PAIR, MARGIN, ROW | {"margin": value}, "margin must be a number, found")
      for value in ("1", True, math.inf, -math.inf, math.nan, 1.1e30)),
]  # fmt: skip


@pytest.mark.parametrize(("config", "options", "row", "words"), REFUSED)
def test_a_bad_row_is_named(
    tmp_path: Path,
    config: type[ExamplesConfig],
    options: dict[str, Any],
    row: dict[str, Any],
    words: str,
) -> None:
    own = tokenizer(CHATML, marked=True) if options == FULL else byte_tokenizer()
    length = {} if options == FULL else {"max_tokens": 9}
    with pytest.raises(UserError, match=rf"rows.jsonl:1: {words}"):
        load_examples(file(tmp_path, row), config(**options, **length), own)


def test_rows_are_counted_and_all_have_the_fields_of_the_first(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b"}] * 2
    for bad, words in (
        ({"messages": CHAT}, "no field 'prompt'"),
        (ROW | {"response": 1}, "the response must"),
    ):
        with pytest.raises(UserError, match=rf"rows.jsonl:3: {words}"):
            load_examples(file(tmp_path, *rows, bad), DialoguesConfig(), byte_tokenizer())
    asked_for = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(UserError, match=r"rows.jsonl:2: no field 'prompt'; it has chosen, rejected"):
        load_examples(
            file(tmp_path, asked_for, {"chosen": "b", "rejected": "c"}), PairsConfig(), byte_tokenizer()
        )


def test_files_without_rows_or_with_lines_of_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows.jsonl: holds no examples"):
        load_examples(file(tmp_path), DialoguesConfig(), byte_tokenizer())
    for name in ("a.txt", "a.text"):
        (tmp_path / name).write_text("the cat\n")
        with pytest.raises(UserError, match=rf"{name}: examples must be .jsonl, .parquet or"):
            load_examples(tmp_path / name, DialoguesConfig(), byte_tokenizer())


def test_longer_ones_are_dropped_and_the_others_keep_their_places(tmp_path: Path) -> None:
    """A pair by the longer of its two; one of exactly as many tokens stays."""
    own, data = byte_tokenizer(), PairsConfig(max_tokens=6, too_long="drop")
    rows = [
        {"prompt": "a", "chosen": "b" * n, "rejected": "c" * m} for n, m in ((5, 1), (4, 1), (1, 5), (1, 4))
    ]
    found = load_examples(file(tmp_path, *rows), data, own)
    assert [example.index for example in found.examples] == [1, 3]
    assert [place.rpartition(":")[2] for place in found.left.long] == ["1", "3"]
    with pytest.raises(UserError, match=r"rows.jsonl: all 2 examples exceed data.max_tokens 6"):
        load_examples(file(tmp_path, rows[0], rows[2]), data, own)


@pytest.mark.parametrize(
    ("config", "options", "row"),
    [
        (DIALOGUE, FULL, {"messages": [*CHAT[:2], asked(" ")]}),
        (DIALOGUE, FULL, {"messages": [CHAT[0], answer("")]}),
        (DIALOGUE, FULL, {"messages": []}),
        (DIALOGUE, FULL, {"messages": None}),
        (DIALOGUE, {}, ROW | {"prompt": "\n"}),
        (DIALOGUE, {}, ROW | {"response": None}),
        (PAIR, {}, ROW | {"chosen": ""}),
        (PAIR, {}, ROW | {"rejected": None}),
    ],
)
def test_empty_ones_are_dropped_where_that_is_said_and_the_first_is_named(
    tmp_path: Path, config: type[ExamplesConfig], options: dict[str, Any], row: dict[str, Any]
) -> None:
    own = tokenizer(CHATML, marked=False) if options == FULL else byte_tokenizer()
    good = {"messages": CHAT} if options == FULL else ROW
    path = file(tmp_path, good, row, good, row)
    found = load_examples(path, config(**options, empty="drop"), own)
    assert [example.index for example in found.examples] == [0, 2]
    said = f"2 of 4 examples are empty in part or whole and are left out, the first is {path}:2"
    assert found.remarks == [said]
    with pytest.raises(EmptyRow, match=r"rows.jsonl:2: "):
        load_examples(path, config(**options), own)
    with pytest.raises(
        UserError, match=r"rows.jsonl: of 1 examples 0 exceed data.max_tokens \d+, the others"
    ):
        load_examples(file(tmp_path, row), config(**options, empty="drop"), own)


def test_an_answer_of_a_pair_may_say_nothing(tmp_path: Path) -> None:
    """Public preferences have such, of which the end is learned. Turns before must say something."""
    own = tokenizer(CHATML, marked=False)
    row = {"chosen": CHAT[:2], "rejected": [CHAT[0], answer("")]}
    ((better, worse),) = (e.sequences for e in load_examples(file(tmp_path, row), PAIR(**FULL), own).examples)
    assert len(worse) < len(better)
    assert [own.decode(worse.tokens[a:b]) for a, b in worse.spans] == ["<|im_end|>"]
    row["rejected"] = [CHAT[0], answer(""), CHAT[0], answer("on")]
    with pytest.raises(EmptyRow, match="rejected: turn 2, the assistant's, is empty"):
        load_examples(file(tmp_path, row), PAIR(**FULL), own)


def test_a_digest_tells_examples_apart_and_nothing_else() -> None:
    labelled = Labelled((1, 2, 3), ((1, 3),))
    one = Example(0, (labelled,), 0.5)
    others = [
        dataclasses.replace(one, index=1),
        dataclasses.replace(one, margin=0.25),
        dataclasses.replace(one, sequences=(Labelled((1, 2, 4), ((1, 3),)),)),
        dataclasses.replace(one, sequences=(Labelled((1, 2, 3), ((2, 3),)),)),
    ]
    digests = [ExampleSet((example,)).digest for example in (one, *others)]
    assert len({*digests, ExampleSet((one, one)).digest, ExampleSet(()).digest}) == len(others) + 3
    assert (
        ExampleSet((dataclasses.replace(one, reference=(1.0,)),), LeftOut("k", ("a:1",))).digest == digests[0]
    )


def test_a_batch_is_dealt_in_the_order_of_the_seed() -> None:
    every = tuple(Example(index, (Labelled((1, 2), ((1, 2),)),), 0.0) for index in range(6))
    found = ExampleSet(every)
    plain = found.stream(3, 0, shuffle=False)
    assert [example.index for example in plain.next() + plain.next()] == list(range(6))
    first, second = (found.stream(6, seed, shuffle=True).next() for seed in (1, 2))
    assert first != second
    assert sorted(example.index for example in first) == list(range(6))
    with pytest.raises(UserError, match="batch is 7 but there are only 6 examples"):
        found.stream(7, 0, shuffle=False)
