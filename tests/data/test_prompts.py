import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle.config.run import DataConfig
from puzzle.data.prompts import (
    Prompt,
    PromptSet,
    PromptStream,
    RandomStream,
    load_prompts,
    random_prompts,
    read_rows,
)
from puzzle.data.records import EmptyRow
from puzzle.data.tokenizers import byte_tokenizer
from puzzle.errors import UserError

TEXTS = ["The soup was", "Ünïcode 漢字 🙂", "A third one"]


def data(**changes) -> DataConfig:
    return DataConfig(prompts="unused", **changes)


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.fixture(params=["jsonl", "parquet", "txt", "dataset"])
def prompts_file(request, tmp_path):
    path = tmp_path / f"prompts.{request.param}"
    records = [{"prompt": text, "other": 1} for text in TEXTS]
    if request.param == "jsonl":
        return write_jsonl(path, records)
    if request.param == "txt":
        path.write_text("\n\n".join(TEXTS), encoding="utf-8")
        return path
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(records)
    if request.param == "parquet":
        table.to_parquet(path)
    else:
        table.save_to_disk(path)
    return path


def test_every_format_gives_the_same_prompts(prompts_file):
    loaded = load_prompts(prompts_file, data(), byte_tokenizer())
    assert [p.text for p in loaded.prompts] == TEXTS
    assert [p.index for p in loaded.prompts] == [0, 1, 2]
    assert [len(p.tokens) for p in loaded.prompts] == [len(t.encode()) for t in TEXTS]


BAD_LINES = [
    (b'{"prompt": "fine"}\n\n{"prompt": \n', ":3: not valid JSON"),
    (b'{"prompt": "fine"}\n["prompt"]\n', ":2: expected a JSON object, found list"),
    (b'{"text": "x"}\n', ":1: no field 'prompt'; it has text"),
    (b'{"prompt": "  "}\n', ":1: the prompt is empty"),
    (b'{"prompt": "fine"}\n{"prompt": "half \\ud83d"}\n', r":2: '\ud83d' at character 6 is no character"),
    (
        b'{"prompt": [{"role": "user", "content": "\\udc00"}]}\n',
        r":1: '\udc00' at character 1 is no character",
    ),
    (b'{"prompt": ' + b"[" * 100_000, ":1: not valid JSON: nested too deeply"),
    (b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}\n", ":1: not valid JSON: an integer of 5000 digits"),
    (b'{"prompt": 5}\n', ":1: prompt must be text or turns"),
    (b'{"prompt": [{"role": "user"}]}\n', ":1: prompt must be text or turns"),
    (b'{"prompt": [{"role": "user", "content": "x"}, {"role": "user"}]}\n', ":1: prompt must be text or"),
    (b'{"prompt": [{"role": "user", "content": "x"}, {"content": "x"}]}\n', ":1: prompt must be text or"),
    (b'{"prompt": [{"role": "user", "content": "x"}, "x"]}\n', ":1: prompt must be text or turns"),
    (b'{"prompt": [{"role": "user", "content": 5}]}\n', ":1: prompt must be text or turns"),
    (b'{"prompt": []}\n', ":1: the prompt is empty"),
    (b'{"prompt": {"role": "user", "content": "x"}}\n', ":1: prompt must be text or turns"),
    (b'{"prompt": [{"role": "user", "content": "x"}]}\n', ":1: prompt is a chat; set data.chat_template"),
    (b'{"prompt": "fine"}\n{"prompt": "\xff"}\n', ":2: not UTF-8 text"),
    (b"\n \n", ": holds no prompts"),
    (b'{"prompt": "123456789"}\n', ":1: the prompt has 9 tokens, data.max_prompt_tokens is 8"),
    ('{"prompt": "fine"}\n'.encode("utf-16"), ": is UTF-16 text; save it as UTF-8"),
    ('{"prompt": "fine"}\n'.encode("utf-16-le"), ":1: holds a NUL character; save it as UTF-8"),
    (b'{"prompt": ' + b"[" * 100_000 + b"\n", ":1: not valid JSON"),
    (b'{"prompt": ' + b"9" * 5000 + b"}\n", ":1: not valid JSON"),
]


