"""What kernels are counted as, from traces whose kernels are made up, and whose operations are real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from puzzle.bench.spent import Watch, part_of, spent, table
from puzzle.bench.texts import mean_loss, random_batches
from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.engine.pipeline.pipeline import Pipeline, PipelineInput
from puzzle.engine.runtime.world import World
from puzzle.engine.train.zero_adamw import AdamWSettings
from puzzle.model.weights import initialise
from puzzle.plan.layout import Layout, Placement
from puzzle.spec.model import ModelSpec

Events = list[dict[str, Any]]
ENGINE = "autograd::engine::evaluate_function: "


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def launched(
    kernel: str, at: float, ran: float, dur: float, number: int, tid: int = 1
) -> list[dict[str, Any]]:
    """A launch at `at` us of the host, and its kernel from `ran` us of the device on."""
    launch = event("cuda_driver", "cuLaunchKernelEx", at, 1.0, tid, correlation=number)
    return [event("kernel", kernel, ran, dur, 7, correlation=number), launch]


def test_kernels_belong_to_what_launched_them() -> None:
    events = [
        event("cpu_op", f"{ENGINE}_ColumnBackward", 0, 10, tid=2),
        *launched("_large", 3, 100, 20, 1, tid=2),
        *launched("_large", 11, 120, 5, 2, tid=2),  # after the operation has ended
        event("user_annotation", "optimizer norm", 5, 30),
        event("cpu_op", "aten::add", 6, 2),
        *launched("elementwise_kernel", 7, 140, 30, 3),
        event("cpu_op", "_TokenStats", 50, 10),
        *launched("nvjet_tst_128x256", 50, 160, 15, 4),  # beside the one before
        event("kernel", "nobody's", 180, 5, 7, correlation=99),
    ]
    found = spent(events)
    assert {part: round(seconds * 1e6) for part, seconds in found.items()} == {
        "products, backward": 20,
        "products, forward": 5,
        "gradient norm": 30,
        "log-probs, forward": 15,
        "other, forward": 5,
        "idle": 15 + 5,
    }
    assert spent([]) == {}


@pytest.mark.parametrize(
    ("kernel", "operations", "part"),
    [
        (
            "void flash::flash_fwd_kernel<cutlass::bfloat16_t>",
            ["aten::_flash_attention_forward"],
            "attention, forward",
        ),
        ("_backward_k", [f"{ENGINE}_PackedBackward"], "attention, backward"),
        ("_forward", ["_Packed"], "attention, forward"),
        ("sm90_xmma_gemm_bf16", [f"{ENGINE}_LinearBackward", "aten::mm"], "products, backward"),
        ("_add_norm_backward", [f"{ENGINE}_AddNormBackward"], "other, backward"),
        ("Memcpy DtoD (Device -> Device)", [], "other, forward"),
        ("ncclDevKernel_AllReduce", ["optimizer norm"], "communication"),
        ("FusedAdamMathFunctor", ["optimizer step", "Optimizer.step#AdamW.step"], "optimizer step"),
        ("_squares", ["optimizer wait_norm"], "gradient norm"),
    ],
)
def test_parts(kernel: str, operations: list[str], part: str) -> None:
    assert part_of(kernel, operations) == part


@pytest.mark.parametrize("parts", [None, 2])
def test_operations_of_a_training_step_are_known(parts: int | None, tmp_path: Path) -> None:
    """Real ones of this version of torch, each of whose products is said to have launched a kernel."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    spec = ModelSpec.from_hf({"model_type": "llama", **sizes, **heads})
    with World.start("cpu") as world:
        placement = Placement.default(Layout.even(1, 1, 1, 2))
        runtime = ModelRuntime("model", spec, placement, world, torch.float32, parts=parts)
        initialise(runtime.decoder, 0)
        runtime.attach_optimizer(AdamWSettings(lr_at=lambda _: 1e-3))
        count, batches = random_batches(runtime, 2, 2, 16)
        given = PipelineInput(runtime, batches, mean_loss(runtime, batches, count * 15))
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            Pipeline([runtime]).train([given])
    recorded.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    products = {
        "aten::mm": "gemm",
        "aten::bmm": "gemm",
        "mkldnn::_linear_pointwise": "gemm",
        "aten::_foreach_norm": "norm",
    }
    ones = [e for e in events if e.get("cat") == "cpu_op" and (e["name"] in products or "adam" in e["name"])]
    for number, one in enumerate(ones):
        kernel = products.get(one["name"], "adam")
        events += launched(kernel, one["ts"] + one["dur"] / 2, 10.0 * number, 10.0, number, one["tid"])
    found = spent(events)
    named = {"products, forward", "products, backward", "log-probs, forward", "log-probs, backward"}
    assert found.keys() == {*named, "gradient norm", "optimizer step", "idle"}


def test_a_watch_adds_up_what_is_done_while_it_is_active() -> None:
    watch = Watch()
    with watch.over("training"):
        torch.zeros(3)
    assert not watch.stages
    watch.active = True
    with watch.over("training"):
        torch.zeros(3)
    assert watch.stages == {"training": {}}  # a CPU has no kernels


def test_a_table_says_what_is_more() -> None:
    kinds = {"fast": {"products, forward": 0.010}, "1 part": {"products, forward": 0.012, "idle": 0.001}}
    lines = table("training", kinds)
    assert [line.split() for line in lines[1:]] == [
        ["products,", "forward", "10.00", "12.00", "+2.00"],
        ["idle", "0.00", "1.00", "+1.00"],
        ["all", "10.00", "13.00", "+3.00"],
    ]
