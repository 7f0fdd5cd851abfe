"""A reward that takes time and nothing else; its processes import no more than this."""

from __future__ import annotations

import time
from collections.abc import Sequence


def sleeps(prompts: Sequence[str]) -> list[float]:
    """As many seconds as each prompt says."""
    for prompt in prompts:
        time.sleep(float(prompt))
    return [0.0] * len(prompts)
