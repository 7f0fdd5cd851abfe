"""Which runs a figure draws, and how they fall into panels, configurations and repeats."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from statistics import fmean
from typing import Any, NamedTuple

from puzzle.errors import UserError
from puzzle.runlog import NO_HYBRID_ENGINE, UNFAITHFUL
from puzzle.runlog.records import GAP
from puzzle.runlog.run import Run

REAL = ("measured", "published")
ORDER = {"published": 0, "measured": 1}
WARM_UP = 1
"""Iterations left out of every mean."""
COPY = "copy"
"""The kind of a log's note that it is the copy of another run's log."""
SAME = {"wo_bulk": "base", "train_opt": "base"}
"""Variants that are another one: figures without the latter draw its runs under their own name."""


class Panel(NamedTuple):
    """One panel: runs of one cluster and one provenance; other provenances have panels of their own."""

    cluster: str
    provenance: str


@dataclass(frozen=True)
class Pool:
    """The repeats of one run, and the remarks on them."""

    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()

    def noted(self, *notes: str) -> "Pool":
        """The same runs with further remarks."""
        return replace(self, notes=self.notes + notes)

    @property
    def logs(self) -> tuple[str, ...]:
        """The logs behind this pool."""
        return tuple(run.source for run in self.runs)


Grid = dict[Panel, dict[str, dict[str, Pool]]]
"""Panel -> configuration -> variant -> repeats."""


def pair(run: Run) -> str:
    """The configuration of most figures: `ACTOR/CRITIC`."""
    return run.pair


def pair_order(config: str) -> tuple[float, ...]:
    """Sorts configurations by the critic's size, then the actor's."""
    return tuple(_size(name) for name in reversed(config.split(" ")[0].split("/")))


def _size(name: str) -> float:
    match = re.search(r"(\d+(?:\.\d+)?)\s*([MB])", name, re.IGNORECASE)
    return 0.0 if match is None else float(match[1]) * (1e9 if match[2] in "Bb" else 1e6)


def grid(
    runs: Iterable[Run],
    figure: str,
    variants: Iterable[str],
    config_of: Callable[[Run], str] = pair,
    order: Callable[[str], tuple[float, ...]] = pair_order,
) -> Grid:
    """The runs of `figure` with one of `variants`, by panel, configuration and variant, all sorted: published
    clusters first, then measured ones, rehearsals last.

    Raises UserError where two runs claim the same repeat, or repeats of one run are of different jobs.
    """
    known = {variant: variant for variant in variants}
    known |= {other: name for name, other in SAME.items() if name in known and other not in known}
    found: dict[Panel, dict[str, dict[str, list[Run]]]] = {}
    for run in runs:
        if figure in run.figures and run.variant in known:
            configs = found.setdefault(Panel(run.cluster, run.provenance), {})
            configs.setdefault(config_of(run), {}).setdefault(known[run.variant], []).append(run)
    result: Grid = {}
    for panel in sorted(found, key=lambda panel: (ORDER.get(panel.provenance, len(ORDER)), panel)):
        configs = found[panel]
        result[panel] = {
            config: {variant: _pool(repeats, figure) for variant, repeats in configs[config].items()}
            for config in sorted(configs, key=lambda config: (order(config), config))
        }
    return result


def gap(run: Run) -> str:
    """Why a planned run has no numbers; empty for any other."""
    return next((str(note.get("text")) for note in run.notes if note.get("kind") == GAP), "")


def _pool(runs: Sequence[Run], figure: str) -> Pool:
    runs, tried = _fastest([run for run in runs if not gap(run)] or runs[:1])
    repeats: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: (run.repeat, run.source)):
        first = repeats.setdefault(run.repeat, run)
        if first is not run and not agree(first, run):
            raise UserError(
                f"{first.source} and {run.source} are both repeat {run.repeat} of {figure} {run.cluster} "
                f"{pair(run)} {run.variant} and disagree; remove one, or give them different repeat ids"
            )
    kept = tuple(repeats.values())
    for run in kept[1:]:
        different = difference(kept[0], run)
        if different or run.layouts != kept[0].layouts:
            raise UserError(
                f"{kept[0].source} and {run.source} cannot be repeats of one run of {figure}: "
                f"{different or 'their layouts differ'}; draw them from two folders, one after the other"
            )
    copied = (note for run in kept for note in run.notes if note.get("kind") == COPY)
    return Pool(kept, (*tried, *(str(note.get("text", COPY)) for note in copied)))


def _fastest(runs: Sequence[Run]) -> tuple[Sequence[Run], tuple[str, ...]]:
    """Of a DeepSpeed-Chat baseline that was run in several settings, the runs in the fastest; remarks.

    A setting whose generation draws other tokens than its weights give counts only where all do.
    """
    settings: dict[str, list[Run]] = {}
    for run in runs:
        settings.setdefault(json.dumps(_setting(run), sort_keys=True), []).append(run)
    seconds = {
        key: fmean(known)
        for key, members in settings.items()
        if (known := [mean for run in members if (mean := late_mean(run, "e2e")) is not None])
    }
    wrong = {key for key, members in settings.items() if any(map(_unfaithful, members))}
    best = min(settings, key=lambda key: (key in wrong, seconds.get(key, math.inf), key))
    chosen = settings[best]
    engine = _setting(chosen[0])
    said = []
    if engine.get("hybrid_engine_engaged") is False:
        asked = f", which could not engage: {engine.get('hybrid_engine_obstacle')}"
        said.append(NO_HYBRID_ENGINE + asked * bool(engine.get("enable_hybrid_engine")))
    if len(settings) > 1:
        differing = [k for k in engine if len({json.dumps(json.loads(s).get(k)) for s in settings}) > 1]

        def told(key: str) -> str:
            time = f"{seconds[key]:.4g} s" if key in seconds else "no time"
            mark = " (its tokens are not its weights')" if key in wrong else ""
            return f"{time} with {_words(json.loads(key), differing)}{mark}"

        others = "; ".join(told(key) for key in settings if key != best)
        said.append(f"the fastest of {len(settings)} settings: {told(best)}; others: {others}")
    elif wrong:
        said.append(UNFAITHFUL)
    return chosen, tuple(said)


def _unfaithful(run: Run) -> bool:
    return any(UNFAITHFUL in report.what for report in run.reports)


def _setting(run: Run) -> dict[str, Any]:
    """How a baseline's log says that DeepSpeed ran; empty for other runs."""
    told, ppo = run.config.get("deepspeed"), run.config.get("algorithm", run.config.get("ppo"))
    if not isinstance(told, Mapping):
        return {}
    return {**told, "microbatch": ppo.get("microbatch") if isinstance(ppo, Mapping) else None}


