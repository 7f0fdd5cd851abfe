"""What a reward model with a tokenizer of its own reads."""

from datetime import UTC, datetime
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from puzzle.data.prompts import Prompt
from puzzle.data.reading import Reader, padding_of, same_tokenizer, same_tokens, without_padding
from puzzle.data.tokenizers import bare, encode, load_tokenizer, render

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def letters(pieces=(), eos="</s>", **special):
    """A token per letter, and `pieces` as added tokens."""
    alphabet = "abcdefghABCDEFGHassitnur<>\u0120"
    core = Core(models.BPE(vocab={c: i for i, c in enumerate(dict.fromkeys(alphabet))}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos)
    tokenizer.add_tokens(list(pieces))
    tokenizer.add_special_tokens(special)
    return tokenizer


def read(ours, theirs, said, ended=True, messages=None):
    """Their ids for what ours answered to `abc`."""
    turns = messages and [dict(turn) for turn in messages]
    tokens = (
        encode(ours, "abc")
        if turns is None
        else ours.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    )
    response = [*encode(ours, said), *([ours.eos_token_id] if ended else [])]
    reader = Reader(ours, theirs, {ours.eos_token_id})
    return [*tokens, *response], list(reader(Prompt(0, "0", "abc", messages, tuple(tokens)), response, said))


def padded(tmp_path):
    tokenizer = letters()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["abc", "a"], padding=True, truncation=True, max_length=64)
    tokenizer.save_pretrained(tmp_path)
    return load_tokenizer(str(tmp_path))


def with_bos():
    tokenizer = letters(bos_token="<s>")
    core = tokenizer.backend_tokenizer
    bos = [("<s>", tokenizer.bos_token_id)]
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    return tokenizer


@pytest.mark.parametrize("ended", [True, False])
def test_ids_stay_where_tokenizers_encode_alike(tmp_path, ended):
    ours = letters()
    for theirs in (letters(), letters(pad_token="<pad>"), letters(["cadge"]), padded(tmp_path)):
        ids, found = read(ours, theirs, " bad", ended)
        assert found == ids
    assert same_tokenizer(ours, padded(tmp_path))
    assert not same_tokenizer(ours, letters(["ab"]))


def test_tokens_agree_only_where_every_shared_id_means_one_token():
    assert same_tokens(letters(), letters())
    assert same_tokens(letters(), letters(["longer"]))
    assert same_tokens(letters(["longer"]), letters())
    assert not same_tokens(letters(["one"]), letters(["other"]))  # all but one
    assert not same_tokens(letters(eos="<eos>"), letters(eos="</s>"))


@pytest.mark.parametrize("ended", [True, False])
def test_text_is_tokenised_again_with_its_end_where_they_do_not(ended):
    lower = letters()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    shifted = letters(eos="<pad>")
    shifted.add_special_tokens({"eos_token": "</s>"})
    for theirs in (letters(["ba"]), letters(eos="<eos>"), with_bos(), lower, shifted):
        _, found = read(letters(), theirs, " bAd bad", ended)
        assert found == [*theirs("abc bAd bad")["input_ids"], *([theirs.eos_token_id] if ended else [])]


@pytest.mark.parametrize("pad", [None, 0, 7, 9])
def test_what_ends_a_dialogue_is_read_as_a_classifier_of_transformers_reads_it(pad, tmp_path):
    """Up to the last token that does not pad, which may be the one before the end of the response."""
    sizes: dict[str, Any] = {
        "num_labels": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = LlamaConfig(vocab_size=10, pad_token_id=pad, **sizes)
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    config.save_pretrained(tmp_path)
    assert padding_of(tmp_path, {7, 9}) == (pad if pad in (7, 9) else None)
    for ids in ([1, 9, 2, 7], [1, 2, 9, 9], [3, 7, 4, 5], [1, 2, 7, 9]):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, 0]
            read = torch.tensor([without_padding(ids, padding_of(tmp_path, {7, 9}))])
            hidden = model.base_model(read).last_hidden_state
            found = model.get_submodule("score")(hidden)[0, -1, 0]
        torch.testing.assert_close(found, expected)


def test_an_end_by_another_name_is_that_name_s():
    """A model that ends turns by a token of its own: a tokenizer that has it too reads it."""
    assert Reader(letters(), letters(eos="<eos>"), {letters().eos_token_id}).ends == {
        letters(eos="<eos>").eos_token_id
    }
    ours, theirs = letters(["<end>"]), letters(["ba", "<end>"])
    end = ours.convert_tokens_to_ids("<end>")
    reader = Reader(ours, theirs, {end})
    prompt = Prompt(0, "0", "abc", None, tuple(encode(ours, "abc")))
    found = reader(prompt, [*encode(ours, " bad"), end], " bad")
    assert list(found) == [*theirs("abc bad")["input_ids"], theirs.convert_tokens_to_ids("<end>")]


def test_chats_are_read_through_another_template():
    turns = ({"role": "user", "content": "abc"},)
    ours, theirs = letters(), letters()
    ours.chat_template = theirs.chat_template = CHAT
    ids, found = read(ours, theirs, "bad", messages=turns)
    assert found == ids
    theirs.chat_template = None
    assert read(ours, theirs, "bad", messages=turns)[1] == ids
    theirs.chat_template = CHAT.replace("<{{ m.role }}>", "{{ m.role[0] }}").replace("<assistant>", "a")
    assert theirs.decode(read(ours, theirs, "bad", messages=turns)[1]) == "uabc</s>abad</s>"
    assert theirs.decode(read(ours, theirs, "bad", False, turns)[1]) == "uabc</s>abad"


def test_both_templates_are_read_at_the_time_of_the_run():
    """Templates that write the date: ids stay where they say the same of that moment, whatever day it is."""
    now = datetime(2001, 2, 3, tzinfo=UTC)
    ours, theirs = letters(pad_token="<pad>"), letters(pad_token="<pad>")
    ours.chat_template = "{{ strftime_now('%A') }}" + CHAT
    turns = ({"role": "user", "content": "abc"},)
    tokens = bare(ours, render(ours, turns, now=now))
    # A token without a text: read where ids stay, lost where the text is tokenised again.
    response = [*encode(ours, "bad"), ours.pad_token_id, ours.eos_token_id]
    prompt = Prompt(0, "0", "abc", turns, tuple(tokens))
    for template, same in ((ours.chat_template, True), ("{{ strftime_now('%B') }}" + CHAT, False)):
        theirs.chat_template = template
        found = Reader(ours, theirs, {ours.eos_token_id}, now)(prompt, response, "bad")
        assert (list(found) == [*tokens, *response]) is same
    answered = [*turns, {"role": "assistant", "content": "bad"}]
    asked = bare(theirs, render(theirs, answered, answer=False, now=now))
    assert list(found) == asked
