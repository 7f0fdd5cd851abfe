"""Texts of responses with tokenizers of several kinds: what was written behind a prompt, not what its tokens
say alone."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Core
from transformers import PreTrainedTokenizerFast

from puzzle.data.tokenizers import (
    UNFINISHED,
    TextStream,
    answer_lead,
    encode,
    response_text,
    stop_rule,
)
from tests.data.kinds import KINDS, sentencepiece

MADE = {name: make() for name, make in KINDS.items()}
WORDS = st.lists(
    st.sampled_from(["my", " dog", " is", " a", "b", " good", " ", "\n", "é", "語", "🙂"]), max_size=8
)
STOPS = st.sampled_from([" a", " ", "y d", "s a", "é", "\n", "🙂"])


@pytest.mark.parametrize("kind", KINDS)
@given(words=WORDS, stop=STOPS)
@settings(max_examples=40, deadline=None)
def test_a_response_is_what_it_adds_to_its_prompt(kind, words, stop):
    """Against the decoded whole: text, stop texts and streamed pieces, wherever the response begins."""
    tokenizer = MADE[kind]
    asked, said = "my dog", "".join(words)
    ids = encode(tokenizer, asked + said)
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] != tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == asked + said
    starts = [n for n in range(1, len(ids)) if tokenizer.decode(ids[:n], skip_special_tokens=True) == asked]
    for start in starts:
        prompt, rest = ids[:start], ids[start:]
        assert response_text(tokenizer, rest, (), prompt) == said
        assert response_text(tokenizer, rest) == said  # behind a prompt that is not known
        stream = TextStream(tokenizer, prompt)
        pieces = [stream.add(token) for token in rest]
        assert "".join(certain for certain, _ in pieces) + (pieces[-1][1] if pieces else "") == said
        rule = stop_rule(tokenizer, (stop,))
        assert rule is not None
        watch = rule(prompt)
        end = next((n for n, token in enumerate(rest, 1) if watch(token)), None)
        if stop not in said:
            assert end is None
            continue
        assert end is not None
        seen = [response_text(tokenizer, rest[:n], (), prompt).rstrip(UNFINISHED) for n in range(end + 1)]
        assert stop in seen[end]
        assert not any(stop in text for text in seen[:end])
        assert response_text(tokenizer, rest[:end], (stop,), prompt) == said.partition(stop)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", ["é", "語", " good"])
@pytest.mark.parametrize("after", ["é", "語", "🙂", " a"])
def test_a_stop_text_that_was_passed_over_stays_whatever_completes_behind_it(kind, stop, after):
    """A character of several tokens whose begin spoils the text of what came before it, until it is whole."""
    tokenizer = MADE[kind]
    prompt = encode(tokenizer, "my")
    said = f" dog{stop}{after}"
    rest = encode(tokenizer, "my" + said)[len(prompt) :]
    assert response_text(tokenizer, rest, (stop,), prompt) == (f" dog{stop}" if after == stop else said)


@pytest.mark.parametrize("kind", KINDS)
def test_stop_texts_with_special_tokens(kind):
    tokenizer: Any = MADE[kind]
    end, eos = tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.eos_token_id
    prompt = encode(tokenizer, "my dog")
    said = encode(tokenizer, "my dog is good")[len(prompt) :]
    line = encode(tokenizer, "my dog\n")[len(prompt) :]
    for stop, ids in {
        "<|end|>": [*said, end],
        "<|end|>\n": [*said, end, *line],
        "<|end|></s>": [*said, end, eos],
        "od<|end|>": [*said, end],
    }.items():
        rule = stop_rule(tokenizer, (stop, "never said"))
        assert rule is not None
        watch = rule(prompt)
        assert [watch(token) for token in ids] == [False] * (len(ids) - 1) + [True], stop
        text = " is good".removesuffix(stop[: stop.index("<")])
        assert response_text(tokenizer, ids, (stop,), prompt) == text
    # Passed over, it is no part of the text, and ends nothing.
    assert response_text(tokenizer, [*said, end, *said], ("<|end|>",), prompt) == " is good is good"


TURN = (
    "{% for m in messages %}[{{ m.role }}]OPEN{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def ids_of(tokenizer, turns, answer):
    found: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=answer)
    return found["input_ids"]


@pytest.mark.parametrize("opening", ["", " ", "\n"])
def test_an_answer_in_a_chat_is_the_content_of_its_turn(opening):
    """Written by the template, tokenised and decoded, an answer is itself again."""
    tokenizer = sentencepiece()
    tokenizer.chat_template = TURN.replace("OPEN", opening)
    turns = [{"role": "user", "content": "my dog"}]
    opened = ids_of(tokenizer, turns, True)
    whole = ids_of(tokenizer, [*turns, {"role": "assistant", "content": "good boy"}], False)
    assert whole[: len(opened)] == opened
    lead = answer_lead(tokenizer, turns)
    assert lead == (" " if opening == " " else "")
    said = response_text(tokenizer, whole[len(opened) :], (), opened, lead)
    assert said == ("\ngood boy" if opening == "\n" else "good boy")


def test_a_tokenizer_that_tidies_texts_up_leaves_responses_as_they_are():
    """Some are saved so that `decode` takes the space before a full stop away."""
    said = " 's good . n't , !"
    core = Core(models.WordLevel({letter: n for n, letter in enumerate(sorted({*said, *"my"}))}))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=True)
    asked, ids = (tokenizer(text)["input_ids"] for text in ("my dog .", said))
    assert tokenizer.decode(ids) != said
    assert response_text(tokenizer, ids, (), asked) == said
    stream = TextStream(tokenizer, asked)
    assert "".join(stream.add(token)[0] for token in ids) == said
