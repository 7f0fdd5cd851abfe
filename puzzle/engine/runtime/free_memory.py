"""How much memory a process may still take: what the host has free, and what its control group leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# (limit, in use, the lines of memory.stat with what is given back where it is needed: files' pages, which the
# system counts as available, too), of both versions of cgroups.
_FILES = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)


@dataclass(frozen=True)
class FreeMemory:
    """`bytes` that a rank may take; `told` says whose they are, in front of the number."""

    bytes: int
    told: str


def host_free(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that programs of this host may take without swapping, no more than the control groups of this
    process (a container, a Slurm step) leave; None where the system does not say."""
    found = [*_available(proc / "meminfo"), *_left(proc / "self/cgroup", groups)]
    return min(found, default=None)


def _available(meminfo: Path) -> Iterator[int]:
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) << 10


def _left(own: Path, groups: Path) -> Iterator[int]:
    """What the limit of each group around this process leaves."""
    for line in _lines(own):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = groups / "memory" if controllers else groups
        place = root / path.lstrip("/")
        # A container may not see the path that its host knows; its own group is the root then.
        for folder in [place, *place.parents]:
            yield from _of_group(folder)
            if folder == root:
                break


def _of_group(folder: Path) -> Iterator[int]:
    for limit, usage, dropped in _FILES:
        most, used = (next(_lines(folder / name), "") for name in (limit, usage))
        if most.isdigit() and used.isdigit():
            stat = dict(line.split() for line in _lines(folder / "memory.stat"))
            back = sum(int(stat.get(name, 0)) for name in dropped)
            yield max(0, int(most) - max(0, int(used) - back))


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return
