#!/usr/bin/env python
"""What-if pictures of docs/planner.md, all simulated: `python scripts/whatif.py` makes them anew.

A 7B actor and a 7B critic, 16 sequences of 256 + 256 tokens per device, the best plan of every question by
the data sheet of an H200: with and without each idea from 8 to 1,024 devices, over NVLink and over PCIe, for
lengths of responses, for critic sizes; and the work of the published runs in their layouts and in others.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from puzzle.cli.workloads import measured_runs
from puzzle.plan.layout import Layout
from puzzle.plan.predict.calibration import Calibration, read_calibration
from puzzle.plan.predict.costs import Costs
from puzzle.plan.predict.iteration import Part, Workload, predict
from puzzle.plan.predict.job import Job, Role, Sizes
from puzzle.plan.predict.lengths import Lengths
from puzzle.plan.predict.rates import Rates
from puzzle.plan.predict.search import predicted, search
from puzzle.spec.model import ModelSpec
from puzzle.spec.published import published

ROOT = Path(__file__).resolve().parents[1]
PICTURES, LOGS = ROOT / "docs" / "pictures", ROOT / "logs" / "published"
DEVICES = (8, 16, 32, 64, 128, 256, 512, 1024)
PER_DEVICE, PROMPT, RESPONSE = 16, 256, 256
PCIE = 32e9 * 0.8
"""Bytes/s of PCIe 4.0 x16 in one direction, as much of it reached as of other links."""
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
CRITICS = ("350m", "7b", "13b", "33b")
Points = list[tuple[float, float]]


@cache
def cut(spec: ModelSpec, laid: Sizes) -> Layout:
    """Even stages."""
    return Layout.even(*laid, spec.num_layers)


def job(
    devices: int,
    memory: int,
    *,
    actor: str = "7b",
    critic: str = "7b",
    sequences: int | None = None,
    response: int = RESPONSE,
    without: Sequence[str] = (),
    graphs: bool = True,
    lengths: Lengths | None = None,
) -> Job:
    """PPO with four models; the reward is of the critic's size."""
    spec, value = published(actor), replace(published(critic), head="value")
    part, batch = Part(spec, cut(spec, (1, 1, 1))), sequences or PER_DEVICE * devices
    work = Workload(
        actor=part,
        generation=part.layout,
        trained=(part,),
        inferred=(part,),
        stepped=2,
        sequences=batch,
        minibatch=batch,
        steps=1,
        prompt=PROMPT,
        response=response,
        microbatch=None,
        graphs=graphs,
        lengths=lengths,
    )
    roles = (Role("actor", spec, True), Role("critic", value, True))
    roles += (Role("reference", spec, False), Role("reward", value, False))
    return Job(
        roles=roles,
        trained=("actor", "critic"),
        inferred=("reference", "critic", "reward"),
        work=work,
        layout=cut,
        ranks=devices,
        per_node=min(8, devices),
        memory=memory,
        itemsize=2,
        fused=True,
        compiled=False,
        staging=1 << 28,
        exact=False,
        without=frozenset(without),
    )


def best(one: Job, costs: Costs) -> float:
    """Seconds of the best plan."""
    return search(one, costs, 1).plans[0].seconds.total


def ideas(found: Calibration) -> dict[str, Points]:
    """How much longer an iteration takes without each idea, in percent, over devices."""
    lacking: dict[str, dict[str, Any]] = {
        "one layout for both": {"without": ["switch"]},
        "no shared pipelines": {"without": ["fusion"]},
        "no split backwards": {"without": ["split"]},
        "decode without graphs": {"graphs": False},
        "none of these": {"without": ["switch", "fusion", "split"], "graphs": False},
    }
    lines: dict[str, Points] = {name: [] for name in lacking}
    for devices in DEVICES:
        whole = best(job(devices, found.memory_bytes), found.costs)
        for name, options in lacking.items():
            less = best(job(devices, found.memory_bytes, **options), found.costs)
            lines[name].append((devices, 100 * (less / whole - 1)))
    return lines


def links(found: Calibration) -> dict[str, Points]:
    """Seconds over devices, by the links inside machines."""
    rates = found.rates
    ways = {"NVLink": rates, "PCIe": replace(rates, bus=PCIE, message=PCIE)}
    return {
        name: [(devices, best(job(devices, found.memory_bytes), way)) for devices in DEVICES]
        for name, way in ways.items()
    }


def responses(found: Calibration) -> dict[str, Points]:
    """Seconds on 64 devices over the longest response: all of them so long, or exponential of a quarter."""
    lines: dict[str, Points] = {"all at full length": [], "exponential, mean a quarter": []}
    for most in LENGTHS:
        tails = Lengths.exponential(most / 4, most)
        for name, lengths in zip(lines, (None, tails), strict=True):
            one = job(64, found.memory_bytes, response=most, lengths=lengths)
            lines[name].append((most, best(one, found.costs)))
    return lines


