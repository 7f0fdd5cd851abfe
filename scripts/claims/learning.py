"""Claims of what runs learn, of numerics and of rollouts."""

from __future__ import annotations

from statistics import median

from claims.claim import Claim
from claims.logs import (
    apart,
    bench_row,
    held_out,
    learnt,
    price,
    right_answers,
    run,
    sft_7b,
    third,
    three_steps,
    training_peak,
    two_cores,
    wall_seconds,
)


def recipe_page() -> list[Claim]:
    """Of the three steps, and of fine-tuning on a GPU."""
    page = "docs/recipe.md"
    form = "| {:.3f} | {:.3f} | {:.3f} +- {:.3f} | {:.2f} +- {:.2f} | {:.2f} +- {:.2f} | {:.0f} |"
    return [
        *(Claim(page, f"| {seed} {form}", lambda seed=seed: three_steps(seed)) for seed in range(3)),
        Claim(page, "seed 0 takes {:.0f} s and rises from {:.2f} to {:.2f}", two_cores),
        Claim(page, "learns from {:,.0f} tokens in {:.2f} s, MFU {:.3f}", sft_7b),
    ]


def rollout_rows() -> list[Claim]:
    """Of rewards beside the decoding, and of more sequences than fit."""
    file = "2026-12-01-1xh200-b/rollout.jsonl"

    def tails(sequences: int) -> list[float]:
        row = bench_row(file, bench="tails", sequences=sequences)
        ways = [
            median(row[kind][way]) for kind in ("generation_s", "waited_s") for way in ("after", "beside")
        ]
        return [*ways, row["saved_s"], row["simulated_s"]]

    def long() -> list[float]:
        row = bench_row(file, bench="generate", sequences=2048)
        arm = row["arms"]["early stop"]
        gib = [row["peak_bytes"] / 2**30, arm["predicted_bytes"] / 2**30]
        share = 100 * row["decode_floor_s"] / arm["median_s"]
        return [row["tokens"], arm["tokens_per_s"], share, arm["put_back"], *gib]

    form = "| {:.3f} s | {:.3f} s | {:.3f} s | {:.3f} s | {:.3f} s | {:.3f} s |"
    return [
        *(Claim("docs/fusion.md", f"| {rows} {form}", lambda rows=rows: tails(rows)) for rows in (32, 64)),
        Claim(
            "docs/performance.md",
            "at most 7168), {:,.0f} tokens, one run (`2026-12-01-1xh200-b/rollout.jsonl`)"
            " | {:.0f} | {:.0f} % | {:.0f} | {:.1f} | {:.1f} |",
            long,
        ),
    ]


def numerics_page() -> list[Claim]:
    """Of invariant numerics."""
    page, folder = "docs/numerics.md", "learning/arithmetic-h200/"
    claims = [
        Claim(
            page,
            "| fast | {:.3f} +- {:.3f} | {:.3f} +- {:.3f} | {:.4f} | {:.3f} | {:.3f} | {:.3f} % |",
            lambda: [*learnt(folder + "fast", 100)[:4], *apart(folder + "fast")],
        ),
        Claim(
            page,
            "| invariant | {:.3f} +- {:.3f} | {:.3f} +- {:.3f} | {:.0f} | {:.0f} | {:.0f} | {:.0f} % |",
            lambda: [*learnt(folder + "invariant", 100)[:4], *apart(folder + "invariant")],
        ),
    ]
    whole = "2026-12-01-1xh200-norms"
    for stage in ("generation", "inference", "training"):
        form = "| {:.3f} | {:.3f} | {:.2f} x | {:.3f} | {:.2f} x |"
        claims.append(Claim(page, f"| {stage} {form}", lambda stage=stage: price(stage)))
        claims.append(Claim(page, f"| whole {stage} {form}", lambda stage=stage: price(stage, whole)))
    return claims


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
