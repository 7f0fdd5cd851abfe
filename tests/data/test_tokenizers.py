import os
import shutil
import signal
import string
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from puzzle.data import tokenizers
from puzzle.data.clock import at
from puzzle.data.saving import padding, tokenizer_folder
from puzzle.data.tokenizers import (
    TextStream,
    bare,
    byte_tokenizer,
    dialogue_ids,
    encode,
    foreign,
    load_tokenizer,
    render,
    response_text,
    special_tokens,
    standard_error_kept,
    stop_rule,
)
from puzzle.errors import UserError
from puzzle.files import durable
from tests.data import templates

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def with_bos():
    """A byte tokenizer that puts a BOS first, as LLaMA's does, and has a chat template that does so too."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.bos_token_id
    core = tokenizer.backend_tokenizer
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@given(st.text(max_size=60))
def test_bytes_round_trip(text):
    tokenizer = byte_tokenizer()
    ids = encode(tokenizer, text.replace("<eos>", "").replace("<pad>", ""))
    assert len(ids) == len(text.replace("<eos>", "").replace("<pad>", "").encode())
    assert tokenizer.decode(ids) == text.replace("<eos>", "").replace("<pad>", "")


def test_byte_tokenizer_is_saved_and_found_again(tmp_path):
    tokenizer = load_tokenizer("bytes")
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (258, 256, 257)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.get_vocab() == tokenizer.get_vocab()
    assert encode(again, "Ünïcode") == encode(tokenizer, "Ünïcode")


def test_a_folder_of_tokenizer_files_for_any_name(tmp_path):
    with tokenizer_folder("bytes", tmp_path) as folder:
        assert folder is not None
        assert folder.parent == tmp_path
        assert (folder / "tokenizer.json").is_file()
        assert load_tokenizer(str(folder)).eos_token_id == 256
    assert not folder.exists()
    with tokenizer_folder("bytes", tmp_path) as folder:
        assert folder is not None
        shutil.copytree(folder, left := tmp_path / f"{folder.name[:-8]}-left.partial")
    durable.settle(tmp_path)  # what a killed process left there goes
    assert not left.exists()
    with tokenizer_folder(str(tmp_path)) as same, tokenizer_folder(None) as none:
        assert (same, none) == (tmp_path, None)


def test_one_bos_however_the_prompt_comes():
    tokenizer = with_bos()
    bos = tokenizer.bos_token_id
    assert encode(tokenizer, "hi").count(bos) == 1
    assert encode(tokenizer, "<bos>hi") == encode(tokenizer, "hi")
    text = render(tokenizer, [{"role": "user", "content": "hi"}])
    ids = bare(tokenizer, text)
    assert text == "<bos><user>hi\n<assistant>"
    assert ids.count(bos) == 1
    assert ids[0] == bos
    assert tokenizer.decode(ids) == text


def test_a_text_whose_tokens_change_with_what_stands_before_it_loses_nothing_in_front():
    """Its own tokens are found nowhere: as many are taken from the begin on."""

    class Merging(type(with_bos())):
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [5, 6, 7, 8] if add_special_tokens else [1, 2, 3]}

    tokenizer = with_bos()
    tokenizer.__class__ = Merging
    assert encode(tokenizer, "hi") == [5, 6, 7]


def test_dialogue_for_another_tokenizer_is_made_from_text():
    plain, chat = byte_tokenizer(), with_bos()
    turns = [{"role": "user", "content": "hi"}]
    assert plain.decode(dialogue_ids(plain, "hi", turns, " you")) == "hi you"
    assert plain.decode(dialogue_ids(plain, "hi", turns, " you", 256)) == "hi you<eos>"
    assert chat.decode(dialogue_ids(chat, "hi", None, " you")) == "<bos>hi you"
    assert chat.decode(dialogue_ids(chat, "hi", None, " you", 256)) == "<bos>hi you<eos>"


def test_a_chat_s_last_turn_stays_open_where_the_answer_was_cut_off():
    chat = with_bos()
    turns = [{"role": "user", "content": "hi"}]
    assert chat.decode(dialogue_ids(chat, "hi", turns, " you")) == "<bos><user>hi\n<assistant> you"
    assert chat.decode(dialogue_ids(chat, "hi", turns, "")) == "<bos><user>hi\n<assistant>"
    assert chat.decode(dialogue_ids(chat, "hi", turns, "", 256)) == "<bos><user>hi\n<assistant>\n<eos>"
    # The template closes turns by a line, or by EOS itself, which then is there once.
    assert (
        chat.decode(dialogue_ids(chat, "hi", turns, " you", 256)) == "<bos><user>hi\n<assistant> you\n<eos>"
    )
    chat.chat_template = TEMPLATE.replace("}}\n{%", "}}<eos>{%")
    assert (
        chat.decode(dialogue_ids(chat, "hi", turns, " you", 256)) == "<bos><user>hi<eos><assistant> you<eos>"
    )
    assert chat.decode(dialogue_ids(chat, "hi", turns, " you")) == "<bos><user>hi<eos><assistant> you"
    assert chat.decode(dialogue_ids(chat, "hi", turns, "", 256)) == "<bos><user>hi<eos><assistant><eos>"


def test_what_has_no_tokenizer_or_template_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="no chat template"):
        render(byte_tokenizer(), [{"role": "user", "content": "hi"}])
    raising = with_bos()
    raising.chat_template = "{{ raise_exception('system turns are not supported') }}"
    with pytest.raises(UserError, match="system turns are not supported"):
        render(raising, [{"role": "user", "content": "hi"}])


TEXTS = st.text(st.sampled_from("aab \néß語🙂"), max_size=25)
STOPS = st.lists(st.text(st.sampled_from("ab \né語🙂"), min_size=1, max_size=4), min_size=1, max_size=3)


def whole(ids):
    return byte_tokenizer().decode(ids)


@given(TEXTS, STOPS)
def test_a_stop_text_ends_with_the_token_that_completes_it(text, stops):
    """Against the whole text after every token; a byte is a token, so characters take up to four."""
    ids = encode(byte_tokenizer(), text)
    rule = stop_rule(byte_tokenizer(), stops)
    assert rule is not None
    watcher = rule(())
    ends = [k for k, token in enumerate(ids, 1) if watcher(token)]
    truth = [k for k in range(1, len(ids) + 1) if any(whole(ids[:k]).endswith(stop) for stop in stops)]
    assert ends == truth
    if ends:
        kept = ids[: ends[0]]
        cut = response_text(byte_tokenizer(), kept, stops)
        assert cut == min(
            (whole(kept)[: whole(kept).find(stop)] for stop in stops if stop in whole(kept)), key=len
        )
    assert response_text(byte_tokenizer(), ids) == text


@given(TEXTS)
def test_streamed_pieces_are_the_text(text):
    stream = TextStream(byte_tokenizer())
    pieces = [stream.add(token)[0] for token in encode(byte_tokenizer(), text)]
    assert "".join(pieces) == text
    assert all(piece == "" or piece in text for piece in pieces)


def test_a_passed_over_stop_text_stays():
    """With min_new_tokens a response may go on behind a stop text: the one that ended it is cut."""
    assert response_text(byte_tokenizer(), encode(byte_tokenizer(), "a END b END"), ("END",)) == "a END b "
    assert response_text(byte_tokenizer(), encode(byte_tokenizer(), "a END b"), ("END",)) == "a END b"
    assert stop_rule(byte_tokenizer(), ()) is None
    for end in ("é", "語", "🙂"):  # characters of two to four tokens, whose beginnings have no text
        assert (
            response_text(byte_tokenizer(), encode(byte_tokenizer(), f"a END{end}"), ("END",))
            == f"a END{end}"
        )
        assert (
            response_text(byte_tokenizer(), encode(byte_tokenizer(), f"a{end} END{end}"), (end,))
            == f"a{end} END"
        )


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"


@pytest.mark.parametrize("inside", ["", "{{ a }}", "{{ messages[0].content|upper }}"])
def test_a_template_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch, inside: str) -> None:
    """Centuries of loops; afterwards nothing of the limit is left that could interrupt something else."""
    monkeypatch.setattr(tokenizers, "TEMPLATE_SECONDS", 0.3)
    before = signal.getsignal(signal.SIGVTALRM)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = LOOPS + inside + "{% endfor %}" * 3
    turns = [{"role": "user", "content": "hi"}]
    with pytest.raises(UserError, match=r"^the chat template has computed for 0.3 s for one prompt, perhaps"):
        render(tokenizer, turns)
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert render(tokenizer, turns) == "hi"


def test_templates_write_the_date_that_they_are_told() -> None:
    """Python's own strftime is the truth; a template without the function stays as it is."""
    now = datetime(2024, 2, 3, 4, 5, 6, tzinfo=UTC)
    forms = ["%d %b %Y", "%B %-d, %Y", "%H:%M:%S", "%Y-%m-%d", "%A"]
    calls = "".join(f"{{{{ strftime_now('{form}') }}}}|" for form in forms)
    loops = "{% for m in messages %}{% set day = strftime_now('%d') %}{{ day + m.content }}{% endfor %}"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = f"\n {calls}{{% if strftime_now is defined %}}yes{{% endif %}}{loops}"
    text = render(tokenizer, [{"role": "user", "content": "!"}], now=now)
    assert text == "\n " + "".join(f"{now.strftime(form)}|" for form in forms) + "yes03!"
    plain = "\n{{ messages[0].content }}"
    assert at(plain, now) == plain
    for form in ("100%% of %%d on %d", "%_d %0e %^b %#B", "%%%Y%%%%m"):
        tokenizer.chat_template = f"{{{{ strftime_now(format='{form}') }}}}"
        assert render(tokenizer, [{"role": "user", "content": "!"}], now=now) == now.strftime(form)