def critics(found: Calibration) -> dict[str, Points]:
    """What shared pipelines save on 16 devices, in percent, over the critic's size in billions."""
    lines: dict[str, Points] = {"shared pipelines save": []}
    for critic in CRITICS:
        apart, shared = (
            best(job(16, found.memory_bytes, critic=critic, without=without), found.costs)
            for without in (["fusion"], [])
        )
        billions = published(critic).parameters / 1e9
        lines["shared pipelines save"].append((billions, 100 * (1 - shared / apart)))
    return lines


def regrets(found: Calibration) -> list[dict[str, float]]:
    """In percent: how much longer than the best plan those take that were chosen with constants that are off,
    each by up to 18 % either way."""
    rates, chance = found.rates, random.Random(0)
    rows = []
    for devices in (8, 64, 512):
        one = job(devices, found.memory_bytes)
        best_seconds = best(one, rates)
        lost = []
        for _ in range(12):
            wrong = {name: value * chance.uniform(0.82, 1.18) for name, value in rates.values().items()}
            chosen = search(one, rates.with_values(wrong), 1).plans[0].choice
            lost.append(100 * (predicted(one, chosen, rates).total / best_seconds - 1))
        rows.append({"devices": devices, "mean": sum(lost) / len(lost), "most": max(lost)})
    return rows


def paper() -> list[dict[str, Any]]:
    """The runs of figure 8 with both switches, and the best plan for the same work and devices: by the
    calibration of the cluster, with what the published engine can do, in the memory that ours would take."""
    rows = []
    for run in measured_runs([LOGS / "figure8"]):
        work = run.work
        if run.run.variant != "opt":
            continue
        found = read_calibration(f"published-{run.run.cluster}")
        devices = work.actor.layout.world
        one = job(
            devices,
            found.memory_bytes,
            actor=run.run.actor.lower(),
            critic=(run.run.critic or "").lower(),
            sequences=work.sequences,
            graphs=False,
            without=["split", "recompute", "offload"],
        )
        plan = search(one, found.costs, 1).plans[0]
        choice = plan.choice
        rows.append(
            {
                "run": run.run.run_id,
                "devices": devices,
                "layouts": f"{work.actor.layout} -> {work.generation}",
                "measured": run.end_to_end,
                "predicted": predict(work, found.costs).total,
                "best": plan.seconds.total,
                "best layouts": " -> ".join(
                    ",".join(map(str, sizes)) for sizes in (choice.training, choice.generation)
                ),
            }
        )
    return rows


def _draw(panels: Mapping[str, tuple[str, str, Mapping[str, Points]]], grounds: str, stem: Path) -> None:
    from matplotlib.figure import Figure

    from puzzle.plotting.style import BASELINE, GREY, INK, MIDDLE, OTHER, OURS, SMALL, applied

    with applied():
        figure = Figure(figsize=(7.0, 4.6), layout="constrained")
        for axes, (title, (across, up, lines)) in zip(
            figure.subplots(2, 2).flatten(), panels.items(), strict=True
        ):
            for (name, points), colour in zip(
                lines.items(), (OURS, OTHER, MIDDLE, BASELINE, INK), strict=False
            ):
                axes.plot(*zip(*points, strict=True), marker="o", markersize=2.5, color=colour, label=name)
            axes.set_xscale("log", base=2)
            ticks = [x for x, _ in next(iter(lines.values()))]
            axes.set_xticks(ticks, [f"{x:,.3g}" if x < 100 else f"{x:,.0f}" for x in ticks], fontsize=SMALL)
            axes.minorticks_off()
            axes.set_ylim(0, 1.4 * max(y for points in lines.values() for _, y in points))
            axes.set_title(title)
            axes.set_xlabel(across)
            axes.set_ylabel(up)
            axes.legend(frameon=False, fontsize=SMALL, ncols=2, loc="upper left")
            axes.text(
                0.5, 0.5, "simulated", transform=axes.transAxes, size=20, color=GREY, alpha=0.28,
                ha="center", va="center", rotation=12, gid="watermark",
            )  # fmt: skip
        figure.suptitle(f"Simulated: {grounds}")
        figure.savefig(stem.with_suffix(".png"), dpi=150, metadata={"Software": None})


def main() -> None:
    """Search, draw, and write the numbers beside the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PICTURES, metavar="DIR")
    parser.add_argument("--calibration", default="h200", metavar="C", help="one of constants")
    given = parser.parse_args()
    found = read_calibration(given.calibration)
    assert isinstance(found.costs, Rates)
    across, seconds = "devices", "seconds an iteration"
    panels = {
        "without an idea": (across, "% longer", ideas(found)),
        "links inside machines": (across, seconds, links(found)),
        "responses, 64 devices": ("longest response, tokens", seconds, responses(found)),
        "critic, 16 devices": ("critic, billions of parameters", "% saved", critics(found)),
    }
    grounds = (
        f"7B and 7B, {PER_DEVICE} sequences of {PROMPT} + {RESPONSE} tokens per device, {given.calibration}"
    )
    _draw(panels, grounds, given.out / "whatif")
    numbers = {title: lines for title, (_, _, lines) in panels.items()}
    text = json.dumps({"grounds": grounds, **numbers, "regrets": regrets(found), "paper": paper()}, indent=1)
    (given.out / "whatif.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
