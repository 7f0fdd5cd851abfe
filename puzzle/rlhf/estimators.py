"""What n samples of a prompt say of k: the chance that one of k is right, or that the majority of k is."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import comb


def pass_at(right: int, samples: int, k: int) -> float:
    """The chance that one of `k` samples is right, of `samples` drawn of which `right` are: 1 - C(n - c, k) /
    C(n, k), which is unbiased for k <= n.

    Source: Chen et al. 2021 (arXiv:2107.03374), equation 1.
    """
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def majority_at(answers: Sequence[Hashable], right: Sequence[bool], k: int) -> float:
    """The chance that the most frequent answer of `k` samples is right; ties are broken by lot.

    The mean over all subsets of k of the n samples, which is unbiased for k <= n (a U-statistic: Hoeffding
    1948); the majority is that of Wang et al. 2022 (arXiv:2203.11171). Samples with equal answers must be
    right together.
    """
    counts: dict[Hashable, int] = {}
    correct: dict[Hashable, bool] = {}
    for answer, good in zip(answers, right, strict=True):
        counts[answer] = counts.get(answer, 0) + 1
        if correct.setdefault(answer, good) != good:
            raise ValueError(f"the answer {answer!r} is right and wrong")
    won = 0.0
    for answer, count in counts.items():
        if not correct[answer]:
            continue
        others = [other for name, other in counts.items() if name != answer]
        for votes in range(1, min(count, k) + 1):
            ways = comb(count, votes)
            for ties, number in enumerate(_ways(others, k - votes, votes)):
                won += ways * number / (ties + 1)
    return won / comb(len(answers), k)


def _ways(counts: Sequence[int], k: int, votes: int) -> list[int]:
    """In how many ways `k` samples can be taken of answers with these counts, none more than `votes` times:
    by how many of the answers are taken `votes` times."""
    # table[t][j]: ways to have taken j samples, with t answers at `votes`.
    table = [[1] + [0] * k]
    for count in counts:
        after = [[0] * (k + 1) for _ in range(len(table) + 1)]
        for ties, row in enumerate(table):
            for taken, ways in enumerate(row):
                for more in range(min(count, votes, k - taken) + 1) if ways else ():
                    after[ties + (more == votes)][taken + more] += ways * comb(count, more)
        table = after
    return [row[k] for row in table]
