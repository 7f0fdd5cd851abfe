"""`puzzle plan switch`: the paper's example, JSON beside pictures, and errors in one line."""

import json
from pathlib import Path

import pytest

from puzzle.cli import main
from tests.bench.test_switch import TINY

PAPER = ["plan", "switch", "--from", "2,8,1", "--to", "4,4,1", "--model", "13b", "--gpus-per-node", "8"]


def test_roles_by_similarity_keep_half(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PAPER, "--json", "--out", str(tmp_path / "drawn")]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["local_share"] == pytest.approx(0.5, abs=0.001)
    # By hand: stage p of 2,8,1 on ranks 2p, 2p+1; by rank order only every fourth has a quarter in common.
    assert numbers["fixed_order_bytes"] == pytest.approx(0.75 * numbers["needed_bytes"], rel=0.01)
    assert numbers["bytes_received"] == numbers["lower_bound_bytes"]
    assert sum(pair["bytes"] for pair in numbers["pairs"]) == numbers["bytes_received"]
    assert [row["rank"] for row in numbers["ranks"]] == list(range(16))
    assert sorted(file.name for file in (tmp_path / "drawn").iterdir()) == [
        "switch.json",
        "switch.pdf",
        "switch.png",
    ]
    assert json.loads((tmp_path / "drawn" / "switch.json").read_text()) == numbers


def test_out_of_zero_shards(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", "switch", "--from", "1,1,2", "--to", "2,1,1", "--model", "7b", "--zero"]
    assert main(given) == 0
    rows = [line.split()[-5:] for line in capsys.readouterr().out.splitlines()[-3:]]
    # By hand: half of 6.738e9 parameters of 2 bytes at 350 GB/s.
    assert rows[0] == ["6.738", "GB", "19.25", "0.000", "GB"]
    assert rows[1] == rows[2] == ["0.000", "GB", "0.00", "6.738", "GB"]
    assert main([*given, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    # Of 65 norms of 4096, each of two ranks has half.
    assert numbers["bytes_received"] == 65 * 4096 * 2
    assert numbers["gather_bytes"] == 6738415616 * 2


def test_table_and_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "num_hidden_layers": 4}))
    given = ["plan", "switch", "--from", "1,4,1", "--to", "1,1,4", "--model", str(tmp_path)]
    assert main([*given, "--out", str(tmp_path / "drawn")]) == 0
    text = capsys.readouterr().out
    assert "switch 1,4,1 -> 1,1,4 (planned)" in text
    assert "roles              proven best" in text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"--from": "2,8"}, "write tp,pp,dp, three whole numbers such as 2,8,1"),
        ({"--to": "3,4,1"}, "layout.tp=3 does not divide 40 query heads; use one of 1, 2, 4, 8"),
        ({"--to": "1,64,1"}, "layout.pp=64 is more than the model's 40 layers"),
        ({"--model": "14b"}, "no published model size '14b'"),
        ({"--gpus-per-node": "0"}, "--gpus-per-node: '0': give a whole number, at least 1"),
        ({"--from": "1,1,10000"}, "10000 processes; at most 1024 are planned for"),
        ({"--to": "9" * 5000 + ",1,1"}, "write tp,pp,dp, three whole numbers"),
        ({"--to": "\u00b2,1,1"}, "write tp,pp,dp, three whole numbers"),
        ({"--inter-gbs": "nan"}, "give a finite number above 0"),
        ({"--staging-bytes": "9" * 30}, "give a whole number, from 1 to 9223372036854775807"),
    ],
)
def test_errors_in_one_line(changed: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = dict(zip(PAPER[2::2], PAPER[3::2], strict=True)) | changed
    assert main(["plan", "switch", *(word for pair in options.items() for word in pair)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_too_little_staging_says_how_much(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PAPER, "--strategy", "gather-all", "--staging-bytes", "1000000"]) == 2
    assert "needs 327680000 bytes of staging for the whole of embed" in capsys.readouterr().err


def test_shares_are_bounded_here_and_where_a_run_is_resolved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same words, but for the option; one process fewer is planned for."""
    shape = "vocab_size: 64, hidden_size: 64, intermediate_size: 64, num_hidden_layers: 1"
    init = f"{{init: {{{shape}, num_attention_heads: 32, max_position_embeddings: 64}}}}"
    (tmp_path / "run.yaml").write_text(
        f"actor: {init}\nreward: {init}\nbatch: 1024\nalgorithm: {{minibatch: 1024}}\n"
        "data: {random_tokens: 4}\ngeneration: {max_new_tokens: 4}\nswitch: {source: zero_shards}\n"
    )
    run = ["train", "--config", str(tmp_path / "run.yaml"), "--dry-run"]
    layouts = ["--layout.dp", "256", "--generation.layout.tp", "32", "--generation.layout.dp", "8"]
    assert main([*run, *layouts]) == 2
    ours = capsys.readouterr().err
    assert main(["plan", "switch", "--model", "7b", "--zero", "--from", "1,1,256", "--to", "32,1,8"]) == 2
    theirs = capsys.readouterr().err
    limit = "256 replicas to 256 processes; replicas x processes are at most 8192, since all get rows of each"
    assert (ours, theirs) == (f"error: switch.source: zero_shards: {limit}\n", f"error: --zero: {limit}\n")
    layouts = ["--layout.dp", "64", "--generation.layout.tp", "32", "--generation.layout.dp", "2"]
    assert main([*run, *layouts]) == 0
