"""Names on the Hugging Face Hub, from a hub on loopback: fetched once, pinned, and read without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from puzzle.data.hub import Name
from puzzle.rlhf.provenance import _name
from tests.data.fake_hub import Hub, serving
from tests.rlhf.one_process import configured

load_from_disk: Any = pytest.importorskip("datasets").load_from_disk
ROOT = Path(__file__).resolve().parents[2]
OPTIONS = [
    *("--actor.model", "some-org/tiny-model", "--data.prompts", "some-org/asked:test"),
    *("--data.tokenizer", "bytes", "--reward.function", "puzzle.rlhf.rewards:letter_share"),
    *("--iterations", "1", "--batch", "2", "--generation.max_new_tokens", "4", "--log.plots", "false"),
    *("--data.max_prompt_tokens", "16"),
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("hub")
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(root / "models/some-org/tiny-model")
    (root / "models/some-org/tiny-model/pytorch_model.bin").write_bytes(b"no weights that are read")
    asked = root / "datasets/some-org/asked"
    asked.mkdir(parents=True)
    (asked / "train.jsonl").write_text('{"prompt": "to train"}\n')
    (asked / "test.jsonl").write_text('{"prompt": "first"}\n{"prompt": "second"}\n')
    with serving(root) as served:
        yield served


def python(hub: Hub | None, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Python with an empty home of the Hub's libraries in `home`; without a hub there is no network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    told = {"HF_HUB_OFFLINE": "1"} if hub is None else {"HF_ENDPOINT": hub.address}
    environment = {**kept, "HF_HOME": str(home / "home"), "PYTHONPATH": str(ROOT), "CI": "1", **told}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=120)


COMMANDS = """
import sys, json
from pathlib import Path
from puzzle.cli import main
for words in json.loads(sys.argv[1]):
    code = main(words)
    print(words[0], len(list(Path("home").rglob("*.safetensors"))), flush=True)
    if code:
        sys.exit(code)
"""
FETCHES = """
import sys, json
from puzzle.data.hub import Name, fetch
from puzzle.errors import UserError
for text, kind in json.loads(sys.argv[1]):
    try:
        print("found", *fetch("some.key", Name.of(text, kind), kind))
    except UserError as error:
        print(error)