@pytest.mark.parametrize(("content", "words"), BAD_LINES)
def test_bad_lines_are_named(tmp_path, content, words):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_prompts(path, data(max_prompt_tokens=8), byte_tokenizer())
    assert str(raised.value).startswith(f"{path}{words}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marks_and_line_ends_are_no_part_of_a_prompt(tmp_path, mark, end):
    """A separator that texts may hold is."""
    texts = ["one\u2028", "two", "three\x0b"]
    files = {
        "p.txt": mark + end.join([texts[0], "", *texts[1:]]) + end,
        "p.jsonl": mark + end.join(json.dumps({"prompt": text}) for text in texts),
        "p.json": mark + end + json.dumps([{"prompt": text} for text in texts], indent=1).replace("\n", end),
        "lines.json": mark + end.join(json.dumps({"prompt": text}) for text in texts),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode())
        assert [row.value for row in read_rows(tmp_path / name, "prompt", None)] == texts, name


def test_rows_of_an_array_are_named(tmp_path):
    path = tmp_path / "p.json"
    for content, words in [
        ('[{"prompt": "a"}, {"text": "b"}]', " row 1: no field 'prompt'; it has text"),
        ('[{"prompt": "a"},\n "b"]', " row 1: expected a JSON object, found str"),
        ('[{"prompt": "a"},', ": not valid JSON"),
        ("[]", ": holds no prompts"),
        ('{"prompt":\n "a"}', ":1: not valid JSON"),
    ]:
        path.write_text(content)
        with pytest.raises(UserError) as raised:
            read_rows(path, "prompt", None)
        assert str(raised.value).startswith(f"{path}{words}")


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def chat(tmp_path, turns, template=CHAT, **changes):
    """The rendered text of one chat, whose turns are pairs of role and content."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    listed = [{"role": role, "content": content} for role, content in turns]
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": listed}])
    (prompt,) = load_prompts(path, data(chat_template=True, **changes), tokenizer).prompts
    return str(tokenizer.decode(list(prompt.tokens)))


def test_the_system_turn_is_before_every_chat_without_one(tmp_path):
    asked = [("user", "hi"), ("assistant", "yes"), ("user", "so")]
    assert chat(tmp_path, asked) == "<user>hi<assistant>yes<user>so<assistant>"
    whole = "<system>be<user>hi<assistant>yes<user>so<assistant>"
    assert chat(tmp_path, asked, system="be") == whole
    assert chat(tmp_path, [("system", "be"), *asked], system="else") == whole


@pytest.mark.parametrize(
    ("turns", "template", "words"),
    [
        ([("user", "hi"), ("assistant", "yes")], CHAT, "ends with the assistant's turn"),
        ([("user", " ")], CHAT, "turn 1, the user's, is empty"),
        (
            [("human", "hi")],
            CHAT.replace(
                "<{{ m.role }}>{{ m.content }}", "{% if m.role == 'user' %}{{ m.content }}{% endif %}"
            ),
            "leaves turn 1 out, of role 'human'",
        ),
        ([("user", "a\ud83d")], CHAT, "at character 2 is no character"),
    ],
)
def test_chats_that_cannot_be_answered_are_named(tmp_path, turns, template, words):
    with pytest.raises(UserError, match=words) as raised:
        chat(tmp_path, turns, template)
    assert str(raised.value).startswith(f"{tmp_path / 'p.jsonl'}:1: ")


def test_bad_files_are_named(tmp_path):
    (tmp_path / "p.parquet").write_bytes(b"no parquet")
    (tmp_path / "p.csv").write_text("a,b")
    (tmp_path / "folder").mkdir()
    (tmp_path / "splits/train").mkdir(parents=True)
    (tmp_path / "splits/dataset_dict.json").write_text('{"splits": ["train"]}')
    for name, words in [
        ("absent.jsonl", "no such file"),
        ("p.parquet", "not a readable parquet file"),
        ("p.csv", "must be .jsonl, .parquet, .txt"),
        ("folder", "not a saved Hugging Face dataset"),
        ("splits", "name one of its folders: train"),
    ]:
        with pytest.raises(UserError, match=words):
            read_rows(tmp_path / name, "prompt", None)


def test_long_prompts_are_dropped_and_indices_stay(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "x" * 9}, {"prompt": "short"}, {"prompt": "ok"}])
    loaded = load_prompts(path, data(max_prompt_tokens=8, too_long="drop"), byte_tokenizer())
    assert loaded.left.long == (f"{path}:1",)
    assert [(p.index, p.id, p.text) for p in loaded.prompts] == [(1, "1", "short"), (2, "2", "ok")]
    with pytest.raises(UserError, match="all 3 prompts exceed"):
        load_prompts(path, data(max_prompt_tokens=1, too_long="drop"), byte_tokenizer())


@pytest.mark.parametrize("nothing", ["", " \n", None, []])
def test_empty_prompts_are_dropped_where_that_is_said(tmp_path, nothing):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": nothing}, {"prompt": "b" * 9}])
    loaded = load_prompts(path, data(empty="drop", too_long="drop", max_prompt_tokens=8), byte_tokenizer())
    assert [prompt.index for prompt in loaded.prompts] == [0]
    assert loaded.remarks == [
        f"1 of 3 prompts are longer than data.max_prompt_tokens and are left out, the first is {path}:3",
        f"1 of 3 prompts are empty in part or whole and are left out, the first is {path}:2",
    ]
    with pytest.raises(EmptyRow, match=r":2: the prompt is empty$"):
        load_prompts(path, data(), byte_tokenizer())


def test_chats_with_an_empty_turn_of_the_user_are_dropped_where_that_is_said(tmp_path):
    turns = [[{"role": "user", "content": text}] for text in ("hi", " ")]
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": one} for one in turns])
    own = byte_tokenizer()
    own.chat_template = CHAT
    assert len(load_prompts(path, data(empty="drop", chat_template=True), own).prompts) == 1
    with pytest.raises(EmptyRow, match=r":2: turn 1, the user's, is empty$"):
        load_prompts(path, data(chat_template=True), own)


def test_ids_come_from_a_field_and_differ(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "key": 7}, {"prompt": "b", "key": 8}])
    loaded = load_prompts(path, data(id_field="key"), byte_tokenizer())
    assert [p.id for p in loaded.prompts] == ["7", "8"]
    write_jsonl(path, [{"prompt": "a", "key": 7}, {"prompt": "b", "key": None}])
    with pytest.raises(UserError, match=r":2: key is null"):
        load_prompts(path, data(id_field="key"), byte_tokenizer())
    write_jsonl(path, [{"prompt": "a", "key": 7}, {"prompt": "b", "key": 7}])
    with pytest.raises(UserError, match=r":2: key '7' is taken by .*:1"):
        load_prompts(path, data(id_field="key"), byte_tokenizer())


def make_set(count: int) -> PromptSet:
    return PromptSet(tuple(Prompt(i, str(i), f"t{i}", None, (i,)) for i in range(count)))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**40), st.booleans())
def test_stream_deals_each_epoch_once_and_resumes(count, batch, seed, shuffle):
    prompts = make_set(count)
    if batch > count:
        with pytest.raises(UserError, match=f"only {count} prompts"):
            PromptStream(prompts, batch, seed, shuffle)
        return
    stream = PromptStream(prompts, batch, seed, shuffle)
    per_epoch = count // batch
    for epoch in range(3):
        assert stream.epoch == epoch
        dealt = [p.index for _ in range(per_epoch) for p in stream.next()]
        assert len(dealt) == len(set(dealt)) == per_epoch * batch
        if not shuffle:
            assert dealt == list(range(per_epoch * batch))
    resumed = PromptStream(prompts, batch, seed, shuffle)
    resumed.restore(json.loads(json.dumps(stream.state())))
    assert resumed.next() == stream.next()


@pytest.mark.parametrize("seed", [0, 7])
def test_the_order_of_an_epoch_is_numpy_s_of_seed_and_epoch(seed):
    stream = PromptStream(make_set(7), 3, seed, True)
    for epoch in range(3):
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(7)
        assert [p.index for _ in range(2) for p in stream.next()] == order[:6].tolist()


def test_orders_differ_between_epochs_and_seeds():
    def order(seed: int, epochs: int) -> list[int]:
        stream = PromptStream(make_set(64), 64, seed, True)
        return [[p.index for p in stream.next()] for _ in range(epochs)][-1]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2) != order(1, 2)


def test_state_of_other_prompts_is_refused():
    state = PromptStream(make_set(4), 2, 0, True).state()
    with pytest.raises(UserError, match="not those of the checkpoint"):
        PromptStream(make_set(5), 2, 0, True).restore(state)
    with pytest.raises(UserError, match="batch is 1 but 2"):
        PromptStream(make_set(4), 1, 0, True).restore(state)


def test_random_prompts_are_a_function_of_seed_and_index():
    few, many = (random_prompts(range(n), 200, 50, seed=9) for n in (3, 8))
    assert few.prompts == many.prompts[:3]
    assert few.prompts[0].tokens != random_prompts(range(1), 200, 50, seed=8).prompts[0].tokens
    counts = np.bincount(np.concatenate([p.tokens for p in many.prompts]), minlength=50)
    assert counts.shape == (50,)
    assert counts.min() > 0


def test_random_prompts_have_no_end_and_are_dealt_from_any_place():
    stream = RandomStream(2, 5, 50, seed=9)
    dealt = [prompt for _ in range(4) for prompt in stream.next()]
    assert tuple(dealt) == random_prompts(range(8), 5, 50, seed=9).prompts
    resumed = RandomStream(2, 5, 50, seed=9)
    resumed.restore(json.loads(json.dumps(stream.state())))
    assert tuple(resumed.next()) == random_prompts(range(8, 10), 5, 50, seed=9).prompts
    for others, said in (
        (RandomStream(2, 6, 50, seed=9), "not those of the checkpoint; give data.random_tokens"),
        (RandomStream(2, 5, 60, seed=9), "not those of the checkpoint; give data.random_tokens"),
        (RandomStream(2, 5, 50, seed=8), "^seed is 8 but 9 in the checkpoint"),
        (RandomStream(3, 5, 50, seed=9), "^batch is 3 but 2 in the checkpoint"),
    ):
        with pytest.raises(UserError, match=said):
            others.restore(stream.state())


def test_a_checkpoint_of_a_version_that_dealt_other_random_prompts_is_told_from_other_settings():
    """Once they were made ahead for all iterations and shuffled; the settings are the same."""
    earlier = PromptStream(random_prompts(range(6), 5, 50, seed=9), 2, 9, True)
    with pytest.raises(UserError, match=r"if they are, an earlier version.* new run in another folder"):
        RandomStream(2, 5, 50, seed=9).restore(earlier.state())


TABLE = [
    {"prompt": "a", "answer": 1, "meta": {"of": ["x", None]}, "large": "y" * 99},
    {"prompt": "b", "answer": None, "meta": {"of": []}, "large": "z" * 99},
]


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.parquet", "folder"])
def test_chosen_columns_travel_with_their_prompts(tmp_path, name):
    """From every format, as the file has them; what nobody chose is not kept."""
    path, asked = tmp_path / name, []
    if name == "folder":
        pytest.importorskip("datasets").Dataset.from_list(TABLE).save_to_disk(path)
    elif name == "p.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(TABLE), path)
    else:
        path.write_text(json.dumps(TABLE) if name == "p.json" else "\n".join(map(json.dumps, TABLE)))

    def choose(names, source):
        asked.append((list(names), source))
        return ["meta", "answer"]

    prompts = load_prompts(path, data(), byte_tokenizer(), choose=choose).prompts
    assert [dict(prompt.columns) for prompt in prompts] == [
        {"meta": row["meta"], "answer": row["answer"]} for row in TABLE
    ]
    assert asked == [(["prompt", "answer", "meta", "large"], str(path))]
    assert [dict(prompt.columns) for prompt in load_prompts(path, data(), byte_tokenizer()).prompts] == [
        {},
        {},
    ]


def test_a_parquet_file_is_read_by_its_columns(tmp_path, monkeypatch):
    """Whatever else is in it takes no memory."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(TABLE * 3), tmp_path / "p.parquet")
    read, real = [], parquet.ParquetFile.iter_batches

    def batches(self, *args, **kwargs):
        read.append(kwargs["columns"])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", batches)
    rows = read_rows(tmp_path / "p.parquet", "prompt", None, lambda _names, _source: ["answer"])
    assert [row.columns for row in rows] == [{"answer": 1}, {"answer": None}] * 3
    assert [row.place for row in rows][-1].endswith("p.parquet row 5")
    assert read == [["prompt", "answer"]]
    with pytest.raises(
        UserError, match=r"p\.parquet row 0: no field 'text'; it has prompt, answer, meta, large"
    ):
        read_rows(tmp_path / "p.parquet", "text", None)
