"""Runs and logs to draw, small or in the published formats."""

import csv
from pathlib import Path
from typing import Any

from puzzle.runlog import Run, RunWriter, load_runs
from puzzle.runlog.records import End, Iteration, Printed
from tests.runlog import texts

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "logs" / "published"
TIMES = {"e2e": (9.0, 2.0, 4.0)}
with (PUBLISHED / "figures.csv").open(newline="") as _file:
    TABLE: list[tuple[Any, ...]] = [(*row[:4], float(row[4]), row[5]) for row in list(csv.reader(_file))[1:]]
"""Every published number: figure, cluster, configuration, series, value, unit."""


def run(variant="opt", pair="7B/350M", printed: Any = TIMES, records: Any = (), **changes: Any) -> Run:
    """A run of figure 8 with three iterations; `records` are more that its log has."""
    actor, critic = pair.split("/")
    fields: dict[str, Any] = {
        "run_id": f"{pair}-{variant}",
        "repeat": 0,
        "figures": ("figure8",),
        "cluster": "orion",
        "variant": variant,
        "actor": actor,
        "critic": critic,
        "config": {"global_batch_size": 128, "micro_batch_size": 4},
        "layouts": {"training": {"tp": 1, "pp": 8, "dp": 1}},
        "provenance": "measured",
        "software": {},
        "hardware": {},
        "git_commit": None,
        "started": "2026-11-22T12:00:00+00:00",
        "source": f"{pair}-{variant}.jsonl",
        "records": (*records, *(Printed(name, "s", row) for name, row in printed.items()), End("completed")),
        "reports": (),
    }
    return Run(**{**fields, **changes})


def write(folder: Path, variant="opt", seconds=(9.0, 2.0, 4.0), **changes: Any) -> Path:
    """A log of ours with these end-to-end seconds."""
    with RunWriter(folder, texts.header(**{"run_id": variant, "variant": variant, **changes})) as writer:
        for index, e2e in enumerate(seconds):
            parts, total = texts.stages(e2e / 2, e2e / 8, e2e / 4, e2e / 8)
            writer.write(Iteration(index, parts, total, {}))
        writer.write(End("completed"))
    return folder


def figure8(folder: Path, variants=("dschat", "base", "opt"), **changes: Any) -> Path:
    """Logs of one pair of figure 8."""
    for index, variant in enumerate(variants):
        write(folder / variant, variant, seconds=(9.0, 8.0 - 2 * index, 8.0 - 2 * index), **changes)
    return folder


def raw_tree(folder: Path) -> Path:
    """The shipped runs, written out as logs in the published formats."""
    for one in load_runs(PUBLISHED).runs:
        if one.variant != "theoretical":
            path = folder / one.source
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = _chat(one) if one.variant == "dschat" else _puzzle(one)
            path.write_bytes(texts.as_bytes([*_arguments(one), *lines]))
    return folder


def _arguments(one: Run) -> list[str]:
    values: dict[str, Any] = dict(one.config)
    training = one.layouts["training"]
    generation = one.layouts.get("generation", training)
    sizes = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size"}
    values |= {name: training[axis] for axis, name in sizes.items()}
    values |= {f"shadow_{name}": generation[axis] for axis, name in sizes.items()}
    values |= {"data_parallel_size": training["dp"], "use_shadow": generation != training}
    values |= {"world_size": training["tp"] * training["pp"] * training["dp"]}
    return [texts.argument(name, value) for name, value in values.items()]


def _puzzle(one: Run) -> list[str]:
    lines = []
    times = one.printed
    for step, e2e in enumerate(times["e2e"]):
        stages = (times[name][step] for name in ("generation", "inference", "training"))
        line = texts.puzzle_line(step, *(1e3 * seconds for seconds in stages))
        if "reshard" in times:
            lines.append(texts.reshard_line(times["reshard"][step]))
        lines.append(f"{line.rpartition(': ')[0]}: {1e3 * e2e:.3f}")
    return lines


def _chat(one: Run) -> list[str]:
    """Training lines first, as another node's are; the published script reads the last word of each."""
    times = one.printed
    lines = [
        f"Training time: {seconds}" if seconds else "Training time: 9.4 Unsupervised Loss: 0.0"
        for seconds in times.get("training", ())
    ]
    for step in range(len(times.get("generation", times["gather"]))):
        if "generation" in times:
            lines.append(
                f"Generation time: {times['generation'][step]}, exp gen time: {times['experience'][step]}"
            )
        lines += [texts.step_line(step % 10).replace("Step: 0", f"Step: {step}")]
        lines[-1] = lines[-1].replace(f"Step: {step % 10} ", f"Step: {step} ")
        if step < len(times["e2e"]):
            lines.append(texts.engine_line(times["e2e"][step], times["gather"][step], 1.0, 1.0))
    return lines


def read(path: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    """The rows of a CSV by cluster, configuration and series."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {(row["cluster"], row["config"], row["series"]): row for row in rows}
    assert len(found) == len(rows)
    return found