@pytest.mark.parametrize("begin", ["", "\n", "  ", "\n\n", " \n  "])
def test_the_clock_changes_nothing_about_where_a_template_begins(begin: str) -> None:
    """transformers trims blanks before a block and the line end behind it; its clock tells the century."""
    turns = [{"role": "user", "content": "hi"}]
    for rest in ("{% if true %}\n{{ strftime_now('%C') }}{% endif %}!", "{{ strftime_now('%C') }}!"):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = begin + rest
        theirs = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert render(tokenizer, turns, now=datetime(2026, 1, 5, tzinfo=UTC)) == theirs


@pytest.mark.parametrize("zone", [None, UTC, timezone(timedelta(hours=-7))])
def test_every_form_of_the_date_is_python_s(zone: tzinfo | None) -> None:
    """With and without padding, also those that a platform does not know or that are nothing without a zone;
    as an answer's dialogue is read, too."""
    now = datetime(2024, 2, 3, 4, 5, 6, 78, tzinfo=zone)
    forms = [f"<%{flag}{letter}>" for flag in ("", "-") for letter in string.ascii_letters]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "".join(f"{{{{ strftime_now('{form}') }}}}" for form in forms) + (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    told = "".join(map(now.strftime, forms))
    turns = [{"role": "user", "content": "hi"}]
    assert render(tokenizer, turns, now=now) == f"{told}hi>"
    assert tokenizer.decode(dialogue_ids(tokenizer, "hi", turns, "you", now=now)) == f"{told}hiyou"
    assert tokenizer.decode(dialogue_ids(tokenizer, "hi", turns, "", now=now)) == f"{told}hi>"


@contextmanager
def standard_error(path: Path) -> Generator[None]:
    """Descriptor 2 is this file, as a library in another language would write there."""
    before = os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def test_what_a_library_says_comes_once_it_has_not_failed(tmp_path: Path) -> None:
    """Not while it runs, whole and in order afterwards, and never where it raises; then all is as before."""
    file = tmp_path / "said"
    opened = len(os.listdir("/proc/self/fd"))
    with standard_error(file):
        os.write(2, b"before ")
        with standard_error_kept():
            os.write(2, b"in ")
            os.write(2, b"it ")
            assert file.read_bytes() == b"before "
        assert file.read_bytes() == b"before in it "
        with suppress(KeyError), standard_error_kept():
            os.write(2, b"panicked ")
            raise KeyError
        os.write(2, b"after")
    assert file.read_bytes() == b"before in it after"
    assert len(os.listdir("/proc/self/fd")) == opened


def test_without_standard_error_there_is_nothing_to_keep() -> None:
    before = os.dup(2)
    os.close(2)
    try:
        with standard_error_kept():
            entered = True
    finally:
        os.dup2(before, 2)
        os.close(before)
    assert entered


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("one", "one"),
        ("\n one \n two", "one"),
        ("why:\n two\n three", "why: two"),
        ("why:", "why:"),
        ("", "KeyError"),
    ],
)
def test_what_a_library_raises_is_one_line(message: str, said: str) -> None:
    error = type("KeyError", (Exception,), {})(message)
    with pytest.raises(UserError) as raised, foreign("the file"):
        raise error
    assert str(raised.value) == f"the file: {said}"


