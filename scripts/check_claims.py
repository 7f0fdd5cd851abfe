#!/usr/bin/env python
"""Recomputes the measured numbers of the project's pages from the logs that ship with it.

    python scripts/check_claims.py

A claim is a sentence or a table row of a page with slots for its numbers, and what computes them. A page says
what the logs say, to the digit, or this says where it does not. On the pages in `WHOLE` every other number is
one that nothing measured: a version, an option, a layout.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

# The checkout's own, from any folder.
from claims.claim import NUMBER, Claim  # noqa: E402
from claims.pages import every_claim  # noqa: E402

from puzzle.errors import exit_code  # noqa: E402

WHOLE = ("README.md", "docs/peers.md", "docs/artifact.md")
"""Pages without a measured number that no claim has."""


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
    for pattern, _ in (*UNMEASURED, *UNMEASURED_ON.get(name, ())):
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
    (r"\]\([^)]*\)|<img [^>]*>", "links and pictures"),
    (r"USENIX ATC '24|Python 3\.11|Debian 12", "names and versions"),
    (r"figures? \d+(-\d+)?|table \d", "the paper's"),
    (r"(tp|pp) \d", "a drawing's layouts"),
    (r"\| \d+-\d+ GPUs|1-8 GPUs|on 32 GPUs|32 GPUs were", "sizes of scales"),
    (r"verl 0\.9\.1 \+ vLLM 0\.26\.0|1\.3B|7B|350M|13B|H200|95 %|1\.96|UTF-8", "what was run"),
    (r"(takes )?[23] MB( \||,)", "what the files of a folder take, rounded up"),
    (r"ZeRO-3|2-core host|64 sequences of 256 \+ 256 tokens, bf16", "the work"),
    (r"(after|of) 32 iterations|(all )?80,? (held-out|good)", "the work"),
    (r"\(seed 0; |12-year-old|Apache-2\.0", "a seed, what a model wrote, the licence"),
]
"""What is no measured number on a page, and why; removed in this order."""
UNMEASURED_ON = {
    "docs/peers.md": [
        (r"## Again .*?(?=## Not measured)", "commands, what they need, and minutes by estimate"),
        (
            r"Measured on 2026-11-29|commit (e62b24e|edb420f)|verl 0\.9\.1|vLLM 0\.26\.0|DeepSpeed 0\.19\.8",
            "what was run",
        ),
        (
            r"V1 engine|FlashAttention 3|Megatron-core 0\.16\.1|TRL 1\.16\.0|torch 2\.13|SmolLM2-135M",
            "what was run",
        ),
        (r"fp32|bf16|16-bit", "dtypes"),
        (r"(mean|at most) \d+\)?|prompts of 64 to 1024 tokens|8 samples of each|temperature 1", "the work"),
        (r"256 \+ 256 tokens|all responses have 256 tokens|0\.4 of the memory", "the work"),
    ],
    "docs/artifact.md": [
        (r"## Kick the tires .*?(?=## Claims)", "commands and their minutes"),
        (r"\| C\d+ \||Figures 8-12|and 12 of smaller pairs", "names"),
        (
            r"\| (CPU|[\dN] GPUs?(, NVLink)?|\d|2 cores) +\| [\d; ]+( a seed)?( \||(?= at equal))",
            "devices and minutes by estimate",
        ),
        (r"transformers, 1e-5|\+-10 %|within 2 % of the peak|by at least 0\.3", "tolerances"),
        (
            r"0\.3-0\.6 of Megatron|within 5 % end to end, 8 % per stage|training: 0\.1 to 0\.7 of it",
            "tolerances",
        ),
        (
            r"and 33B actors|33B wants 32 GPUs|on their 32 GPUs|32 A800 on PCIe, 32 A100|1 to 8 GPUs",
            "machines",
        ),
        (r"16 sequences per GPU", "the work"),
        (r"transformers 4\.35\.2|tokenizers 0\.15\.2|huggingface-hub 0\.23\.5|Qwen[23]", "versions"),
        (r"up to 2\.12x|and 2\.12", "the paper's"),
        (r"bf16|fp32|fp16|fp8", "dtypes"),
    ],
}
"""The same of single pages."""


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