"""


def test_a_run_reads_names_and_goes_on_from_what_it_read(hub: Hub, tmp_path: Path) -> None:
    """Weights are fetched by the run and not by a dry run; the log has the revisions; after that the run goes
    on without a network. Where there is one again, what was pinned is read, not what the Hub has by then."""
    train = ["train", *OPTIONS]
    commands = json.dumps([[*train, "--dry-run"], [*train, "--out", "out"]])
    done = python(hub, tmp_path, "-c", COMMANDS, commands)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("train ")] == ["train 0", "train 1"]
    header = json.loads((tmp_path / "out/run.jsonl").read_text().splitlines()[0])
    names = ("models/some-org/tiny-model", "datasets/some-org/asked")
    revisions = [hub.revision(hub.root / name) for name in names]
    assert header["actor"] == "tiny-model"
    assert header["given"]["actor"]["model"] == f"some-org/tiny-model@{revisions[0]}"
    pinned = f"some-org/asked@{revisions[1]}:test"
    assert header["given"]["data"]["prompts"] == pinned
    folder = Path(header["config"]["actor"]["model"])
    assert (folder.name, (folder / "pytorch_model.bin").exists()) == (revisions[0], False)
    more = json.dumps([["train", "--resume", "--out", "out", "--iterations", "2"]])
    again = python(None, tmp_path, "-c", COMMANDS, more)
    assert again.returncode == 0, again.stderr
    samples = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert {sample["prompt"] for sample in samples} == {"first", "second"}
    assert {sample["iteration"] for sample in samples} == {0, 1}
    prompts = hub.root / "datasets/some-org/asked/test.jsonl"
    before = prompts.read_text()
    prompts.write_text('{"prompt": "others"}\n{"prompt": "than before"}\n')
    asked = json.dumps([("some-org/asked:test", "dataset"), (pinned, "dataset")])
    try:
        found = python(hub, tmp_path, "-c", FETCHES, asked)
        now = hub.revision(hub.root / names[1])
    finally:
        prompts.write_text(before)
    newest, old = (line.split() for line in found.stdout.splitlines())
    assert newest[0] == old[0] == "found"
    assert (newest[2], old[2]) == (f"some-org/asked@{now}:test", pinned)
    texts = [load_from_disk(folder)["prompt"][0] for _, folder, _ in (newest, old)]
    assert texts == ["others", "first"]


def test_slices_are_splits(hub: Hub, tmp_path: Path) -> None:
    """As the library of the Hub reads them; a slice that it does not know is one line."""
    slices = {"test[1:]": ["second"], "test[:50%]": ["first"], "train+test[-1:]": ["to train", "second"]}
    revision = hub.revision(hub.root / "datasets/some-org/asked")
    names = [f"some-org/asked:{one}" for one in (*slices, "test[one]")]
    names[0] = f"some-org/asked@{revision}:{next(iter(slices))}"  # pinned, and the first that is ever read
    asked = json.dumps([(name, "dataset") for name in names])
    *found, wrong = python(hub, tmp_path, "-c", FETCHES, asked).stdout.splitlines()
    assert [list(load_from_disk(line.split()[1])["prompt"]) for line in found] == list(slices.values())
    assert [line.split()[2] for line in found] == [f"some-org/asked@{revision}:{one}" for one in slices]
    assert wrong.startswith("some.key: ")
    assert "test[one]" in wrong
    again = python(None, tmp_path, "-c", FETCHES, asked).stdout.splitlines()  # without a network
    assert again[:-1] == found


def test_what_cannot_be_had_is_one_line(hub: Hub, tmp_path: Path) -> None:
    """What the Hub has not, and, without a network, all that was not fetched before."""
    cases = [
        ("some-org/absent", "model", "hf download some-org/absent --local-dir absent"),
        ("some-org/tiny-model@v9", "model", "hf download some-org/tiny-model --revision v9 --local-dir"),
        ("some-org/absent:test", "dataset", "hf download some-org/absent --repo-type dataset --local-dir"),
        ("some-org/asked:nosplit", "dataset", "nosplit"),
        ("some-org/tiny-model", "model", "found"),
    ]
    asked = json.dumps([case[:2] for case in cases])
    for served in (None, hub):
        lines = python(served, tmp_path, "-c", FETCHES, asked).stdout.splitlines()
        assert len(lines) == len(cases)
        for line, (text, _, words) in zip(lines, cases, strict=True):
            if served is not None:
                assert words in line
            if served is None or words != "found":
                repo = text.split("@")[0].split(":")[0]
                assert line.startswith(f"some.key: no such folder here as {repo}, and the Hugging Face Hub")
                assert f"; fetch it where there is a network, by hf download {repo}" in line


@pytest.mark.parametrize(
    ("text", "kind", "found"),
    [
        ("a/b", "model", ("a/b", None, "")),
        ("a/b@main", "model", ("a/b", "main", "")),
        ("a/b:train", "dataset", ("a/b", None, ":train")),
        ("a/b@f00:sub:train", "dataset", ("a/b", "f00", ":sub:train")),
        ("a/b:train", "model", None),
        ("a/b:1:2:3", "dataset", None),
        ("a/b:train[:1%]", "dataset", ("a/b", None, ":train[:1%]")),
        ("a/b@v1:sub:train[1:]+test", "dataset", ("a/b", "v1", ":sub:train[1:]+test")),
        ("a/b[:1]", "dataset", None),
        ("./a/b", "model", None),
        ("/a/b", "model", None),
        ("a/b/c", "model", None),
        ("b", "model", None),
        ("here/absent", "model", None),  # a folder of this machine that lacks it
        ("here", "model", None),
    ],
)
def test_names_and_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, kind: Any, found: tuple[str, ...] | None
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    name = Name.of(text, kind)
    assert (None if name is None else (name.repo, name.revision, name.part)) == found


def test_figures_name_models_and_not_revisions() -> None:
    for folder, name in [("cache/models--an-org--its--model/snapshots/0123abcd", "its--model"), ("a/b", "b")]:
        actor = configured(actor={"model": folder, "init": None}).actor
        assert _name(actor) == name