def _words(setting: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Values of the keys; of switches, the names of those that are on."""
    values = {key: setting.get(key) for key in keys}
    return ", ".join(k if v is True else f"{k} {v}" for k, v in values.items() if v is not False)


def titles(panels: Iterable[Panel]) -> dict[Panel, str]:
    """What to call each panel: its cluster; its provenance too where that is not real or not the only one, in
    the figure or of the cluster. Published ones are told from others by that alone."""
    panels = list(panels)
    real = [panel for panel in panels if panel.provenance in REAL]
    several = len({panel.provenance for panel in real}) > 1
    plain = {
        panel: not several or panel.provenance == "published"
        for panel in real
        if sum(panel.cluster == other.cluster for other in real) == 1
    }
    return {
        panel: panel.cluster if plain.get(panel) else f"{panel.cluster} ({panel.provenance})"
        for panel in panels
    }


def cells(pools: Grid, variants: Iterable[str]) -> Iterator[tuple[Panel, str, str, Pool | None]]:
    """Every cell that the figure should have; its pool is None where no log was found."""
    variants = tuple(variants)
    for panel, configs in pools.items():
        for config, by_variant in configs.items():
            for variant in variants:
                yield panel, config, variant, by_variant.get(variant)


def agree(one: Run, other: Run) -> bool:
    """Whether two logs can be of one run: what both print is the same; one may print more."""
    both = one.printed.keys() & other.printed.keys()
    return bool(both) and all(
        len(one.printed[name]) == len(other.printed[name])
        and all(map(math.isclose, one.printed[name], other.printed[name]))
        for name in both
    )


def series(run: Run, quantity: str) -> tuple[float, ...]:
    """Seconds per iteration of `quantity`, the warm-up first, as the log prints them."""
    return run.printed.get(quantity, ())


def is_time(value: float) -> bool:
    """Whether `value` can be a duration."""
    return math.isfinite(value) and value >= 0


def late_mean(run: Run, quantity: str) -> float | None:
    """Mean seconds after the warm-up, or None."""
    good = [value for value in series(run, quantity)[WARM_UP:] if is_time(value)]
    return fmean(good) if good else None


def job(run: Run) -> dict[str, float]:
    """What must be alike in two runs for their times to compare, as far as logs say: devices and batch."""
    facts: dict[str, float] = {}
    training = run.layouts.get("training")
    if isinstance(training, Mapping):
        sizes = [training.get(axis) for axis in ("tp", "pp", "dp")]
        if all(isinstance(size, int) for size in sizes):
            facts["devices"] = math.prod(sizes)
    batch = run.config.get("global_batch_size")
    if isinstance(batch, int):
        facts["global batch"] = batch
    return facts


def difference(one: Run, other: Run) -> str:
    """How the jobs of two runs differ, in words; empty where they do not."""
    first, second = job(one), job(other)
    return ", ".join(
        f"{what} {first[what]:g} and {second[what]:g}"
        for what in first
        if what in second and first[what] != second[what]
    )


def log_name(run: Run) -> str:
    """The file name of a run's log, which figures that share a run share too."""
    return PurePosixPath(run.source).name
