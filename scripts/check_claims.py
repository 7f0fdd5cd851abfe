#!/usr/bin/env python
"""Recomputes the measured numbers of the project's pages from the logs that ship with it.

    python scripts/check_claims.py

A claim is a sentence or a table row of a page with slots for its numbers, and what computes them. A page says
what the logs say, to the digit, or this says where it does not. On the pages in `WHOLE` every other number is
one that nothing measured: a version, an option, a layout.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# The checkout's own, from any folder.
from puzzle.errors import exit_code  # noqa: E402
from puzzle.runlog import Run, load_runs  # noqa: E402

if TYPE_CHECKING:
    from puzzle.config.run import TrainConfig

Values = Callable[[], Sequence[float]]
SLOT = re.compile(r"\{[^{}]*\}")
NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"
WHOLE = ("README.md",)
"""Pages without a measured number that no claim has."""


@dataclass(frozen=True)
class Claim:
    """A text of `page` whose slots, as of `str.format`, have the `values` that the logs give."""

    page: str
    text: str
    values: Values

    def rendered(self) -> str:
        return self.text.format(*self.values())

    def pattern(self) -> re.Pattern[str]:
        """The text with any numbers in its slots."""
        return re.compile(NUMBER.join(map(re.escape, SLOT.split(self.text))))


def fault(claim: Claim, page: str) -> str | None:
    """What is wrong with a claim on a page whose text is `page` (single spaces); None where it holds."""
    wanted = claim.rendered()
    if wanted in page:
        return None
    found = claim.pattern().search(page)
    if found is None:
        return f"{claim.page}: does not say: {wanted}"
    return f"{claim.page}: says: {found[0]}; the logs: {wanted}"


def uncovered(name: str, page: str, claims: Sequence[Claim]) -> list[str]:
    """Numbers of a page that neither a claim nor `UNMEASURED` explains, each with some words around it."""
    for claim in claims:
        page = page.replace(claim.rendered(), " ")
    for pattern, _ in UNMEASURED:
        page = re.sub(pattern, " ", page)
    return [
        f"{name}: no claim computes the number in: ...{page[max(0, m.start() - 40) : m.end() + 25]}..."
        for m in re.finditer(NUMBER, page)
    ]


def flat(text: str) -> str:
    """Lines and spaces of any length are one space."""
    return " ".join(text.split())


UNMEASURED = [
    (r"```.*?```", "commands"),
    (r"`[^`]*`", "names and options"),
    (r"\]\([^)]*\)", "links"),
    (r"USENIX ATC '24|Python 3\.11|Debian 12", "names and versions"),
    (r"figures? \d+(-\d+)?|table \d", "the paper's"),
    (r"(tp|pp) \d", "a drawing's layouts"),
    (r"\| \d+-\d+ GPUs|1-8 GPUs|on 32 GPUs|32 GPUs were", "sizes of scales"),
    (r"7B|350M|13B|H200|95 %|1\.96|UTF-8", "what was run"),
    (r"(takes )?[23] MB( \||,)", "what the files of a folder take, rounded up"),
    (
        r"2-core host|32 sequences of 256 \+ 256 tokens|(after|of) 32 iterations|(all )?80,? (held-out|good)",
        "the work",
    ),
    (r"\(seed 0; |12-year-old|Apache-2\.0", "a seed, what a model wrote, the licence"),
]
"""What is no measured number on a page, and why; removed in this order."""


@cache
def run(folder: str) -> Run:
    """The only run under a folder of `logs`."""
    (found,) = load_runs(ROOT / "logs" / folder).runs
    return found


def seconds(folder: str, stage: str | None = None, first: int = 1) -> float:
    """Mean seconds of an iteration, or of a stage of it, without those before iteration `first`."""
    late = [one for one in run(folder).iterations if one.iteration >= first]
    return fmean(one.e2e_seconds if stage is None else one.stage_seconds[stage] for one in late)


def held_out(folder: str, iteration: int) -> tuple[float, float]:
    """The held-out reward after so many iterations, and half its 95 % interval."""
    (found,) = (one.metrics for one in run(folder).evaluations if one.iteration == iteration)
    return found["reward"], found["reward_ci95"]


def learnt(folder: str, iterations: int) -> list[float]:
    """Held-out reward before and after, each with half its interval, and the gain."""
    before, after = held_out(folder, 0), held_out(folder, iterations)
    return [*before, *after, after[0] - before[0]]


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
def planned(scale: str, devices: int | None = None) -> list[TrainConfig]:
    """The runs of RUNME-b at a scale."""
    from puzzle.campaign.experiments import Selection, expand, read_table

    return [one.config for one in expand(read_table(), Selection(scale, devices=devices))]


def largest_gib(scale: str, *devices: int | None) -> float:
    """The fullest rank of all runs of our engine, by the memory report."""
    from puzzle.config import memory_report
    from puzzle.config.resolve import resolve

    configs = [config for n in devices or (None,) for config in planned(scale, n)]
    ours = [resolve(config) for config in configs if config.log.variant != "dschat"]
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


def readme() -> list[Claim]:
    """Of the first page."""
    page = "README.md"
    claims = [
        Claim(
            page,
            "({:.1f} GB on disk for RUNME-a; {:.1f} GB for the rest with torch's CPU build",
            lambda: [environment_bytes(tier) / 1e9 for tier in ("plot", "baseline")],
        ),
        Claim(
            page,
            "({:d} runs, {:d} of them of the baseline; all figures)",
            lambda: [len(planned("cpu")), sum(config.log.variant == "dschat" for config in planned("cpu"))],
        ),
        Claim(
            page,
            "at most {:.0f} GiB of a GPU on 1, 2, 4 and 8 GPUs, estimated",
            lambda: [largest_gib("node", 1, 2, 4, 8)],
        ),
        Claim(page, "as above | at most {:.0f} GiB of a GPU, estimated", lambda: [largest_gib("paper")]),
        Claim(
            page,
            "{:d} runs in {:d} s (`logs/bench/2026-11-22-2xh200-f/runme-b.log`)",
            lambda: campaign_log("bench/2026-11-22-2xh200-f/runme-b.log"),
        ),
        Claim(
            page,
            "| `./RUNME-a.sh` | 2 MB | {:.1f} GB | {:.0f} s; {:.0f} s the first time",
            lambda: [
                usage("./RUNME-a.sh", 1)["peak_bytes"] / 1e9,
                *(usage("./RUNME-a.sh", i)["seconds"] for i in (1, 0)),
            ],
        ),
        Claim(
            page,
            "| 3 MB | {:.1f} GB | {:.0f} s, its environment from a cache",
            lambda: [usage("./RUNME-b.sh", 0)["peak_bytes"] / 1e9, usage("./RUNME-b.sh", 0)["seconds"]],
        ),
        Claim(
            page,
            "(ZeRO-3, Hybrid Engine, checkpointing, reference on the host) | {:.2f} | {:.1f} |",
            against("dschat-published"),
        ),
        Claim(page, "(ZeRO-2, transformers' `generate`) | {:.2f} | **{:.1f}** |", against("dschat-plain")),
        Claim(
            page, "Engine's samples do not match its weights | {:.2f} | {:.1f} |", against("dschat-graphs")
        ),
        Claim(page, "| PUZZLE | {:.2f} | |", lambda: [baseline("opt")]),
        Claim(page, "learns to add: {:.1f} to {:.2f} - {:.2f} held out", added),
        Claim(
            page,
            "a time limit of 530 s stopped the runs in their {:.0f}th iteration",
            lambda: [min(len(run(f"learning/sentiment-ppo/seed-{s}").iterations) for s in range(3)) + 1],
        ),
    ]
    for seed in range(3):
        folder = f"learning/sentiment-ppo/seed-{seed}"
        claims.append(
            Claim(
                page,
                f"| {seed} | {{:.3f}} +- {{:.3f}} | {{:.3f}} +- {{:.3f}} | {{:.3f}} | {{:.0f}} |",
                lambda folder=folder: [*learnt(folder, 32), iterations_seconds(folder, 32)],
            )
        )
    return claims


def campaign_log(file: str) -> list[int]:
    """How many runs the last lines of a campaign say were run, and in how many seconds."""
    text = (ROOT / "logs" / file).read_text()
    return [
        int(re.findall(pattern, text, re.MULTILINE)[-1]) for pattern in (r"^(\d+) run$", r"duration: (\d+) s")
    ]


def baseline_page() -> list[Claim]:
    """Of the comparison with DeepSpeed-Chat."""
    rows = {
        "checkpointing, reference on the host |": ("2xh200/dschat-published", ""),
        "| **ZeRO-2, transformers' generate** (2 iterations) |": ("2xh200/dschat-plain", "**"),
        "Engine with CUDA graphs |": ("2xh200/dschat-graphs", ""),
        "replicas throughout (1,1,2) |": ("2xh200/base", ""),
        "generates as 2,1,1, shared pipelines |": ("2xh200-search/opt-gathered", ""),
        "| **PUZZLE**, generation filled from ZeRO shards |": ("2xh200/opt", "**"),
    }
    return [
        Claim(
            "docs/baseline.md",
            f"{words} {bold}{{:.2f}}{bold} | {{:.2f}} | {{:.2f}} | {{:.2f}} |",
            stages_of(f"baseline/{folder}"),
        )
        for words, (folder, bold) in rows.items()
    ]


def algorithms_page() -> list[Claim]:
    """Of what the algorithms learn, and of GRPO on GPUs."""
    page, claims = "docs/algorithms.md", []
    for name in ("grpo", "rloo", "ppo"):
        for seed in range(3):
            folder = f"learning/arithmetic/{name}-{seed}"
            claims.append(
                Claim(
                    page,
                    f"| {seed} | {{:.3f}} +- {{:.3f}} | {{:.3f}} +- {{:.3f}} | {{:.3f}} | {{:.0f}} |",
                    lambda folder=folder: [*learnt(folder, 30), wall_seconds(folder)],
                )
            )
    answered = ("before.jsonl", "after-grpo-0.jsonl", "after-rloo-0.jsonl", "after-ppo-0.jsonl")
    claims.append(
        Claim(
            page,
            "answers {:.3f} of the held-out sums rightly before training,"
            " {:.3f} after GRPO, {:.3f} after RLOO and {:.3f} after PPO",
            lambda: [right_answers(file) for file in answered],
        )
    )
    sentiment = {
        name: [f"learning/sentiment-algorithms/{name}-{s}" for s in range(3)] for name in ("grpo", "ppo")
    }
    claims.append(
        Claim(
            page,
            "from {:.3f}, {:.3f}, {:.3f} to {:.3f}, {:.3f}, {:.3f} (GRPO)"
            " and {:.3f}, {:.3f}, {:.3f} (PPO) after 24 iterations",
            lambda: [
                *(held_out(folder, 0)[0] for folder in sentiment["grpo"]),
                *(held_out(folder, 24)[0] for name in ("grpo", "ppo") for folder in sentiment[name]),
            ],
        )
    )
    for layouts, folder in {
        "1,4,1 -> 2,2,1": "grpo-141-221", "2,1,2 -> 4,1,1": "grpo-212-411", "1,1,4 -> 1,1,4": "grpo-114-114",
    }.items():  # fmt: skip
        claims.append(
            Claim(
                page,
                f"| {layouts} | {{:.2f}} | {{:.2f}} | {{:.2f}} | {{:.2f}} | {{:.2f}} |",
                lambda folder=folder: [*third(folder), training_peak(folder)],
            )
        )
    for tokens in (4096, 8192, 16384, 32768):
        said = " (the default)" if tokens == 16384 else ""
        claims.append(
            Claim(
                page,
                f"{tokens}{said} {{:.2f}}, {{:.2f}}",
                lambda tokens=tokens: [
                    one.stage_seconds["inference"] + one.stage_seconds["training"]
                    for one in run(f"bench/2026-11-30-4xh200/tokens-{tokens}").iterations[1:3]
                ],
            )
        )
    return claims


def every_claim() -> list[Claim]:
    """All of them, by page."""
    return [*readme(), *baseline_page(), *algorithms_page()]


def main() -> int:
    """Exit code 0 if all claims hold and the whole pages have no other measured number."""
    claims = every_claim()
    pages = {name: flat((ROOT / name).read_text()) for name in {*(claim.page for claim in claims), *WHOLE}}
    faults = [found for claim in claims if (found := fault(claim, pages[claim.page])) is not None]
    for name in WHOLE:
        faults += uncovered(name, pages[name], [claim for claim in claims if claim.page == name])
    for line in faults:
        print(f"error: {line}", file=sys.stderr)
    print(f"{len(claims) - sum('no claim' not in f for f in faults)} of {len(claims)} claims as the logs say")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
