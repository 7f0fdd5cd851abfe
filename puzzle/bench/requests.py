"""The random requests of `puzzle bench generate`, which other systems can be asked as well.

How long prompts and responses are, and the prompts' tokens, follow from what is asked for alone.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from puzzle.cli import whole
from puzzle.errors import UserError, describe
from puzzle.files.limits import MOST_TOKENS

Given = tuple[list[int], list[int]]
"""Tokens of every sequence's prompt, and of its response."""


def span(text: str) -> tuple[int, int]:
    """The ends of "64-1024", or 256 twice for "256"."""
    least, _, most = text.partition("-")
    ends = whole(1, MOST_TOKENS)(least), whole(1, MOST_TOKENS)(most or least)
    if ends[0] > ends[1]:
        raise argparse.ArgumentTypeError(f"{text}: write the smaller number first, as 64-1024")
    return ends


@dataclass(frozen=True, kw_only=True)
class Requests:
    """`samples` sequences of each prompt, whose tokens are from `prompt[0]` to `prompt[1]`; at most `new`
    tokens of each, of mean `mean` (None: a quarter of `new`) where their lengths are exponential."""

    prompt: tuple[int, int] = (256, 256)
    samples: int = 1
    new: int = 256
    mean: int | None = None

    def given(self, count: int, lengths: str) -> Given:
        """What `count` sequences read and write, where `lengths` is fixed, exponential or a file of numbers,
        one in a line. UserError for a file without such numbers."""
        generator = torch.Generator().manual_seed(count)
        drawn = torch.randint(self.prompt[0], self.prompt[1] + 1, (self.prompts(count),), generator=generator)
        read = drawn.repeat_interleave(self.samples)[:count].tolist()
        if lengths == "fixed":
            return read, [self.new] * count
        if lengths == "exponential":
            rate = 1 / (self.mean or self.new / 4)
            ends = torch.empty(count).exponential_(rate, generator=torch.Generator().manual_seed(count))
            return read, ends.ceil().clamp(1, self.new).int().tolist()
        wanted = _numbers(Path(lengths), self.new)
        return read, [wanted[row % len(wanted)] for row in range(count)]

    def prompts(self, count: int) -> int:
        """How many different prompts `count` sequences have."""
        return -(-count // self.samples)

    def tokens(self, read: list[int], vocabulary: int) -> list[list[int]]:
        """The prompt of each sequence, of the lengths `read`; the samples of a prompt have the same."""
        generator = torch.Generator().manual_seed(len(read))
        shape = (self.prompts(len(read)), max(read))
        drawn = torch.randint(0, vocabulary, shape, generator=generator).tolist()
        return [drawn[row // self.samples][:length] for row, length in enumerate(read)]


def _numbers(path: Path, most: int) -> list[int]:
    """Whole numbers from 1 to `most`, one in a line. UserError for anything else."""
    try:
        found = [int(line) for line in path.read_text().split()]
    except (OSError, ValueError) as error:
        why = describe(error) if isinstance(error, OSError) else error
        raise UserError(f"--lengths: {why}; give fixed, exponential or a file of numbers") from None
    if not found or not all(1 <= number <= most for number in found):
        raise UserError(f"--lengths {path}: give numbers from 1 to {most} (--new), one in a line")
    return found
