"""`puzzle bench switch` on two gloo processes: what it writes adds up; what it refuses."""

import json
from pathlib import Path

import pytest

from puzzle.cli import main

TINY = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def test_three_strategies_and_the_floor(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    given = ["bench", "switch", "--pairs", "1,2,1:2,1,1", "2,1,1:1,1,2", "--model", str(tmp_path)]
    options = ["--device", "cpu", "--dtype", "fp32", "--repeats", "1", "--rate-bytes", "100000"]
    assert main([*given, *options, "--out", str(tmp_path / "rows")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["way"] for row in rows] == ["planned", "fixed-order", "gather-all", "planned, peer"] * 2
    for row in rows:
        assert row["equal"]
        assert row["copy_bytes_per_second"] > 0
        assert row["bytes"] >= row["lower_bound_bytes"]
        # Both directions carry alike here: a rank receives half of what all receive.
        assert row["floor_seconds"] == pytest.approx(row["bytes"] / 2 / row["link_bytes_per_second"], rel=0.2)
        assert row["least_floor_seconds"] <= row["floor_seconds"]
        assert min(row["kept_seconds"], row["fresh_seconds"]) > 0


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (["1,2,1:4,1,1"], "layouts of [2, 4] processes; give layouts of one size"),
        (["1,1,1:1,1,1"], "bench switch needs layouts of at least 2 processes"),
        (["1,2,1"], "write two layouts as 1,4,1:2,2,1"),
    ],
)
def test_errors_in_one_line(pairs: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "switch", "--device", "cpu", "--rate-bytes", "1000", "--pairs", *pairs]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
