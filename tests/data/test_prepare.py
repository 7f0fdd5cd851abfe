import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.utils import chat_template_utils

from puzzle.config.run import TrainConfig
from puzzle.config.supervised import SFTConfig
from puzzle.data.prepare import prepare, prepare_examples
from puzzle.data.prompts import random_prompts
from puzzle.data.tokenizers import byte_tokenizer, encode
from puzzle.errors import UserError
from tests.data.templates import CHATML, tokenizer


def config(data: dict, **changes) -> TrainConfig:
    shape = {"vocab_size": 258, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    init = {**shape, "num_attention_heads": 1}
    return TrainConfig.model_validate(
        {
            "actor": {"init": init},
            "reward": {"init": init},
            "data": data,
            "batch": 2,
            "iterations": 3,
            **changes,
        }
    )


@pytest.fixture
def files(tmp_path):
    for name in ("train", "held"):
        lines = [json.dumps({"prompt": f"{name} {i}"}) for i in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return {"prompts": str(tmp_path / "train.jsonl"), "eval_prompts": str(tmp_path / "held.jsonl")}


def test_texts(files):
    data = prepare(config({**files, "tokenizer": "bytes"}), 258)
    assert data.endings.stop_ids == (256,)
    assert {p.text.split()[0] for p in data.train.next()} == {"train"}
    assert data.held_out is not None
    assert [p.text for p in data.held_out.prompts] == [f"held {i}" for i in range(5)]


def test_random_tokens_never_repeat_within_a_run():
    data = prepare(config({"random_tokens": 6}), 258)
    dealt = [p for _ in range(3) for p in data.train.next()]
    assert len({p.tokens for p in dealt}) == 6
    assert data.tokenizer is None


def test_tokens_outside_the_vocabulary(files):
    with pytest.raises(UserError, match=r"gives token .*, the actor's vocabulary has 60"):
        prepare(config({**files, "tokenizer": "bytes"}), 60)


def test_the_tokenizer_of_a_folder(files, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "folder")
    (tmp_path / "folder/generation_config.json").write_text('{"eos_token_id": [7]}')
    folder = str(tmp_path / "folder")
    from_folder = config(
        files, actor={"model": folder}, critic={"init": config({"random_tokens": 1}).actor.init}
    )
    assert prepare(from_folder, 258).endings.stop_ids == (7,)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("random", [True, False])
def test_seed_and_order_are_the_configuration_s(files, random, shuffle):
    """Of prompts from a file; random ones, whose tokens the seed makes, come as they are made."""
    given = {"random_tokens": 6} if random else {**files, "tokenizer": "bytes"}
    data = prepare(config({**given, "shuffle": shuffle}, seed=5), 258)
    if random:
        dealt = [prompt for _ in range(4) for prompt in data.train.next()]
        assert tuple(dealt) == random_prompts(range(8), 6, 258, 5).prompts
        return
    count = len(data.train.prompts.prompts)
    assert count == 5
    order = np.random.Generator(np.random.Philox(key=[5, 0])).permutation(count) if shuffle else range(count)
    dealt = [prompt.index for _ in range(2) for prompt in data.train.next()]
    assert dealt == list(order)[:4]


def test_a_reward_model_reads_ids_or_text(files, tmp_path):
    """No reader where its tokenizer is the actor's and its template says nothing else."""
    for name, template in (("plain", None), ("same", "{{ messages }}"), ("other", "{{ messages }}!")):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "bos").mkdir()
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.save_pretrained(tmp_path / "bos")
    for actor, reward, reads in (
        ("plain", "plain", False),
        ("same", "plain", False),
        ("same", "same", False),
        ("same", "other", True),
        ("plain", "other", True),
        ("plain", "bos", True),
        ("bos", "plain", True),
        ("bos", "bos", False),
    ):
        asked = config(
            {**files, "tokenizer": str(tmp_path / actor)}, reward={"model": str(tmp_path / reward)}
        )
        assert (prepare(asked, 300).reader is not None) is reads, (actor, reward)


DATED = (
    "{{ strftime_now('%d %B %Y %H:%M:%S') }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Clock:
    """A clock that goes a day further whenever it is looked at."""

    def __init__(self) -> None:
        self.day = datetime(2031, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        self.day += timedelta(days=1)
        return self.day


def test_prompts_and_scoring_write_the_date_of_the_run_s_start(files, tmp_path, monkeypatch):
    """However late it is when a template is rendered: the actor's, the reward model's, after a resume."""
    monkeypatch.setattr(chat_template_utils, "datetime", Clock())
    for name, template in (("actor", DATED), ("reward", DATED.replace("[", "("))):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
    data = {**files, "tokenizer": str(tmp_path / "actor"), "chat_template": True}
    asked = config(data, reward={"model": str(tmp_path / "reward")})
    spoken, began = byte_tokenizer(), datetime(2024, 2, 3, 4, 5, 6, tzinfo=UTC)
    for _ in range(2):  # the second is what a resumed run does
        made = prepare(asked, 300, began)
        prompt = made.train.prompts.prompts[1]
        assert made.reader is not None
        assert spoken.decode(list(prompt.tokens)) == "03 February 2024 04:05:06[user] train 1[assistant]"
        assert prompt.lead == " "
        read = made.reader(prompt, encode(spoken, " yes"), "yes")
        assert spoken.decode(list(read)) == "03 February 2024 04:05:06(user] train 1(assistant] yes"


def supervised(folder: Path, template: str, rows: list[Any], held_out: list[Any]) -> SFTConfig:
    """With a tokenizer of that template, rows that are chats or pairs of texts."""
    tokenizer(template, marked=True).save_pretrained(folder / "tokenizer")
    for name, listed in (("rows", rows), ("held", held_out)):
        said = [{"messages": row} if isinstance(row, list) else row for row in listed]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    init = {**config({"random_tokens": 1}).actor.model_dump(exclude_unset=True)["init"], "vocab_size": 330}
    data = {"examples": str(folder / "rows.jsonl"), "tokenizer": str(folder / "tokenizer")}
    data |= {"eval_examples": str(folder / "held.jsonl")} if held_out else {}
    chat = isinstance(rows[0], list)
    return SFTConfig.model_validate(
        {"actor": {"init": init}, "batch": 1, "data": {**data, "chat_template": chat, "shuffle": False}}
    )


def text(said: str) -> dict[str, str]:
    return {"prompt": "a", "response": said}


@pytest.mark.parametrize(
    ("rows", "held_out"),
    [(["b", "the cat"], []), (["the cat", "b"], []), (["b"], ["the cat"]), (["the cat"], ["b"])],
)
def test_no_token_of_any_example_is_outside_the_vocabulary(tmp_path, rows, held_out):
    own: Any = tokenizer(CHATML, marked=True)
    largest = max(own("athe cat")["input_ids"])
    assert largest > max(own("ab")["input_ids"]) + 1
    made = supervised(tmp_path, CHATML, [*map(text, rows)], [*map(text, held_out)])
    read = prepare_examples(made, largest + 1)
    assert [example.index for example in (read.train.next() + read.train.next())[: len(rows)]] == [
        *range(len(rows))
    ]
    assert (read.held_out is None) == (not held_out)
    with pytest.raises(UserError, match=f"gives token {largest}, the model's vocabulary has {largest}$"):
        prepare_examples(made, largest)


ANSWERS = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"}]
OPEN = CHATML.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
TWO = CHATML.replace(
    "<|im_end|>{% endgeneration %}", "{{ '<|eot|>' if loop.last else '<|im_end|>' }}{% endgeneration %}"
)


@pytest.mark.parametrize(
    ("template", "rows", "ends"),
    [
        (CHATML, [ANSWERS, ANSWERS * 2], ["</s>", "<|im_end|>"]),
        (OPEN, [ANSWERS], ["</s>"]),  # the last that is learned is a word
        (TWO, [ANSWERS * 2], ["</s>"]),  # one of two
        (TWO, [ANSWERS], ["</s>", "<|eot|>"]),
        (CHATML, [text("cat")], ["</s>"]),
    ],
)
def test_the_special_token_that_ends_all_that_is_learned_ends_answers(tmp_path, template, rows, ends):
    own: Any = tokenizer(template, marked=True)
    read = prepare_examples(supervised(tmp_path, template, rows, []), 330)
    assert read.endings.eos == tuple(sorted(own.convert_tokens_to_ids(ends)))


def test_what_supervised_runs_leave_out_is_said_of_each_file(tmp_path):
    long, short = text("the cat sat on the mat, and sat, and sat"), text("b")
    made = supervised(tmp_path, CHATML, [long, short, long], [short, long])
    data = made.data.model_copy(update={"max_tokens": 6, "too_long": "drop"})
    read = prepare_examples(made.model_copy(update={"data": data}), 330)
    words = " examples are longer than data.max_tokens and are left out, the first is "
    told = [remark.partition(words) for remark in read.remarks]
    assert [count for count, _, _ in told] == ["2 of 3", "1 of 2"]
    assert [Path(place).name for _, _, place in told] == ["rows.jsonl:1", "held.jsonl:2"]
    assert prepare_examples(supervised(tmp_path, CHATML, [short], [short]), 330).remarks == ()
