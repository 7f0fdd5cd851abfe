"""Numbers out of the shipped logs."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from peers import trl_cpu
from peers.verl_ppo import means, steps_of

from claims.claim import Values
from puzzle.runlog import Run, load_runs

if TYPE_CHECKING:
    from puzzle.config.run import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
VISIT = ROOT / "logs/bench/2026-11-29-4xh200"
TRL = ROOT / "logs/peers/trl-cpu"
FOUR = "baseline/4xh200/"
OURS = {"350m": f"{FOUR}350m-opt-141-221", "7b": f"{FOUR}7b-opt-141-221"}
"""Runs on four GPUs, by the critic of their 7B actor."""


@cache
def run(folder: str) -> Run:
    """The only run under a folder of `logs`."""
    (found,) = load_runs(ROOT / "logs" / folder).runs
    return found


def seconds(folder: str, stage: str | None = None, first: int = 1) -> float:
    """Mean seconds of an iteration, or of a stage of it, without those before iteration `first`."""
    late = [one for one in run(folder).iterations if one.iteration >= first]
    return fmean(one.e2e_seconds if stage is None else one.stage_seconds[stage] for one in late)


def one_gpu(actor: str = "1.3b") -> list[float]:
    """Seconds of an iteration with a critic of 350M on one GPU: DeepSpeed-Chat as published and at its best,
    ours without and with its own; how much less the last takes than the second."""
    folder = f"campaign/1xh200/{actor}_350m_{{}}_16_1-1-1.jsonl"
    found = [seconds(folder.format(variant)) for variant in ("dschat", "dschat_best", "base", "opt")]
    return [*found, found[1] / found[3]]


def first_piece() -> list[float]:
    """Runs of a campaign on one GPU that its first piece ran, and all of them."""
    log = (ROOT / "logs/campaign/1xh200/campaign.txt").read_text()
    (found,) = re.findall(r"^(\d+) runs: (\d+) run, \d+ left", log, re.M)
    return [int(found[1]), int(found[0])]


def held_out(folder: str, iteration: int) -> tuple[float, float]:
    """The held-out reward after so many iterations, and half its 95 % interval."""
    (found,) = (one.metrics for one in run(folder).evaluations if one.iteration == iteration)
    return found["reward"], found["reward_ci95"]


def three_steps(seed: int) -> list[float]:
    """Held-out loss before and after fine-tuning, accuracy of the reward model; rewards by `puzzle evaluate`
    before and after PPO; the seconds of the whole script."""
    folder = f"three-steps/seed-{seed}/"
    losses = [one.metrics["loss"] for one in run(folder + "sft").evaluations]
    judge = run(folder + "reward").evaluations[-1].metrics
    rewards: list[float] = []
    for model in ("sft", "ppo"):
        found = json.loads((ROOT / "logs" / folder / f"evaluation-{model}/evaluation.json").read_text())
        rewards += [found["metrics"]["reward"], found["metrics"]["reward_ci95"]]
    return [losses[0], losses[-1], judge["accuracy"], judge["accuracy_ci95"], *rewards, _spent(folder)]


def two_cores() -> list[float]:
    """Of the three steps on two cores: the script's seconds, rewards before and after PPO."""
    folder = "three-steps/two-cores/"
    rewards = re.findall(r"^  reward +(\S+) \+- ", (ROOT / "logs" / folder / "console.log").read_text(), re.M)
    return [_spent(folder), *map(float, rewards)]


def _spent(folder: str) -> float:
    """Seconds that a script took, by the last line of what it printed."""
    (spent,) = re.findall(r"^rc 0 after (\d+) s$", (ROOT / "logs" / folder / "console.log").read_text(), re.M)
    return float(spent)


def sft_7b() -> list[float]:
    """Tokens of a step of fine-tuning a 7B shape, seconds and MFU, means without the first step."""
    late = run("bench/2026-12-01-1xh200-b/sft-7b").iterations[1:]
    return [
        late[0].metrics["tokens"],
        fmean(one.e2e_seconds for one in late),
        fmean(one.metrics["mfu_training"] for one in late),
    ]


def bench_row(file: str, **wanted: Any) -> dict[str, Any]:
    """The row of a bench's file under `logs/bench` that has these values."""
    rows = [json.loads(line) for line in (ROOT / "logs/bench" / file).read_text().splitlines()]
    (found,) = (row for row in rows if wanted.items() <= row.items())
    return found


