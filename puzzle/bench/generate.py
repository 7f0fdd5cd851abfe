"""`puzzle bench generate`: prefill and decoding of random prompts, beside the least time memory allows."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from puzzle.bench import device
from puzzle.bench.train import DTYPES, read_layout
from puzzle.cli import Parser
from puzzle.engine.generate import Request, generate
from puzzle.engine.passes import StagePasses, cache_bytes, fitting_rows
from puzzle.engine.runtime import ModelRuntime
from puzzle.engine.sampling import SamplingParams
from puzzle.engine.world import World
from puzzle.errors import UserError
from puzzle.launch import local
from puzzle.model.weights import initialise
from puzzle.plan.layout import Layout, Placement
from puzzle.spec.model import ModelSpec
from puzzle.spec.published import PUBLISHED, published


@dataclass(frozen=True)
class GenerateBench:
    """What is measured; `layers` 0 keeps the model's own number."""

    model: str
    layers: int
    layout: tuple[int, int, int]
    batches: tuple[int, ...]
    prompt: int
    ragged: bool
    new: int
    greedy: bool
    modes: tuple[str, ...]
    dtype: str
    device: str
    out: Path | None

    @property
    def spec(self) -> ModelSpec:
        """The model, cut to `layers` layers if that is asked for."""
        spec = published(self.model)
        return replace(spec, num_layers=self.layers) if self.layers else spec

    def lengths(self, batch: int) -> list[int]:
        """Tokens of each prompt."""
        generator = torch.Generator().manual_seed(batch)
        least = max(1, self.prompt // 8) if self.ragged else self.prompt
        return torch.randint(least, self.prompt + 1, (batch,), generator=generator).tolist()


def run(arguments: Sequence[str]) -> int:
    """Parse the command line and start the processes of the layout."""
    parser = Parser("puzzle bench generate", description="Time prefill and decoding of random prompts.")
    parser.add_argument("--model", default="7b", choices=sorted(PUBLISHED), help="published size")
    parser.add_argument("--layers", type=int, default=0, metavar="N", help="keep N decoder layers only")
    parser.add_argument("--layout", default="1,1,1", metavar="TP,PP,DP")
    parser.add_argument("--batches", default="32,64,128,256", help="prompts of all replicas")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--ragged", action="store_true", help="prompts of an eighth of that to all of it")
    parser.add_argument("--new", type=int, default=256, help="new tokens of every sequence")
    parser.add_argument("--greedy", action="store_true", help="argmax instead of drawing at temperature 1")
    parser.add_argument("--modes", default="eager,graphs", help="eager, graphs (of decode passes) or both")
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--out", type=Path, metavar="FILE", help="add the results to FILE, one JSON per line")
    given = vars(parser.parse_args(arguments))
    given["layout"] = read_layout(given["layout"])
    given["modes"] = tuple(given["modes"].split(","))
    unknown = set(given["modes"]) - {"eager", "graphs"}
    if unknown:
        raise UserError(f"--modes {unknown.pop()}: there are eager and graphs")
    try:
        given["batches"] = tuple(int(part) for part in given["batches"].split(","))
    except ValueError:
        raise UserError(f"--batches {given['batches']}: give numbers, as in 32,64") from None
    local.run("puzzle.bench.generate:work", (GenerateBench(**given),), math.prod(given["layout"]))
    return 0


def work(bench: GenerateBench) -> None:
    """What every process does; rank 0 reports."""
    with World.start(bench.device) as world:
        spec = bench.spec
        placement = Placement.default(Layout.even(*bench.layout, spec.num_layers))
        runtime = ModelRuntime("model", spec, placement, world, DTYPES[bench.dtype])
        initialise(runtime.decoder, 0)
        runtime.freeze()
        bandwidth = device.copy_bandwidth(world)
        warm = StagePasses(runtime.decoder)
        _generate(bench, runtime, warm, min(bench.batches), 2)
        warm.release()
        for batch in bench.batches:
            for mode in bench.modes:
                row = {"mode": mode} | _row(bench, runtime, mode, batch, bandwidth)
                if world.rank == 0:
                    _report(bench, row)


def _row(
    bench: GenerateBench, runtime: ModelRuntime, mode: str, batch: int, bandwidth: float
) -> dict[str, Any]:
    wave = _wave(bench, runtime, batch)
    waves = -(-batch // wave)
    sizes = [batch // waves + (i < batch % waves) for i in range(waves)]
    device.reset_peak(runtime.world.device)
    passes = StagePasses(runtime.decoder, graphs=mode == "graphs")
    captured: dict[str, Any] = {}
    if passes.graphs:
        first = _generate(bench, runtime, passes, sizes[0], bench.new)
        captured = {"captures": passes.captures, "capture_s": passes.capture_seconds, "first_wave_s": first}
    prefill = sum(_generate(bench, runtime, passes, size, 1) for size in sizes)
    total = sum(_generate(bench, runtime, passes, size, bench.new) for size in sizes)
    passes.release()
    floor = sum(_floor(bench, runtime, size, bandwidth) for size in sizes)
    return captured | {
        "batch": batch,
        "waves": waves,
        "total_s": total,
        "prefill_s": prefill,
        "decode_s": total - prefill,
        "decode_floor_s": floor,
        "tokens_per_s": batch * bench.new / total,
        "copy_bytes_per_s": bandwidth,
        "peak_bytes": device.peak_bytes(runtime.world),
        "where": device.facts(runtime.world),
    }


def _generate(
    bench: GenerateBench, runtime: ModelRuntime, passes: StagePasses, batch: int, new: int
) -> float:
    """Seconds to answer `batch` prompts with `new` tokens each."""
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, bench.prompt)
    prompts = torch.randint(0, bench.spec.vocab_size, shape, generator=generator).tolist()
    lengths = bench.lengths(batch)
    requests = [Request(prompts[row][: lengths[row]], row) for row in runtime.rows(batch)]
    params = SamplingParams(greedy=bench.greedy, min_new_tokens=new, max_new_tokens=new)
    device.meet(runtime.world)
    start = time.perf_counter()
    answers = generate(runtime.decoder, requests, params, runtime.runner, passes=passes)
    runtime.world.synchronize()
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=runtime.world.device)
    if any(len(answer.tokens) != new for answer in answers):
        raise RuntimeError(f"a response does not have {new} tokens")
    return float(runtime.world.max(seconds))


def _wave(bench: GenerateBench, runtime: ModelRuntime, batch: int) -> int:
    """How many prompts of the batch run at once: as many as the cache has room for on every rank."""
    fits = fitting_rows(runtime.decoder, bench.prompt + bench.new)
    if fits is None:
        return batch
    replicas = runtime.placement.layout.dp
    largest = -int(runtime.world.max(torch.tensor(-fits * replicas, device=runtime.world.device)))
    if largest < replicas:
        raise UserError(f"no sequence of {bench.prompt + bench.new} tokens fits beside the weights")
    return min(batch, largest)


def _floor(bench: GenerateBench, runtime: ModelRuntime, batch: int, bandwidth: float) -> float:
    """Seconds to read the weights and the live keys and values once in every decode step.

    Stages work one after the other, so their times add up; a stage's slowest rank counts. Embeddings are not
    read whole.
    """
    weights = sum(p.nbytes for p in runtime.decoder.parameters())
    if runtime.decoder.first and not (runtime.spec.tied and runtime.decoder.last):
        weights -= runtime.decoder.embed.nbytes
    lengths = bench.lengths(batch)
    places = sum(lengths[row] + step for row in runtime.rows(batch) for step in range(1, bench.new))
    read = (bench.new - 1) * weights + places * cache_bytes(runtime.decoder)
    seconds = runtime.world.gather((runtime.coord.p, read / bandwidth))
    stages = {p: max(s for q, s in seconds if q == p) for p, _ in seconds}
    return sum(stages.values())


def _report(bench: GenerateBench, row: dict[str, Any]) -> None:
    tp, pp, dp = bench.layout
    memory = "" if row["peak_bytes"] is None else f"  peak {row['peak_bytes'] / 2**30:.1f} GiB"
    share = row["decode_floor_s"] / row["decode_s"] if row["decode_s"] > 0 else float("nan")
    print(
        f"generate {bench.model} {bench.spec.num_layers} layers  tp{tp} pp{pp} dp{dp}  {row['mode']:<6}  "
        f"batch {row['batch']:>4} in {row['waves']}  {'ragged ' * bench.ragged}{bench.prompt}+{bench.new}  "
        f"{row['tokens_per_s']:8.0f} tokens/s  "
        f"prefill {row['prefill_s']:.3f} s  decode {row['decode_s']:.3f} s  "
        f"floor {row['decode_floor_s']:.3f} s ({share:.0%}){memory}",
        flush=True,
    )
    if bench.out is not None:
        with bench.out.open("a") as file:
            settings = {**asdict(bench), "out": None, "layers": bench.spec.num_layers}
            file.write(json.dumps({"bench": "generate", **settings, **row}) + "\n")
