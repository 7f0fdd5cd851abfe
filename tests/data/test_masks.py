"""Which tokens of a chat are learned, against templates written in Python."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.data.masks import Labelled, label_chat, label_text
from puzzle.data.tokenizers import byte_tokenizer, encode
from puzzle.errors import UserError
from tests.data.kinds import KINDS
from tests.data.templates import CHATML, FAMILIES, PLAIN, Pieces, tokenizer

TEXT = st.text(alphabet="thecasn \n.é1", min_size=1, max_size=12).filter(lambda text: text.strip())
CHATS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)


def messages(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": role, "content": said} for pair in pairs for role, said in zip(roles, pair, strict=True)]


def expected(own, pieces: Pieces) -> tuple[list[int], list[bool]]:
    """Tokens of the text, and whether each lies in what the assistant says; a token across a border does
    not."""
    text = "".join(piece for piece, _ in pieces)
    said = [learned for piece, learned in pieces for _ in piece]
    found = own(text, add_special_tokens=False, return_offsets_mapping=True)
    owners = [number for number, (piece, _) in enumerate(pieces) for _ in piece]
    mask = [len(set(owners[low:high])) == 1 and said[low] for low, high in found["offset_mapping"]]
    return found["input_ids"], mask


def mask_of(labelled: Labelled) -> list[bool]:
    learned = set(labelled.learned)
    return [place in learned for place in range(len(labelled))]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(pairs=CHATS, words=st.booleans())
def test_what_the_assistant_says_is_learned_and_nothing_else(
    family: str, pairs: list[tuple[str, str]], words: bool
) -> None:
    template, render = FAMILIES[family]
    own = tokenizer(template, marked=False, words=words)
    chat = messages(pairs)
    tokens, mask = expected(own, render([(turn["role"], turn["content"]) for turn in chat]))
    found = label_chat(own, chat)
    assert list(found.tokens) == tokens
    assert mask_of(found) == mask
    last = label_chat(own, chat, last=True)
    assert last.spans == found.spans[-1:]


@pytest.mark.parametrize(("family", "said"), [("chatml", "\n\nthe"), ("plain", "the cat")])
def test_a_token_across_a_border_is_not_learned(family: str, said: str) -> None:
    """A line break that the answer begins with may be one token with the template's before it, one behind it
    one with its last letter."""
    template, render = FAMILIES[family]
    own = tokenizer(template, marked=False, words=False)
    chat = messages([("the", said)])
    pieces = render([(turn["role"], turn["content"]) for turn in chat])
    owners = [number for number, (piece, _) in enumerate(pieces) for _ in piece]
    text = "".join(piece for piece, _ in pieces)
    offsets = own(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    across = [place for place, (low, high) in enumerate(offsets) if len(set(owners[low:high])) > 1]
    mask = mask_of(label_chat(own, chat))
    assert mask == expected(own, pieces)[1]
    assert not any(mask[place] for place in across)
    assert any(mask[place + 1] or mask[place - 1] for place in across), "one is at the border of the answer"


@pytest.mark.parametrize("family", FAMILIES)
def test_marks_of_the_template_say_the_same(family: str) -> None:
    chat = messages([("the cat", "sat on"), ("hello", "hi there.")])
    template, _ = FAMILIES[family]
    plain, marked = (label_chat(tokenizer(template, marked), chat) for marked in (False, True))
    assert plain == marked
    assert len(plain.spans) == 2


def test_marks_decide_where_they_are() -> None:
    """A template may leave out of its marks what no rule would: here the end of the turn."""
    own = tokenizer(CHATML.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"), True)
    found = label_chat(own, messages([("the", "cat")]))
    ((start, stop),) = found.spans
    assert own.decode(found.tokens[start:stop]) == "cat"


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_is_refused_but_its_last_turn_is_learned() -> None:
    own = tokenizer(THINKING, marked=False)
    chat = messages([("the", "cat"), ("on", "mat")])
    with pytest.raises(UserError, match=r"turn 2.*give a template with \{% generation %\}.*learn to last"):
        label_chat(own, chat)
    last = label_chat(own, chat, last=True)
    ((start, stop),) = last.spans
    assert own.decode(last.tokens[start:stop]) == "<think>\n\n</think>\n\nmat<|im_end|>"


def test_a_template_that_opens_turns_otherwise_than_it_writes_them_is_refused() -> None:
    """Its generation prompt is in none of its chats: what a model would go on from is not what it learns."""
    own = tokenizer(PLAIN.replace("%}Assistant:{% endif %}", "%}Reply:{% endif %}"), marked=False)
    with pytest.raises(UserError, match="writes turn 2"):
        label_chat(own, messages([("the", "cat")]))


@pytest.mark.parametrize(
    ("role", "words"), [("user", "no turn of the assistant"), ("assistant", "begins with")]
)
def test_chats_without_a_question_or_an_answer(role: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        label_chat(tokenizer(CHATML, marked=False), [{"role": role, "content": "the"}])


def test_marks_that_mark_nothing_are_refused() -> None:
    own = tokenizer(CHATML.replace("'assistant' %}{% gen", "'nobody' %}{% gen"), marked=True)
    with pytest.raises(UserError, match="marks none of this chat"):
        label_chat(own, messages([("the", "cat")]))


def test_plain_text_is_learned_from_where_generation_goes_on() -> None:
    own = byte_tokenizer()
    found = label_text(own, "2+2=", "4")
    assert found.tokens == (*own("2+2=4")["input_ids"], own.eos_token_id)
    assert found.spans == ((4, 6),)
    merging = tokenizer(CHATML, marked=False)
    asked, whole = (merging(text)["input_ids"] for text in ("the c", "the cat"))
    assert whole[: len(asked)] != asked, "the border is inside a token of the whole text"
    found = label_text(merging, "the c", "at")
    assert list(found.tokens) == [*asked, *merging("at")["input_ids"], merging.eos_token_id]
    assert found.spans == ((len(asked), len(found.tokens)),)


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_is_tokenised_behind_its_prompt(kind: str) -> None:
    """Alone it may begin with a space that the text has not."""
    own = KINDS[kind]()
    for said in ("dog", " dog is good"):
        tokens = encode(own, f"my{said}")
        found = label_text(own, "my", said)
        assert list(found.tokens) == [*tokens, own.eos_token_id]
        assert found.spans == ((len(encode(own, "my")), len(tokens) + 1),)


def test_an_ended_sequence_ends_with_the_last_that_is_learned() -> None:
    assert Labelled((1, 2, 3, 4, 5), ((1, 2), (3, 4))).ended == Labelled((1, 2, 3, 4), ((1, 2), (3, 4)))


def test_a_template_with_marks_that_computes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puzzle.data.tokenizers.TEMPLATE_SECONDS", 0.05)
    loops = "{% for i in range(2000) %}{% for j in range(2000) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match=r"computed for 0.05 s for one prompt"):
        label_chat(tokenizer(loops + CHATML, marked=True), messages([("the", "cat")]))


def test_a_template_with_marks_writes_the_time_that_is_given() -> None:
    own = tokenizer("{{ strftime_now('%Y') }}" + CHATML, marked=True)
    found = label_chat(own, messages([("the", "cat")]), now=datetime(1999, 1, 1, tzinfo=UTC))
    assert own.decode(found.tokens).startswith("1999<|im_start|>user")