def learnt(folder: str, iterations: int) -> list[float]:
    """Held-out reward before and after, each with half its interval, and the gain."""
    before, after = held_out(folder, 0), held_out(folder, iterations)
    return [*before, *after, after[0] - before[0]]


def apart(folder: str) -> list[float]:
    """How far generation is from training over a run: mean of rms gaps, largest gap and ratio, % clipped."""
    metrics = [one.metrics for one in run(folder).iterations]
    return [
        fmean(each["logprob_gap_rms"] for each in metrics),
        max(each["logprob_gap_max"] for each in metrics),
        max(each["first_ratio_gap"] for each in metrics),
        100 * fmean(each["first_clip_frac"] for each in metrics),
    ]


def price(stage: str, visit: str = "2026-12-01-1xh200-tiles") -> list[float]:
    """Seconds of a stage by fast numerics, and by invariant ones of one and two parts with their ratios."""
    lines = (ROOT / "logs/bench" / visit / "exact.log").read_text().splitlines()
    rows = [line.replace(",", "").split() for line in lines if line.startswith(f"{stage} ")]
    return [float(rows[0][2]), *(float(number) for row in rows for number in row[-3:-1])]


def iterations_seconds(folder: str, count: int) -> float:
    """End-to-end seconds of the first `count` iterations together."""
    return sum(one.e2e_seconds for one in run(folder).iterations[:count])


