"""Claims of generation on one GPU, beside vLLM's of the same requests."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from claims.claim import Claim
from claims.logs import ROOT
from puzzle.spec.published import published

VISIT = ROOT / "logs/bench/2026-12-01-1xh200-c"
"""Of all workloads of both; the others came after it, TILES with fixed lengths of both."""
FAMILIES = ROOT / "logs/bench/2026-12-01-1xh200-families"
TILES = ROOT / "logs/bench/2026-12-01-1xh200-tiles"
NORMS = ROOT / "logs/bench/2026-12-01-1xh200-norms"
FIXED, VARIED, GROUPS = (16, 32, 64, 128, 256), 1024, 512
WORK = {
    **{count: f"{count} of 256 + 256 tokens" for count in FIXED},
    VARIED: f"{VARIED} of various lengths",
    GROUPS: f"{GROUPS}, 8 of a prompt of 1024 + 256",
}


@cache
def rows(name: str, visit: Path = VISIT) -> list[dict[str, Any]]:
    """Of a file of a visit."""
    return [json.loads(line) for line in (visit / name).read_text().splitlines()]


def ours(sequences: int, name: str = "generate.jsonl", visit: Path = VISIT) -> list[float]:
    """Seconds of every run."""
    (row,) = (row for row in rows(name, visit) if row["sequences"] == sequences)
    return row["seconds"] if "seconds" in row else row["arms"]["early stop"]["seconds"]


def theirs(sequences: int, visit: Path = VISIT) -> dict[str, Any]:
    """vLLM's row; it returns log-probabilities, as ours does."""
    (row,) = (row for row in rows("vllm.jsonl", visit) if row["batch"] == sequences and row["logprobs"] == 0)
    return row


def beside_vllm(sequences: int) -> list[float]:
    """Runs of each side, seconds of its fastest, tokens per second, and how much less time ours takes.

    ValueError unless both ran as often.
    """
    visit = TILES if sequences in FIXED else VISIT
    row, seconds = theirs(sequences, visit), ours(sequences, visit=visit)
    if len(row["seconds"]) != len(seconds):
        raise ValueError(f"{sequences} sequences: not as many runs of both")
    return [len(seconds), *_ratio(min(seconds), row)]


def _ratio(best: float, row: dict[str, Any]) -> list[float]:
    """Our seconds and vLLM's least, tokens per second of both, and how much less ours is."""
    least = min(row["seconds"])
    return [best, least, row["tokens"] / best, row["tokens"] / least, least / best]


def shared() -> list[float]:
    """Groups with shared pages read once, beside vLLM's of the first visit."""
    return _ratio(min(ours(GROUPS, "more.jsonl", TILES)), theirs(GROUPS))


def visits_apart() -> list[float]:
    """By how many percent vLLM's fixed rows of two visits differ, at most."""
    pairs = [[min(theirs(count, visit)["seconds"]) for visit in (VISIT, TILES)] for count in FIXED]
    return [100 * max(abs(a / b - 1) for a, b in pairs)]


def varied_again() -> list[float]:
    """Seconds of the various lengths in the later visit, and of recording graphs there."""
    (row,) = (row for row in rows("more.jsonl", TILES) if row["sequences"] == VARIED)
    arm = row["arms"]["early stop"]
    return [arm["seconds"][0], arm["capture_s"][0]]


def since_then() -> list[float]:
    """Seconds of a later visit, vLLM's over them, and seconds of the table's code in that visit."""
    now = [min(ours(count, visit=NORMS)) for count in FIXED]
    ratios = [
        min(theirs(count, TILES)["seconds"]) / seconds for count, seconds in zip(FIXED, now, strict=True)
    ]
    return [*now, *ratios, *(min(ours(count, "before.jsonl", NORMS)) for count in FIXED[:3])]


def decoded(visit: Path, name: str = "generate.jsonl") -> list[float]:
    """Seconds of all and of decoding of the groups."""
    (row,) = (row for row in rows(name, visit) if row["sequences"] == GROUPS)
    return [row["total_s"], row["decode_s"]]


def launched_ahead() -> list[float]:
    """By how many percent kernels launched ahead take less, by sequences."""
    return [
        100 * (1 - min(ours(count, "ahead.jsonl", FAMILIES)) / min(ours(count, visit=FAMILIES)))
        for count in FIXED
    ]


def ends_of_ratios() -> list[float]:
    """The least and the largest ratio where all lengths are equal, then those of the other two workloads."""
    found = [beside_vllm(count)[-1] for count in FIXED]
    return [min(found), max(found), beside_vllm(VARIED)[-1], shared()[-1]]


def setting(visit: Path = VISIT) -> list[float]:
    """vLLM's: share of the memory, tokens of its cache, most sequences and tokens of a pass, most tokens of
    a sequence."""
    told = rows("vllm.jsonl", visit)[0]["settings"]
    log = (visit / "vllm.log").read_text()
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
    """Milliseconds of a decode step before and now, of its floor and beyond it; percent of the time that
    prefill takes."""
    found = [
        next(row for row in rows("generate.jsonl", visit) if row["sequences"] == sequences)
        for visit in (VISIT, TILES)
    ]
    now, steps = found[-1], found[-1]["new"] - 1
    before, step, floor = (
        1e3 * seconds / steps for seconds in (found[0]["decode_s"], now["decode_s"], now["decode_floor_s"])
    )
    return [before, step, floor, step - floor, 100 * now["prefill_s"] / now["total_s"]]


