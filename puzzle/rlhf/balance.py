"""Which rows of a batch each replica takes, so that none has many more tokens than the others."""

from __future__ import annotations

from collections.abc import Sequence

from puzzle.engine.pipeline.model import share


def contiguous(count: int, replicas: int) -> list[list[int]]:
    """Positions 0 to count - 1 in runs, one per replica; sizes differ by one at most."""
    return [list(share(count, replicas, replica)) for replica in range(replicas)]


def balanced(lengths: Sequence[int], replicas: int) -> list[list[int]]:
    """Positions of `lengths` per replica, ascending, as many for each as `contiguous` gives.

    Longest first to the replica with the fewest tokens that has room (of several, one that takes a row less),
    equally long ones in their order: LPT (Graham 1969, doi:10.1137/0117039) with equal numbers of rows. Those
    keep numbers of micro-batches, and the most that a replica can have to hold, as they are. Every rank knows
    all lengths and comes to the same answer; of one replica it is all rows in their order.
    """
    rooms = [len(part) for part in contiguous(len(lengths), replicas)]
    rows: list[list[int]] = [[] for _ in rooms]
    loads = [0] * replicas
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        free = (r for r in range(replicas) if len(rows[r]) < rooms[r])
        least = min(free, key=lambda r: (loads[r], rooms[r], r))
        rows[least].append(position)
        loads[least] += lengths[position]
    return [sorted(part) for part in rows]
