"""`puzzle bench exact`: whether invariant numerics are invariant, and what they cost beside fast ones.

One process runs two iterations of GRPO for every model and dtype. All layouts of this host's devices, and
other ways through the same work (few rows at a time, prompts in parts, no graphs), must give the same tokens
and log-probs and, where they have as many replicas, the same weights: bit for bit.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from puzzle.bench.harness import SHARED, add_memory_check, launch_of
from puzzle.bench.spent import Watch, WatchedTrainer, table
from puzzle.bench.switch import pair_of
from puzzle.cli import Parser, whole
from puzzle.config.load import build, merge, parse_overrides
from puzzle.config.resolve import resolve
from puzzle.config.run import TrainConfig
from puzzle.data.prepare import prepare
from puzzle.engine.runtime.world import World
from puzzle.errors import UserError
from puzzle.files.limits import MOST_LAYERS, MOST_PROCESSES
from puzzle.launch import local
from puzzle.model.weights import boxes
from puzzle.rlhf.experience import Experience
from puzzle.rlhf.models import build_models
from puzzle.rlhf.preflight import check_memory
from puzzle.rlhf.rewards.weighted import function_rewards
from puzzle.runlog.record import Record
from puzzle.runlog.records import Iteration

Sizes = tuple[int, int, int]
"""tp, pp, dp."""
FAMILIES = ("llama", "qwen2", "qwen3")
SHAPE: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
PARTS = 4
"""Of sums in all runs that are compared, so that up to four tensor ranks agree with one."""
COMMON: dict[str, Any] = {
    "iterations": 2,
    "batch": 8,
    "numerics": "invariant",
    "numerics_parts": PARTS,
    "algorithm": {"name": "grpo", "microbatch": 4},
    "actor": {"optimizer": {"lr": 1e-3}},
    "data": {"random_tokens": 70},
    "generation": {"samples": 2, "max_new_tokens": 24, "temperature": 0.9},
    "checkpoint": {"save": False},
}
WAYS: dict[str, dict[str, Any]] = {
    "": {},
    "few-rows": {"max_sequences": 3},
    "prompts-in-parts": {"prefill_tokens": 32},
    "no-early-stop": {"early_stop": False},
}
"""Of generation; the first one stands for itself."""


@dataclass
class Found:
    """What a run left on a rank: digests of tokens and log-probs, its weights, seconds of stages."""

    bits: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    pieces: list[tuple[str, tuple[tuple[int, int], ...], Tensor]] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)
    watch: Watch = field(default_factory=Watch)


class Kept:
    """In the place of the log."""

    def __init__(self, found: Found) -> None:
        self.found = found

    def samples(self, _iteration: int, experience: Experience, *_: Any, **__: Any) -> None:
        """Digest what was drawn and how likely that was."""
        assert experience.sampled_logprobs_BS is not None
        told = repr(experience.responses).encode() + experience.sampled_logprobs_BS.cpu().numpy().tobytes()
        self.found.bits.append(hashlib.sha256(told).hexdigest()[:12])

    def write(self, *records: Record | None) -> None:
        """Keep the distance of training from generation, and times."""
        for record in records:
            if isinstance(record, Iteration):
                gaps = (record.metrics["first_ratio_gap"], record.metrics["logprob_gap_max"])
                self.found.gaps.append(max(gaps))
                self.found.seconds.append(dict(record.stage_seconds))

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def run(arguments: Sequence[str]) -> int:
    """Compare, then measure the price; 1 if anything differs."""
    parser = Parser(
        "puzzle bench exact",
        description="Compare runs with invariant numerics bit for bit.",
        epilog="Every key of the configuration is an option of the runs that are timed, --section.key VALUE.",
        allow_abbrev=False,
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--world", type=whole(1, MOST_PROCESSES), default=1, help="processes, one per device")
    parser.add_argument("--share-device", action="store_true", help=SHARED)
    add_memory_check(parser)
    parser.add_argument(
        "--models", nargs="*", choices=FAMILIES, default=FAMILIES, help="none: compare nothing"
    )
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp32"), default=("bf16", "fp32"))
    parser.add_argument(
        "--ways", nargs="*", choices=list(WAYS)[1:], default=list(WAYS)[1:], help="other ways of generation"
    )
    parser.add_argument(
        "--pairs",
        nargs="+",
        type=pair_of,
        metavar="TP,PP,DP:TP,PP,DP",
        help="layouts of training and generation; all pairs of the world's if not given",
    )
    parser.add_argument(
        "--price", metavar="SIZE", help="a published size whose stages are timed; none without"
    )
    parser.add_argument(
        "--layers", type=whole(1, MOST_LAYERS), help="of the model that is timed; its own number if not given"
    )
    parser.add_argument("--sequences", type=whole(1, 4096), default=64, help="of 256 + 256 tokens, timed")
    parser.add_argument(
        "--profile", action="store_true", help="tell what the stages that are timed spend their time on"
    )
    options, overrides = parser.parse_known_args(arguments)
    given = merge(parse_overrides(overrides), {"launch": {"skip_memory_check": options.skip_memory_check}})
    if options.price is None and (overrides or options.profile):
        raise UserError("puzzle bench exact: keys of the configuration and --profile are for --price SIZE")
    if options.profile and options.device == "cpu":
        raise UserError("--profile: it reads a GPU's kernels; leave it out, or --device cpu")
    if options.price is not None and options.share_device:
        raise UserError("--price: ranks that share a GPU take turns; leave --share-device out")
    if options.price is None and not options.models:
        raise UserError("--models: nothing to compare and nothing to time; name models, or --price SIZE")
    if options.models:
        options.pairs = _pairs(options.pairs, options.world)
    timed = None if options.price is None else _timed(options, given)
    good = True
    for family, dtype in product(options.models, options.dtypes):
        good &= _compare(options, family, dtype)
    if timed is not None:
        _price(options, timed)
    return 0 if good else 1


def _pairs(given: list[tuple[Sizes, Sizes]] | None, world: int) -> list[tuple[Sizes, Sizes]]:
    """Those that are compared: all of the world's if none are given. UserError where the runs that are
    compared have not such layouts."""
    found = layouts(world)
    pairs = [(training, generation) for training in found for generation in found] if given is None else given
    if not pairs:
        raise UserError(
            f"--world {world}: no layout cuts the runs that are compared so; give 1, 2, 4, 8, ..."
        )
    for sizes in (sizes for pair in pairs for sizes in pair):
        tp, pp, dp = sizes
        if prod(sizes) != world:
            raise UserError(f"--pairs: {_name(sizes)} has {prod(sizes)} processes; --world is {world}")
        if PARTS % tp or pp > SHAPE["num_hidden_layers"] or COMMON["batch"] % dp:
            raise UserError(
                f"--pairs: {_name(sizes)}: tp is 1, 2 or 4 in the runs that are compared, pp at most"
                f" {SHAPE['num_hidden_layers']}, and dp divides {COMMON['batch']}"
            )
    return pairs


def _compare(options: argparse.Namespace, family: str, dtype: str) -> bool:
    model = {"init": SHAPE | {"model_type": family}}
    common = merge(COMMON, {"dtype": dtype, "device": options.device, "actor": model, "reward": model})
    common = merge(common, {"launch": launch_of(options)})
    good = True
    ways = [{}, *(WAYS[way] for way in options.ways)]
    truths: dict[int, list[Found]] = {1: _run([merge(common, {"generation": way}) for way in ways], 1)[0]}
    for way, found in zip(options.ways, truths[1][1:], strict=True):
        good &= _tell(f"{family} {dtype}  1,1,1, {way}", [found], [truths[1][0]])
    cases = [
        merge(common, {"layout": _sizes(training), "generation": {"layout": _sizes(generation)}})
        for training, generation in options.pairs
    ]
    for (training, generation), ranks in zip(
        options.pairs, zip(*_run(cases, options.world), strict=True), strict=True
    ):
        replicas = training[2]
        expected = truths.get(replicas)
        if replicas == 1:
            expected = [truths[1][0]]
        elif expected is None:
            expected = truths[replicas] = list(ranks)
        name = f"{family} {dtype}  {_name(training)} -> {_name(generation)}"
        good &= _tell(name, list(ranks), expected, first=truths[1][0])
    return good


def _tell(name: str, ranks: list[Found], expected: list[Found], first: Found | None = None) -> bool:
    """Print whether ranks of a run found what is expected; `first` is whose first iteration all must have."""
    wrong = []
    if any(ranks[0].gaps):
        wrong.append(f"training is {max(ranks[0].gaps):.2g} nats from generation")
    if ranks[0].bits != expected[0].bits or (first is not None and ranks[0].bits[0] != first.bits[0]):
        wrong.append("other tokens or log-probs")
    if not _same(_weights(ranks), _weights(expected)):
        wrong.append("other weights")
    print(f"{'FAIL' if wrong else 'ok  '} {name:<44}{', '.join(wrong) or 'the same bits'}", flush=True)
    return not wrong


def _weights(ranks: list[Found]) -> dict[str, Tensor]:
    """Whole tensors of the actor, by name, from what all ranks have."""
    pieces = [piece for found in ranks for piece in found.pieces]
    ends: dict[str, list[int]] = {}
    for name, intervals, _ in pieces:
        known = ends.get(name, [0] * len(intervals))
        ends[name] = [max(end, stop) for end, (_, stop) in zip(known, intervals, strict=True)]
    whole = {name: torch.full(shape, torch.nan) for name, shape in ends.items()}
    for name, intervals, values in pieces:
        whole[name][tuple(slice(*interval) for interval in intervals)] = values.float()
    return whole


def _same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def layouts(world: int) -> list[Sizes]:
    """Every layout of so many processes with 1, 2 or 4 tensor ranks and at most 4 stages."""
    found = []
    for tp, pp in product((1, 2, 4), (1, 2, 4)):
        if world % (tp * pp) == 0 and COMMON["batch"] % (world // (tp * pp)) == 0:
            found.append((tp, pp, world // (tp * pp)))
    return found


def _timed(options: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    """The configuration that both numerics run to be timed. UserError where keys are not for the user to
    give, or leave nothing to time."""
    sizes = {"preset": options.price, "max_position_embeddings": 1024}
    if options.layers is not None:
        sizes["num_hidden_layers"] = options.layers
    least = 2 + options.profile
    common: dict[str, Any] = {
        "iterations": 1 + least,
        "batch": max(options.world, options.sequences // 2),
        "dtype": "bf16",
        "device": options.device,
        "layout": _sizes((1, 1, options.world)),
        "algorithm": {"name": "grpo", "microbatch": 16},
        "generation": {"samples": 2, "max_new_tokens": 256, "greedy": True},
        "data": {"random_tokens": 256},
        "actor": {"init": sizes},
        "reward": {"init": sizes},
        "checkpoint": {"save": False},
    }
    for key in ("numerics", "numerics_parts"):
        if key in given:
            raise UserError(f"--{key}: the bench compares fast with invariant numerics; leave it out")
    common = merge(common, given)
    config = build(common, lambda key: "the bench")
    if config.launch.share_device:
        raise UserError("--launch.share_device: ranks that share a GPU take turns; leave it out")
    if config.iterations < least:
        raise UserError(f"--iterations {config.iterations}: the first is not timed; give {least} or more")
    return common


def _price(options: argparse.Namespace, common: dict[str, Any]) -> None:
    """Seconds of stages of both numerics, one after the other, the first iteration left out; with a profile,
    the last one, too."""
    kinds = {
        "fast": {"numerics": "fast"},
        "1 part": {"numerics": "invariant"},
        "2 parts": {"numerics": "invariant", "numerics_parts": 2},
    }
    cases = [merge(common, kind) for kind in kinds.values()]
    found = dict(zip(kinds, _run(cases, options.world, keep=False, profile=options.profile)[0], strict=True))
    timed = slice(1, -1 if options.profile else None)
    seconds = {
        kind: {
            stage: mean(row[stage] for row in one.seconds[timed])
            for stage in ("generation", "inference", "training")
        }
        for kind, one in found.items()
    }
    config = build(common, lambda key: "the bench")
    lengths = f"{config.data.random_tokens} + {config.generation.max_new_tokens}"
    lengths = f"{config.batch * config.generation.samples} sequences of {lengths}"
    print(f"seconds of {options.price}, {options.layers or 'all'} layers, {lengths}")
    fast = seconds.pop("fast")
    for kind, stages in seconds.items():
        for stage, value in stages.items():
            told = f"{value:.3f}  {value / fast[stage]:.2f} x"
            print(f"{stage:<12}fast {fast[stage]:.3f}  invariant, {kind:<8}{told}")
    if options.profile:
        for stage in ("inference", "training"):
            print(*table(stage, {kind: one.watch.stages[stage] for kind, one in found.items()}), sep="\n")


def _name(sizes: Sizes) -> str:
    return ",".join(map(str, sizes))


def _sizes(layout: Sizes) -> dict[str, int]:
    return dict(zip(("tp", "pp", "dp"), layout, strict=True))


def _run(
    cases: list[dict[str, Any]], world: int, keep: bool = True, profile: bool = False
) -> list[list[Found]]:
    """What every rank found in every case, all in the same processes."""
    configs = [build(case, lambda key: "the bench") for case in cases]
    with tempfile.TemporaryDirectory() as folder:
        local.run("puzzle.bench.exact:work", (configs, folder, keep, profile), world)
        return [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(world)]


def work(configs: list[TrainConfig], folder: str, keep: bool, profile: bool) -> None:
    """What every process does; weights are kept, and last iterations profiled, on request."""
    shared = configs[0].launch.share_device
    with World.start(configs[0].device, timeout=600.0, share_device=shared) as world:
        found = [_case(world, config, keep, profile) for config in configs]
        torch.save(found, Path(folder, str(world.rank)))


def _case(world: World, config: TrainConfig, keep: bool, profile: bool) -> Found:
    plan, found = resolve(config), Found()
    check_memory(plan, world)
    models = build_models(plan, world)
    data = prepare(config, plan.actor.spec.vocab_size)
    trainer = WatchedTrainer(plan, data, models, world, function_rewards(config), watch=found.watch)
    for iteration in range(config.iterations):
        found.watch.active = profile and iteration == config.iterations - 1
        trainer.iteration(iteration, Kept(found))  # ty: ignore[invalid-argument-type]
    decoder = models.actor.decoder
    found.pieces = [
        (name, box.intervals, values.detach().cpu().clone())
        for name, box, values in boxes(decoder, decoder.get_parameter)
        if keep
    ]
    del trainer, models, decoder, data
    gc.collect()  # trainers and their hooks hold each other
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return found
