"""Writes the sums of two-digit numbers that examples/arithmetic.yaml trains on, and others that are held out.

    python examples/arithmetic.py examples/prompts

Each line: `id`, `prompt` (a solved sum, which shows the form, then an open one) and `answer`.
"""

import json
import random
import sys
from pathlib import Path

SHOWN = "24 + 13 = 37\n"
TRAIN, HELD_OUT = 2000, 256


def main(folder: Path) -> None:
    """Draw pairs without repetition; no sum is in both files."""
    numbers = random.Random(0)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    drawn = numbers.sample(pairs, TRAIN + HELD_OUT)
    for name, part in (("train", drawn[HELD_OUT:]), ("held-out", drawn[:HELD_OUT])):
        lines = (
            json.dumps({"id": f"{a}+{b}", "prompt": f"{SHOWN}{a} + {b} =", "answer": str(a + b)}) + "\n"
            for a, b in part
        )
        (folder / f"arithmetic-{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
