"""What a device's time goes to: its kernels, by the part of a model that launched them.

torch's profiler tells which call on the host launched a kernel, and which operations were under way there.

```
host      _ColumnBackward [ _large | _large ]     optimizer norm [ _squares ]     operations and launches
device              [products, backward    ]          [gradient norm]             kernels
```
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from puzzle.engine.pipeline.pipeline import Pipeline, PipelineInput, PipelineOutput
from puzzle.rlhf.trainer import Trainer

PARTS = (
    "attention, forward",
    "attention, backward",
    "products, forward",
    "products, backward",
    "log-probs, forward",
    "log-probs, backward",
    "other, forward",
    "other, backward",
    "gradient norm",
    "optimizer step",
    "communication",
    "idle",
)
"""Of a stage. Others are norms, rotations, gates, copies; "log-probs" has the head's products."""
ATTENTION = ("flash", "fmha", "_forward", "_backward_q", "_backward_k")
PRODUCTS = ("gemm", "nvjet", "cutlass", "xmma", "splitk", "_product", "_large", "_skinny")
"""What names of kernels have in them; those of attention may have "cutlass", too."""
LAUNCHES = ("cuda_runtime", "cuda_driver")
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
OPERATIONS = ("cpu_op", "user_annotation")
"""Categories of events of a trace."""
Event = Mapping[str, Any]
Spent = dict[str, float]
"""Seconds by part."""


def part_of(kernel: str, operations: Iterable[str]) -> str:
    """The part that a kernel belongs to, by its name and those of the operations that it was launched in."""
    name, under = kernel.lower(), list(operations)
    if "nccl" in name:
        return "communication"
    for operation in under:
        if operation.startswith("optimizer "):
            return "gradient norm" if operation.endswith("norm") else "optimizer step"
    # Not by "Backward": torch names the forward pass of an operator of a library like its backward one.
    backward = any(each.startswith("autograd::engine") for each in under)
    if any("_TokenStats" in each for each in under):
        part = "log-probs"
    elif any(word in name for word in ATTENTION):
        part = "attention"
    elif any(word in name for word in PRODUCTS):
        part = "products"
    else:
        part = "other"
    return f"{part}, {'backward' if backward else 'forward'}"


def spent(events: Sequence[Event]) -> Spent:
    """Seconds of all kernels of a Chrome trace, by part, and of none from the first to the last of them."""
    under = _operations(events)
    kernels = sorted((e for e in events if e.get("cat") in KERNELS), key=lambda e: e["ts"])
    found: Spent = defaultdict(float)
    last = kernels[0]["ts"] if kernels else 0.0
    for kernel in kernels:
        operations = under.get(kernel["args"].get("correlation"), ())
        found[part_of(kernel["name"], operations)] += kernel["dur"] / 1e6
        found["idle"] += max(0.0, kernel["ts"] - last) / 1e6
        last = max(last, kernel["ts"] + kernel["dur"])
    return dict(found)


def _operations(events: Sequence[Event]) -> dict[int, tuple[str, ...]]:
    """Names of the operations around each launch, the outermost first, by correlation."""
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event.get("cat") in (*OPERATIONS, *LAUNCHES):
            threads[event["tid"]].append(event)
    found = {}
    for thread in threads.values():
        open_ones: list[Event] = []
        # What begins at the same time as another and ends later is around it.
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while open_ones and open_ones[-1]["ts"] + open_ones[-1]["dur"] <= event["ts"]:
                open_ones.pop()
            if event["cat"] in OPERATIONS:
                open_ones.append(event)
            elif "correlation" in event["args"]:
                found[event["args"]["correlation"]] = tuple(each["name"] for each in open_ones)
    return found


@dataclass
class Watch:
    """Adds up what stages spend while it is `active`."""

    active: bool = False
    stages: dict[str, Spent] = field(default_factory=dict)

    def over(self, stage: str) -> AbstractContextManager[None]:
        """Profile what is inside, if active."""
        return self._profiled(stage) if self.active else nullcontext()

    @contextmanager
    def _profiled(self, stage: str) -> Any:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            yield
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            recorded.export_chrome_trace(str(path))
            events = json.loads(path.read_text(errors="replace"))["traceEvents"]
        total = self.stages.setdefault(stage, {})
        for part, seconds in spent(events).items():
            total[part] = total.get(part, 0.0) + seconds


class WatchedPipeline(Pipeline):
    """A pipeline whose passes are watched."""

    def __init__(self, models: Sequence[Any], watch: Watch) -> None:
        super().__init__(models)
        self.watch = watch

    def train(self, *given: Any, **how: Any) -> list[PipelineOutput]:
        """As `Pipeline.train`."""
        with self.watch.over("training"):
            return super().train(*given, **how)

    def infer(self, inputs: Sequence[PipelineInput], *given: Any, **how: Any) -> list[PipelineOutput]:
        """As `Pipeline.infer`."""
        with self.watch.over("inference"):
            return super().infer(inputs, *given, **how)


class WatchedTrainer(Trainer):
    """A trainer whose inference and training are watched."""

    def __init__(self, *given: Any, watch: Watch) -> None:
        self.make_pipeline = lambda models: WatchedPipeline(models, watch)
        super().__init__(*given)


def table(stage: str, kinds: Mapping[str, Spent]) -> list[str]:
    """Lines for people: ms of each part; behind the first kind, what the others take more."""
    lines = [f"{stage}, ms by kernels".ljust(26) + "".join(f"{name:>20}" for name in kinds)]
    for part in (*PARTS, "all"):
        values = [
            1e3 * (sum(found.values()) if part == "all" else found.get(part, 0.0)) for found in kinds.values()
        ]
        if any(values):
            more = "".join(f"{value:12.2f} {value - values[0]:+7.2f}" for value in values[1:])
            lines.append(f"  {part:<24}{values[0]:20.2f}{more}")
    return lines
