"""`puzzle bench numerics` in Triton's interpreter, which knows shapes and numbers, not speed."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("this host has a GPU: the bench itself runs there", allow_module_level=True)

from puzzle.bench import harness, numerics
from puzzle.bench.numerics import NumericsBench
from puzzle.engine.runtime.world import World
from puzzle.model.kernels import invariant_attention_grads as grads
from puzzle.spec.model import ModelSpec

SIZES = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> NumericsBench:
    """Of a model that an interpreter can do, with few tiles, each run once."""
    spec = replace(ModelSpec.from_hf({"model_type": "llama", **SIZES, **HEADS}), head_dim=16)
    monkeypatch.setattr(numerics, "has_kernels", lambda device: True)
    monkeypatch.setattr(NumericsBench, "spec", spec)
    monkeypatch.setitem(harness.DTYPES, "bf16", torch.float16)  # the interpreter has no bf16
    monkeypatch.setattr(numerics, "timed", lambda world, work, repeats: (work(), 1.0)[1])
    monkeypatch.setattr(numerics, "TOGETHER", 1)
    monkeypatch.setattr(numerics, "DECODED", 2)
    monkeypatch.setattr(numerics, "FORWARD", ((128, 64, 8, 1),))
    monkeypatch.setattr(numerics, "BACKWARD", ((128, 64, 8, 1),))
    monkeypatch.setattr(numerics, "PRODUCTS", ((64, 64, 64, 4, 3), (64, 32, 64, 4, 3, 1, True)))
    monkeypatch.setattr(numerics, "DECODE", ((64, 64, 8, 1),))
    monkeypatch.setattr(numerics, "FEW", ((64, 64, 64, 4, 3),))
    return NumericsBench(rows=1, length=140, repeats=1)


def test_every_tile_is_timed_beside_fast_ones(bench: NumericsBench) -> None:
    with World.start("cpu") as world:
        rows = list(bench.measure(world))
    assert not [row for row in rows if "failed" in row]
    kernels = {row["kernel"] for row in rows if row["tile"] != "fast"}
    layer = {f"{name}, {what}" for name in ("qkv", "attention_out", "gate_up", "down") for what in PASSES}
    assert kernels >= layer
    for kernel in layer:
        assert len([row for row in rows if row["kernel"] == kernel]) == 4
    for kernel in ("attention, gradients of keys", "attention, decode"):
        assert len([row for row in rows if row["kernel"] == kernel]) == 2
    assert len([row for row in rows if row["kernel"] == "down, decode"]) == 3
    assert all("TFLOP/s" in bench.line(row) or "GB/s" in bench.line(row) for row in rows)


PASSES = ("forward", "inputs", "weights")


def test_other_bits_and_failures_are_told(bench: NumericsBench, monkeypatch: pytest.MonkeyPatch) -> None:
    right = grads.of_keys

    def wrong(*given: object, tile: grads.Tile) -> object:
        found = right(*given, tile=tile)  # ty: ignore[invalid-argument-type]
        if tile.warps == 8:
            found[1][0, 0, 0] += 1
        if tile.keys == 32:
            raise RuntimeError("out of resources")
        return found

    monkeypatch.setattr(grads, "of_keys", wrong)
    monkeypatch.setattr(grads, "KEY_TILES", (grads.Tile(64, 64, 4, 1),))
    monkeypatch.setattr(numerics, "BACKWARD", ((128, 64, 8, 1), (32, 32, 4, 1)))
    with World.start("cpu") as world:
        rows = list(replace(bench, what=("attention",), length=20).measure(world))
    keys = [row for row in rows if row["kernel"] == "attention, gradients of keys"]
    assert [row.get("same") for row in keys] == [True, False, None]
    said = [bench.line(row) for row in keys]
    assert said[0].endswith("the same bits")
    assert said[1].endswith("OTHER BITS")
    assert said[2].endswith("RuntimeError: out of resources")