def wall_seconds(folder: str) -> float:
    """From the log's first record to its last."""
    lines = (ROOT / "logs" / folder / "run.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["time"] - json.loads(lines[0])["time"]


def right_answers(file: str) -> float:
    """The share of held-out sums that a file of responses answers rightly: its last number is the sum."""
    rows = [json.loads(line) for line in (ROOT / "logs/learning/arithmetic" / file).read_text().splitlines()]
    asked = (ROOT / "examples/prompts/arithmetic-held-out.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in asked]
    numbers = [re.findall(r"\d+", row["response"]) for row in rows]
    return fmean(bool(n) and n[-1] == answer for n, answer in zip(numbers, answers, strict=True))


def added() -> list[float]:
    """Held-out share of right sums before GRPO, and the least and most after it, of three seeds."""
    folders = [f"learning/arithmetic/grpo-{seed}" for seed in range(3)]
    after = [held_out(folder, 30)[0] for folder in folders]
    return [fmean(held_out(folder, 0)[0] for folder in folders), min(after), max(after)]


def usage(command: str, index: int) -> dict[str, float]:
    """The `index`th use of a command in logs/usage.jsonl."""
    rows = [json.loads(line) for line in (ROOT / "logs/usage.jsonl").read_text().splitlines()]
    return [row for row in rows if row["command"] == [command]][index]


def environment_bytes(tier: str) -> float:
    """What a tier of env.sh takes on disk."""
    rows = [json.loads(line) for line in (ROOT / "logs/environments.jsonl").read_text().splitlines()]
    return next(row["bytes"] for row in rows if row["tier"] == tier)


@cache
def planned(scale: str) -> list[TrainConfig]:
    """The runs of RUNME-b at a scale."""
    from puzzle.campaign.experiments import Selection, expand, read_table

    return [one.config for one in expand(read_table(), Selection(scale))]


def largest_gib(scale: str) -> float:
    """The fullest rank of all runs of our engine, by the memory report."""
    from puzzle.config import memory_report
    from puzzle.config.resolve import resolve

    ours = [resolve(config) for config in planned(scale) if config.log.variant != "dschat"]
    ranks = [rank for plan in ours for rank in memory_report.estimate(plan, fused=True)]
    return max(rank.peak for rank in ranks) / 2**30


def baseline(name: str) -> float:
    """Seconds per iteration of DeepSpeed-Chat's or our run on two H200."""
    return seconds(f"baseline/2xh200/{name}")


def against(name: str) -> Values:
    """Seconds of a run of the baseline, and how many times ours that is."""
    return lambda: (baseline(name), baseline(name) / baseline("opt"))


def stages_of(folder: str) -> Values:
    """Seconds per iteration, then of generation, inference and training."""
    return lambda: [seconds(folder), *(seconds(folder, s) for s in ("generation", "inference", "training"))]


def third(folder: str) -> list[float]:
    """Of a run's third iteration: end to end, generation (with what comes before), inference, training."""
    one = run(f"bench/2026-11-30-4xh200/{folder}").iterations[2]
    generation = one.stage_seconds["generation"] + one.stage_seconds["switch"]
    return [one.e2e_seconds, generation, one.stage_seconds["inference"], one.stage_seconds["training"]]


def training_peak(folder: str) -> float:
    """GiB of the fullest rank in training."""
    ranks = run(f"bench/2026-11-30-4xh200/{folder}").ranks
    return max(one["peak_bytes"]["training"] for one in ranks if "peak_bytes" in one) / 2**30


def campaign_log(file: str) -> list[int]:
    """How many runs the last lines of a campaign say were run, and in how many seconds."""
    text = (ROOT / "logs" / file).read_text()
    return [
        int(re.findall(pattern, text, re.MULTILINE)[-1]) for pattern in (r"^(\d+) run$", r"duration: (\d+) s")
    ]


def verl(critic: str, *parts: str) -> float:
    """Mean seconds of those parts of verl's steps after the first."""
    found = means(ROOT / f"logs/peers/verl-4xh200/7b-{critic}.jsonl")
    return sum(found[part] for part in parts)


def trl(tokens: int) -> list[float]:
    """Of GRPO with responses of so many tokens: steps, then of computing and of the clock mean and standard
    deviation by PUZZLE and by TRL, and the ratio of the means."""
    log, found = TRL / f"{tokens}.jsonl", []
    for unit in ("cpu_seconds", "seconds"):
        ours, theirs = (trl_cpu.seconds_of(log, side, unit) for side in trl_cpu.SIDES)
        found += [fmean(ours), stdev(ours), fmean(theirs), stdev(theirs), fmean(theirs) / fmean(ours)]
    return [len(theirs), *found]


def trl_settings() -> list[dict[str, Any]]:
    """What the logs of GRPO say that was run."""
    return [json.loads(log.read_text().splitlines()[0]) for log in sorted(TRL.glob("*.jsonl"))]


def trl_work() -> list[int]:
    """Prompts of a step, their tokens, responses to each and in all, rows of a micro-batch: of all runs."""
    names = ("groups", "prompt", "samples", "microbatch")
    ((groups, prompt, samples, microbatch),) = {tuple(s["work"][n] for n in names) for s in trl_settings()}
    return [groups, prompt, samples, groups * samples, microbatch]


def trl_versions() -> list[str]:
    """transformers beside TRL and beside ours, without the last number."""
    (found,) = {
        tuple(s["versions"][side]["transformers"] for side in ("trl", "puzzle")) for s in trl_settings()
    }
    return [text.rpartition(".")[0] for text in found]


def first_of_verl() -> list[float]:
    """Seconds of its first iteration, which does not count, with the smaller critic."""
    return [steps_of(ROOT / "logs/peers/verl-4xh200/7b-350m.jsonl")[0]["step"]]


def switched(pair: tuple[tuple[int, ...], tuple[int, ...]]) -> list[float]:
    """Milliseconds of a switch on four GPUs: floor, messages, peer copies, Megatron-core, gather-all."""
    text = "".join((VISIT / name).read_text() for name in ("results.jsonl", "megatron.jsonl"))
    rows = [row for row in map(json.loads, text.splitlines()) if row["bench"] == "switch"]
    rows = [row for row in rows if (tuple(row["from"]), tuple(row["to"])) == pair]
    rows = [row for row in rows if row.get("nccl_p2p_disable") in (None, "0")]
    ways = {row["way"]: row for row in rows}
    order = ("planned", "planned, peer", "megatron-core 0.16.1", "gather-all")
    floor = ways["planned"]["least_floor_seconds"]
    return [1e3 * value for value in (floor, *(ways[way]["kept_seconds"] for way in order))]


def switched_beside_megatron() -> list[float]:
    """What switches from 1,4,1 to 2,2,1 and 4,1,1 take of Megatron-core's time, least and most."""
    found = [switched(((1, 4, 1), other)) for other in ((2, 2, 1), (4, 1, 1))]
    shares = [ours / theirs for _, *both, theirs, _ in found for ours in both]
    return [min(shares), max(shares)]


def published_speedups() -> list[float]:
    """The bars of figure 8, DeepSpeed-Chat's end-to-end time over that of the system: least, most, mean."""
    runs = [one for one in load_runs(ROOT / "logs/published").runs if "figure8" in one.figures]
    spent = {(one.cluster, one.pair, one.variant): fmean(one.printed["e2e"][1:]) for one in runs}
    bars = [
        spent[cluster, pair, "dschat"] / seconds
        for (cluster, pair, variant), seconds in spent.items()
        if variant == "opt"
    ]
    return [min(bars), max(bars), fmean(bars)]
