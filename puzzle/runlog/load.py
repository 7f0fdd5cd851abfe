"""Finds and reads all runs under a folder, ours and published ones."""

import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from puzzle.errors import UserError
from puzzle.runlog.published.read import log_name, read_published
from puzzle.runlog.reader import read_jsonl
from puzzle.runlog.run import Loaded, Report, Run

_OURS = "run.jsonl"
_NEVER_RUNS = ("samples.jsonl",)


def load_runs(root: Path) -> Loaded:
    """Every run under `root` (or in the one log `root`), each once, with what was wrong.

    Where several published logs are of one run, the newest by the time in its name counts. What cannot be
    read is reported.

    Raises:
        UserError: `root` is missing, nothing under it can be read as a run, or two logs disagree on one run.
    """
    root = Path(root)
    if not root.exists():
        raise UserError(f"{root} does not exist; give the folder that holds the logs")
    reports: list[Report] = []
    runs: list[Run] = []
    for path in _files(root, reports):
        try:
            read = _read(path)
        except OSError as error:
            reports.append(Report(str(path), None, f"cannot be read: {error.strerror}"))
            continue
        if isinstance(read, Run):
            runs.append(read)
        else:
            reports.extend(read)
    if not runs:
        why = (
            f"; {reports[0].source}: {reports[0].what}" if reports else ": no *.jsonl and no published *.log"
        )
        raise UserError(f"no readable run under {root}{why}")
    return Loaded(_each_once(runs, reports), tuple(reports))


def _files(root: Path, reports: list[Report]) -> Iterator[Path]:
    """Files that look like logs, in order of name."""
    if root.is_file():
        yield root
        return

    def unreadable(error: OSError) -> None:
        reports.append(Report(str(error.filename), None, f"cannot be read: {error.strerror}"))

    for folder, folders, names in os.walk(root, onerror=unreadable):
        folders.sort()
        for name in sorted(names):
            # run.log tells people what run.jsonl beside it tells programs.
            mine = _OURS in names and name.endswith(".log")
            if name.endswith((".jsonl", ".log")) and name not in _NEVER_RUNS and not mine:
                yield Path(folder, name)


def _read(path: Path) -> Run | tuple[Report, ...]:
    if not path.is_file():
        return (Report(str(path), None, "not a regular file: not used"),)
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    name = log_name(path)
    if name is None:
        what = "not named like a published log (llama_ACTOR_CRITIC_VARIANT_TIME.log): not used"
        return (Report(str(path), None, what),)
    return read_published(path, name)


def _each_once(runs: list[Run], reports: list[Report]) -> tuple[Run, ...]:
    kept: dict[tuple[str, int], Run] = {}
    for run in runs:
        key = (run.run_id, run.repeat)
        known = kept.get(key)
        if known is None:
            kept[key] = run
            continue
        choose = _newer if known.provenance == run.provenance == "published" else _longer
        kept[key], what = choose(known, run)
        reports.append(Report(kept[key].source, None, what))
    return tuple(kept.values())


def _newer(one: Run, other: Run) -> tuple[Run, str]:
    """Of two published logs of one run, the newer by its name's time; of the same time, the first."""
    old, new = sorted((other, one), key=_started)
    if _started(old) == _started(new):
        shared = old.printed.keys() & new.printed.keys()
        same = all(old.printed[key] == new.printed[key] for key in shared)
        numbers = "the same numbers" if same else "OTHER numbers"
        return new, f"used for {new.run_id}; {old.source} has the same time and {numbers}"
    return new, f"used for {new.run_id}: newer than {old.source}"


def _started(run: Run) -> float:
    return float("-inf") if run.started is None else datetime.fromisoformat(run.started).timestamp()


def _longer(one: Run, other: Run) -> tuple[Run, str]:
    """Of two copies of one run of ours, the one that goes on longer; they must agree."""
    for name in ("provenance", "figures", "cluster", "variant", "actor", "critic", "config", "layouts"):
        if getattr(one, name) != getattr(other, name):
            raise UserError(
                f"{one.source} and {other.source} are both repeat {one.repeat} of run {one.run_id} "
                f"and disagree on {name}; remove one"
            )
    short, long = sorted((one, other), key=lambda run: len(run.iterations))
    if not set(map(repr, short.iterations)) <= set(map(repr, long.iterations)):
        raise UserError(
            f"{one.source} and {other.source} are both repeat {one.repeat} of run {one.run_id} "
            "and hold other iterations; remove one"
        )
    return long, f"used for {long.run_id}; {short.source} is a copy of it"