@pytest.mark.parametrize(
    "file", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"]
)
def test_a_damaged_file_of_a_tokenizer_is_named(tmp_path: Path, file: str) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / file).write_text('{"a": 1')
    with pytest.raises(UserError, match=rf"/{file}:?.*: not valid JSON"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("stops", "left"),
    [
        (("b", "a<bos>b"), ""),
        (("ab", "<bos>b"), ""),
        (("b", "<bos>b"), "a"),
        (("<bos>b", "a<bos>b"), ""),
        (("<bos>",), "ab"),
        (("x", "<bos>x"), "ab"),
    ],
)
def test_of_stop_texts_that_end_together_the_longest_is_cut(stops: tuple[str, ...], left: str) -> None:
    tokenizer = with_bos()
    a, b = encode(tokenizer, "ab")[1:]
    assert response_text(tokenizer, [a, tokenizer.bos_token_id, b], stops) == left


def test_plain_stop_texts_hear_no_special_tokens() -> None:
    """A text is what decoding leaves: across a special token, and not within one's name."""
    tokenizer = with_bos()
    bos, ids = tokenizer.bos_token_id, encode(tokenizer, "ab")[1:]
    for stops, ends in (
        (("ab",), [False, False, True]),
        (("bo",), [False, False, False]),
        (("ab", "x<bos>"), [False, False, True]),
        (("b", "a<bos>"), [False, True, True]),
    ):
        rule = stop_rule(tokenizer, stops)
        assert rule is not None
        watch = rule(())
        assert [watch(token) for token in (ids[0], bos, ids[1])] == ends, stops
    stream = TextStream(tokenizer)
    assert [stream.add(token)[0] for token in (ids[0], bos, ids[1])] == ["a", "", "b"]
    stream = TextStream(tokenizer, special=True)
    assert [stream.add(token)[0] for token in (ids[0], bos, ids[1])] == ["a", "<bos>", "b"]


def test_padding_is_no_token_that_ends_a_sequence(tmp_path: Path) -> None:
    """The tokenizer's own if it can be, else another special token; the saved folder says so."""
    own = templates.tokenizer(templates.CHATML, marked=False)
    ids = special_tokens(own)
    assert own.pad_token_id is None
    assert padding(own, [ids["</s>"]]) in set(ids.values()) - {ids["</s>"]}
    own.pad_token = "<|im_end|>"
    assert padding(own, [ids["</s>"]]) == ids["<|im_end|>"]
    other = padding(own, [ids["<|im_end|>"], ids["</s>"]])
    assert other is not None
    assert other in set(ids.values()) - {ids["<|im_end|>"], ids["</s>"]}
    assert padding(own, ids.values()) is None
    own.save_pretrained(tmp_path / "own")
    with tokenizer_folder(str(tmp_path / "own"), tmp_path, other) as folder:
        assert folder is not None
        saved = load_tokenizer(str(folder))
    assert saved.pad_token_id == other
    assert saved.chat_template == own.chat_template
    text = "the cat sat<|im_end|>"
    assert saved(text)["input_ids"] == own(text)["input_ids"]