def norms_in_products(sequences: int) -> list[float]:
    """Milliseconds of a decode step before and now, and of its floor; tokens per second before and now."""
    before, now = (
        next(row for row in rows(name, NORMS) if row["sequences"] == sequences)
        for name in ("before.jsonl", "generate.jsonl")
    )
    step = [1e3 * one[key] / (one["new"] - 1) for one, key in ((before, "decode_s"), (now, "decode_s"))]
    floor = 1e3 * now["decode_floor_s"] / (now["new"] - 1)
    return [*step, floor, before["tokens_per_s"], now["tokens_per_s"]]


def of_a_layer() -> list[float]:
    """Microseconds of a layer's products and norms before and now, of 64 rows and of 16."""
    text = (NORMS / "products.log").read_text()
    found: list[float] = []
    for count in (64, 16):
        for kind in ("1 None None", "- 0 1"):
            found += map(float, re.findall(rf"^{count} {kind} .*'layer': ([\d.]+)", text, re.M))
    return found


def first_iterations() -> list[float]:
    """Seconds of the first and the third iteration of a run, now and before."""
    found: list[float] = []
    for name in ("first-warm.log", "first-before.log"):
        lines = re.findall(r"^ +[13]/3 .*$", (TILES / name).read_text(), re.M)
        found += [float(line.split()[-2]) for line in lines]
    return found


def prefill_rate(sequences: int) -> list[float]:
    """TFLOP/s of the products of all layers of a 7B, over the seconds of prefill."""
    (row,) = (row for row in rows("generate.jsonl", TILES) if row["sequences"] == sequences)
    spec = published("7b")
    inner = spec.parameters - 2 * spec.vocab_size * spec.hidden_size  # norms are no more than 0.01 % of it
    return [2 * inner * row["prefilled_tokens"] / row["prefill_s"] / 1e12]


def peers_rows() -> list[Claim]:
    """Of docs/peers.md."""
    page = "docs/peers.md"
    form = "| {:d} | {:.3f} | {:.3f} | {:.0f} | {:.0f} | {:.2f} |"
    return [
        *(Claim(page, f"| {what} {form}", lambda n=count: beside_vllm(n)) for count, what in WORK.items()),
        Claim(
            page,
            "| the same, shared pages read once | 1 | {:.3f} | {:.3f} | {:.0f} | {:.0f} | {:.2f} |",
            shared,
        ),
        Claim(page, "vLLM's own rows of fixed lengths differ by at most {:.1f} % between both", visits_apart),
        Claim(page, "took {:.1f} s, {:.1f} of them for its graphs", varied_again),
        Claim(
            page,
            "{:.2f} of the memory, a cache of {:,d} tokens, at most {:d} sequences at a time and {:d} tokens"
            " of a pass, sequences of up to {:d} tokens",
            setting,
        ),
        Claim(
            page,
            "for fixed lengths {:.2f}, {:,d} tokens, {:d}, {:d} and {:d}, without FlashInfer's sampler",
            lambda: setting(TILES),
        ),
        Claim(
            page,
            "gave {:.3f}, {:.3f}, {:.3f}, {:.3f} and {:.3f} s, which beside vLLM's seconds above would be"
            " {:.2f}, {:.2f}, {:.2f}, {:.2f} and {:.2f}. The code of the table took {:.3f}, {:.3f} and"
            " {:.3f} s there",
            since_then,
        ),
        Claim(page, "vLLM took {:.1f} to {:.1f} % less in the visit of 2026-11-29", without_logprobs),
        Claim(page, "{:,d} tokens in all, one run, in which ours recorded {:d} graphs in {:.2f} s", varied),
    ]


def performance_rows() -> list[Claim]:
    """Of docs/performance.md."""
    form = "| {:.2f} | {:.2f} | {:.2f} | {:.2f} | {:.0f} % |"
    page = "docs/performance.md"
    return [
        *(Claim(page, f"| {count} {form}", lambda n=count: shares(n)) for count in FIXED),
        Claim(
            page, "at 256 sequences the layers' products alone are {:.0f} TFLOP/s", lambda: prefill_rate(256)
        ),
        *(
            Claim(
                page,
                f"| {count} | {{:.2f}} | {{:.2f}} | {{:.2f}} | {{:.0f}} | {{:.0f}} |",
                lambda n=count: norms_in_products(n),
            )
            for count in FIXED[:3]
        ),
        Claim(page, "norms {:.1f} us become {:.1f}; at 16 rows {:.1f} become {:.1f}", of_a_layer),
        Claim(page, "| by each row | {:.2f} | {:.2f} |", lambda: decoded(VISIT)),
        Claim(page, "| once for eight rows | {:.2f} | {:.2f} |", lambda: decoded(FAMILIES)),
        Claim(page, "| so, in smaller blocks | {:.2f} | {:.2f} |", lambda: decoded(TILES, "more.jsonl")),
        Claim(page, "{:.2f} s beside {:.2f} s of the third; before, {:.2f} beside {:.2f}", first_iterations),
        Claim(
            page,
            "{:.1f}, {:.1f}, {:.1f}, {:.1f} and {:.1f} % less at 16, 32, 64, 128 and 256 sequences",
            launched_ahead,
        ),
    ]
