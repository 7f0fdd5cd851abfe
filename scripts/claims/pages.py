"""The claims of every page: those of speed here, those of learning and rollouts beside."""

from __future__ import annotations

from collections.abc import Sequence

from claims.claim import Claim
from claims.generation import ends_of_ratios, performance_rows
from claims.learning import algorithms_page, numerics_page, recipe_page, rollout_rows
from claims.logs import (
    FOUR,
    OURS,
    added,
    campaign_log,
    environment_bytes,
    first_piece,
    iterations_seconds,
    largest_gib,
    learnt,
    one_gpu,
    planned,
    published_speedups,
    run,
    seconds,
    stages_of,
    switched_beside_megatron,
    usage,
    verl,
)
from claims.peers import peers_page
from claims.planner import planner_page


def times(others: Sequence[tuple[float, str]]) -> list[float]:
    """Seconds of others, each with how many times ours of the same critic that is."""
    return [number for value, critic in others for number in (value, value / seconds(OURS[critic]))]


def readme() -> list[Claim]:
    """Of the first page."""
    return [*_costs(), *_beside_others(), *_learning()]


def _costs() -> list[Claim]:
    """What its commands take."""
    page = "README.md"
    return [
        Claim(
            page,
            "({:.1f} GB on disk for RUNME-a; {:.1f} GB for the rest with torch's CPU build",
            lambda: [environment_bytes(tier) / 1e9 for tier in ("plot", "baseline")],
        ),
        Claim(
            page,
            "({:d} runs, {:d} of them of the baseline; all figures)",
            lambda: [
                len(planned("cpu")),
                sum(config.log.variant == "dschat" for config in planned("cpu")),
            ],
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
            "| 3 MB | {:.1f} GB | {:.0f} s for an earlier table",
            lambda: [
                usage("./RUNME-b.sh", 0)["peak_bytes"] / 1e9,
                usage("./RUNME-b.sh", 0)["seconds"],
            ],
        ),
    ]


def _beside_others() -> list[Claim]:
    """Its table of seconds on four GPUs."""
    page = "README.md"
    return [
        Claim(page, "| PUZZLE | {:.2f} | {:.2f} |", lambda: [seconds(OURS[critic]) for critic in OURS]),
        Claim(
            page,
            "gives {:.2f} to {:.2f} times vLLM's tokens/s at equal lengths, {:.2f} at various",
            lambda: ends_of_ratios()[:3],
        ),
        Claim(
            page,
            "takes {:.2f} s an iteration of 16 sequences, DeepSpeed-Chat's best that works {:.2f} s",
            lambda: [one_gpu()[3], one_gpu()[1]],
        ),
        Claim(
            page,
            "its defaults | {:.2f}, **{:.2f}** | {:.2f}, **{:.2f}** |",
            lambda: times([(verl(critic, "step"), critic) for critic in OURS]),
        ),
        Claim(
            page,
            "samples match its weights | {:.2f}, **{:.2f}** | {:.2f}, **{:.2f}** |",
            lambda: times([(seconds(f"{FOUR}{critic}-ds-plain"), critic) for critic in OURS]),
        ),
        Claim(
            page,
            "reference on the host) | | {:.2f}, **{:.2f}** |",
            lambda: times([(seconds(f"{FOUR}7b-ds-published"), "7b")]),
        ),
    ]


def _learning() -> list[Claim]:
    """What its examples learn."""
    page = "README.md"
    claims = [
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


def baseline_page() -> list[Claim]:
    """Of the comparison with DeepSpeed-Chat."""
    rows = {
        "checkpointing, reference on the host |": ("2xh200/dschat-published", ""),
        "| **ZeRO-2, without its Hybrid Engine: transformers' generate** (2 iterations) |": (
            "2xh200/dschat-plain",
            "**",
        ),
        "Engine with CUDA graphs |": ("2xh200/dschat-graphs", ""),
        "replicas throughout (1,1,2) |": ("2xh200/base", ""),
        "generates as 2,1,1, shared pipelines |": ("2xh200-search/opt-gathered", ""),
        "| **PUZZLE**, generation filled from ZeRO shards |": ("2xh200/opt", "**"),
    }
    page = "docs/baseline.md"
    return [
        *(
            Claim(
                page,
                f"{words} {bold}{{:.2f}}{bold} | {{:.2f}} | {{:.2f}} | {{:.2f}} |",
                stages_of(f"baseline/{folder}"),
            )
            for words, (folder, bold) in rows.items()
        ),
        Claim(
            page,
            "DeepSpeed-Chat takes {:.2f} s in the published setting and {:.2f} s in its best that works,"
            " PUZZLE {:.2f} s with decode micro-batches of 4 and {:.2f} s with one of 16: {:.2f} times less",
            one_gpu,
        ),
        Claim(
            page,
            "of 350M, the best takes {:.2f} s and PUZZLE {:.2f} s: {:.2f} times less",
            lambda: [one_gpu("350m")[number] for number in (1, 3, 4)],
        ),
    ]


def artifact_page() -> list[Claim]:
    """Of the artifact appendix."""
    page = "docs/artifact.md"
    others = [("350m", verl("350m", "step")), ("7b", verl("7b", "step"))]
    others += [(critic, seconds(f"{FOUR}{critic}-ds-plain")) for critic in OURS]
    others += [("7b", seconds(f"{FOUR}7b-ds-published"))]
    faster = [value / seconds(OURS[critic]) for critic, value in others]
    return [
        Claim(page, "takes {:.1f} to {:.1f} times less than verl", lambda: [min(faster), max(faster)]),
        Claim(page, "| {:.2f} to {:.2f} of it, [peers.md]", switched_beside_megatron),
        Claim(
            page,
            "| {:.2f} to {:.2f} times vLLM's tokens/s at equal lengths, {:.2f} at various, {:.2f} in groups",
            ends_of_ratios,
        ),
        Claim(page, "seven minutes on one H200 ran {:d} of {:d} runs", first_piece),
        Claim(page, "lie between {:.2f} and {:.2f} times DeepSpeed-Chat", lambda: published_speedups()[:2]),
        Claim(page, "is not their mean ({:.2f})", lambda: published_speedups()[2:]),
    ]


def every_claim() -> list[Claim]:
    """All of them, by page."""
    return [
        *readme(),
        *recipe_page(),
        *rollout_rows(),
        *performance_rows(),
        *baseline_page(),
        *algorithms_page(),
        *numerics_page(),
        *peers_page(),
        *artifact_page(),
        *planner_page(),
    ]
