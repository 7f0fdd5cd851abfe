import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from transformers.utils import chat_template_utils

from puzzle.config.run import TrainConfig
from puzzle.data.prepare import prepare
from puzzle.data.prompts import random_prompts
from puzzle.data.tokenizers import byte_tokenizer, encode
from puzzle.errors import UserError


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
