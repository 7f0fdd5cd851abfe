"""Claims of generation on one GPU, beside vLLM's of the same requests."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

from claims.claim import Claim
from claims.logs import ROOT

VISIT = ROOT / "logs/bench/2026-12-01-1xh200-c"
FIXED, VARIED, GROUPS = (16, 32, 64, 128, 256), 1024, 512
WORK = {
    **{count: f"{count} of 256 + 256 tokens" for count in FIXED},
    VARIED: f"{VARIED} of various lengths",
    GROUPS: f"{GROUPS}, 8 of a prompt of 1024 + 256",
}


@cache
def rows(name: str) -> list[dict[str, Any]]:
    """Of a file of the visit."""
    return [json.loads(line) for line in (VISIT / name).read_text().splitlines()]


def ours(sequences: int) -> list[float]:
    """Seconds of every run."""
    (row,) = (row for row in rows("generate.jsonl") if row["sequences"] == sequences)
    return row["seconds"] if "seconds" in row else row["arms"]["early stop"]["seconds"]


def beside_vllm(sequences: int) -> list[float]:
    """Runs of each side, seconds of its fastest, tokens per second, and how much less time ours takes; vLLM
    returns log-probabilities, as ours does. ValueError unless both ran as often."""
    (row,) = (row for row in rows("vllm.jsonl") if row["batch"] == sequences and row["logprobs"] == 0)
    if len(row["seconds"]) != len(ours(sequences)):
        raise ValueError(f"{sequences} sequences: not as many runs of both")
    best = min(ours(sequences)), min(row["seconds"])
    return [len(row["seconds"]), *best, *(row["tokens"] / seconds for seconds in best), best[1] / best[0]]


def ends_of_ratios() -> list[float]:
    """The least and the largest ratio where all lengths are equal, then those of the other two workloads."""
    found = [beside_vllm(count)[-1] for count in FIXED]
    return [min(found), max(found), beside_vllm(VARIED)[-1], beside_vllm(GROUPS)[-1]]


def setting() -> list[float]:
    """vLLM's: share of the memory, tokens of its cache, most sequences and tokens of a pass, most tokens of
    a sequence."""
    told = rows("vllm.jsonl")[0]["settings"]
    log = (VISIT / "vllm.log").read_text()
    (cache_tokens,) = re.findall(r"GPU KV cache size: ([\d,]+) tokens", log)
    (longest,) = re.findall(r"Using max model len (\d+)", log)
    return [
        told["gpu_memory_utilization"],
        int(cache_tokens.replace(",", "")),
        told["max_num_seqs"],
        told["max_num_batched_tokens"],
        int(longest),
    ]


def without_logprobs() -> list[float]:
    """By how many percent vLLM took less in an earlier visit, least and most."""
    log = (ROOT / "logs/bench/2026-11-29-4xh200/vllm.jsonl").read_text()
    taken = {(row["batch"], row["logprobs"]): row["gen_s"] for row in map(json.loads, log.splitlines())}
    saved = [100 * (1 - taken[count, None] / taken[count, 0]) for count in FIXED]
    return [min(saved), max(saved)]


def varied() -> list[float]:
    """Tokens of the various responses; graphs that our run recorded, and in how many seconds."""
    (row,) = (row for row in rows("generate.jsonl") if row["sequences"] == VARIED)
    arm = row["arms"]["early stop"]
    return [row["tokens"], arm["captures"], arm["capture_s"][0]]


def shares(sequences: int) -> list[float]:
    """Milliseconds of a decode step, of its floor and beyond it; percent of the time that prefill takes."""
    (row,) = (row for row in rows("generate.jsonl") if row["sequences"] == sequences)
    steps = row["new"] - 1
    step, floor = (1e3 * row[name] / steps for name in ("decode_s", "decode_floor_s"))
    return [step, floor, step - floor, 100 * row["prefill_s"] / row["total_s"]]


def peers_rows() -> list[Claim]:
    """Of docs/peers.md."""
    page = "docs/peers.md"
    form = "| {:d} | {:.3f} | {:.3f} | {:.0f} | {:.0f} | {:.2f} |"
    return [
        *(Claim(page, f"| {what} {form}", lambda n=count: beside_vllm(n)) for count, what in WORK.items()),
        Claim(
            page,
            "{:.2f} of the memory, a cache of {:,d} tokens, at most {:d} sequences at a time and {:d} tokens"
            " of a pass, sequences of up to {:d} tokens",
            setting,
        ),
        Claim(page, "vLLM took {:.1f} to {:.1f} % less in the visit of 2026-11-29", without_logprobs),
        Claim(page, "{:,d} tokens in all, one run, in which ours recorded {:d} graphs in {:.2f} s", varied),
    ]


def performance_rows() -> list[Claim]:
    """Of docs/performance.md."""
    form = "| {:.2f} | {:.2f} | {:.2f} | {:.0f} % |"
    return [Claim("docs/performance.md", f"| {count} {form}", lambda n=count: shares(n)) for count in FIXED]
