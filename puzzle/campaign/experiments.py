"""The table of experiments (`experiments.yaml`): from figures, pairs and variants to configurations."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from puzzle.config.capabilities import missing
from puzzle.config.document import Key, read_yaml
from puzzle.config.load import build, merge
from puzzle.config.run import Count, TrainConfig
from puzzle.errors import UserError
from puzzle.spec.published import published

TABLE = Path(__file__).with_name("experiments.yaml")
Axes = tuple[Count, Count, Count]  # tp, pp, dp


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Job(_Section):
    """One pair of models on some processes: layouts, and sequences per batch and micro-batch."""

    train: Axes
    generate: Axes
    microbatch: Count
    batch: Count
    prefill: Count
    decode: tuple[Count, Count]


class Change(_Section):
    """What a cluster does in another way than a job says."""

    generate: Axes | None = None
    decode: tuple[Count, Count] | None = None


class Variant(_Section):
    """Which layouts of a job the stages of a variant use, its micro-batches (rows: all that a replica has at
    once), and what else it configures."""

    training: Literal["train", "generate", "data"]
    generation: Literal["train", "generate", "data"]
    decode: Literal["small", "large", "rows"]
    microbatch: Literal["job", "rows"] = "job"
    config: dict[str, Any] = {}


class Figure(_Section):
    """The runs of a figure: its `pairs`, or with `grid` the layouts and batches of the scale's grid."""

    variants: tuple[str, ...]
    pairs: tuple[str, ...] = ()
    grid: bool = False


class Grid(_Section):
    """Layouts and batches of one pair, all combinations."""

    batches: tuple[Count, ...]
    layouts: tuple[Axes, ...]


class Scale(_Section):
    """One size of the whole table; `devices` is how many processes its largest layouts want.

    With `layers_per_device` no model has more layers than that times the devices there are.
    """

    devices: Count
    layers_per_device: Count | None = None
    config: dict[str, Any]
    models: dict[str, dict[str, Any]]
    jobs: dict[str, Job]
    grid: dict[str, Grid]
    clusters: dict[str, dict[str, Change]] = {}


class Table(_Section):
    """`experiments.yaml`."""

    config: dict[str, Any]
    variants: dict[str, Variant]
    figures: dict[str, Figure]
    scales: dict[str, Scale]

    def most_layers(self, scale: str, devices: int | None) -> int | None:
        """How deep models are at most on so many devices; None for the published depth."""
        found = self.scales.get(scale)
        if found is None or found.layers_per_device is None:
            return None
        return found.layers_per_device * (devices or found.devices)


@dataclass(frozen=True)
class Experiment:
    """One run: `name` is its folder's; `lacks` says what this version does not have for it."""

    name: str
    config: TrainConfig
    lacks: tuple[str, ...]

    @property
    def label(self) -> str:
        """Pair, variant, layouts and batch, for people."""
        train, generate = self.config.actor.layout, self.config.generation.layout
        layouts = f"{train.tp},{train.pp},{train.dp}"
        if generate != train:
            layouts += f" -> {generate.tp},{generate.pp},{generate.dp}"
        log = self.config.log
        return f"{log.actor}/{log.critic} {log.variant} ({layouts}) batch {self.config.batch}"


@dataclass(frozen=True)
class Selection:
    """What to expand: `only` names figures (all if empty); `devices`, what there is (None: enough)."""

    scale: str
    only: tuple[str, ...] = ()
    cluster: str = "local"
    devices: int | None = None
    repeats: int = 1
    iterations: int | None = None  # instead of the scale's


def read_table(path: Path = TABLE) -> Table:
    """The table in `path`; raises UserError naming line and key."""
    document = read_yaml(path)
    try:
        return Table.model_validate(document.data)
    except ValidationError as error:
        problem = error.errors()[0]
        key = tuple(str(part) for part in problem["loc"])
        line = next((document.lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in document.lines), 1)
        reason = problem["msg"].lower()
        raise UserError(f"{path}:{line}: {'.'.join(key)}: {reason}") from None


def expand(table: Table, selection: Selection) -> list[Experiment]:
    """The runs of the requested figures; a run that several figures share is there once.

    Raises UserError for unknown names, and for a configuration that is none.
    """
    scale = table.scales[_known("--scale", selection.scale, table.scales)]
    for figure in selection.only:
        _known("--only", figure, table.figures)
    figures: dict[tuple[str, str, Job], list[str]] = {}
    for name, figure in table.figures.items():
        if not selection.only or name in selection.only:
            for pair, job in _jobs(scale, figure, selection.cluster):
                job = fitted(job, selection.devices or scale.devices)
                for variant in figure.variants:
                    named = figures.setdefault((pair, _known(name, variant, table.variants), job), [])
                    named += [name] if name not in named else []
    return [
        _experiment(table, scale, selection, pair, variant, job, tuple(names), repeat)
        for (pair, variant, job), names in figures.items()
        for repeat in range(selection.repeats)
    ]


def _known(what: str, name: str, names: Mapping[str, Any]) -> str:
    if name not in names:
        near = get_close_matches(name, names, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names)}"
        raise UserError(f"{what}: {name} is unknown{hint}")
    return name


def _jobs(scale: Scale, figure: Figure, cluster: str) -> Iterator[tuple[str, Job]]:
    jobs = dict(scale.jobs)
    for pair, change in scale.clusters.get(cluster, {}).items():
        known = jobs[_known("pair", pair, jobs)]
        jobs[pair] = known.model_copy(update=change.model_dump(exclude_none=True))
    for pair in figure.pairs:
        yield pair, jobs[_known("pair", pair, jobs)]
    for pair, grid in scale.grid.items() if figure.grid else ():
        for batch in grid.batches:
            for layout in grid.layouts:
                known = jobs[_known("pair", pair, jobs)]
                yield pair, known.model_copy(update={"batch": batch, "train": layout})


def _experiment(
    table: Table,
    scale: Scale,
    selection: Selection,
    pair: str,
    variant_name: str,
    job: Job,
    figures: Sequence[str],
    repeat: int,
) -> Experiment:
    variant = table.variants[variant_name]
    layouts = {"train": job.train, "generate": job.generate, "data": (1, 1, prod(job.train))}
    actor, slash, critic = pair.partition("/")
    if not slash or "/" in critic:
        raise UserError(f"pair {pair}: write it as ACTOR/CRITIC")
    log = {"actor": actor, "critic": critic, "variant": variant_name, "cluster": selection.cluster}
    rows = -(-job.batch // layouts[variant.training][2])
    decode = {"small": job.decode[0], "large": job.decode[1], "rows": rows}[variant.decode]
    most = table.most_layers(selection.scale, selection.devices)
    models = {role: _model(scale, name, most) for role, name in (("actor", actor), ("critic", critic))}
    data = merge(
        table.config,
        scale.config,
        {
            "seed": repeat,
            "batch": job.batch,
            "layout": _axes(layouts[variant.training]),
            "actor": {"init": models["actor"]},
            "critic": {"init": models["critic"]},
            "reward": {"init": models["critic"]},
            "algorithm": {"microbatch": rows if variant.microbatch == "rows" else job.microbatch},
            "generation": {
                "layout": _axes(layouts[variant.generation]),
                "prefill_microbatch": job.prefill,
                "decode_microbatch": decode,
            },
            "log": {**log, "figures": list(figures), "repeat": repeat},
        },
        variant.config,
        {} if selection.iterations is None else {"iterations": selection.iterations},
    )
    tp, pp, dp = job.train
    name = f"{actor}_{critic}_{variant_name}_{job.batch}_{tp}-{pp}-{dp}".lower()

    def place(_key: Key) -> str:
        return f"{TABLE.name}: {name}"

    config = build(data, place)
    return Experiment(f"{name}_r{repeat}" if selection.repeats > 1 else name, config, tuple(missing(config)))


def _model(scale: Scale, name: str, most: int | None) -> dict[str, Any]:
    """The shape of the model of that name, with `most` layers at most."""
    model = scale.models[_known("model", name, scale.models)]
    if most is None:
        return model
    if not isinstance(model.get("preset"), str):
        raise UserError(f"model {name}: layers_per_device needs models with a preset")
    return {**model, "num_hidden_layers": min(most, published(model["preset"]).num_layers)}


def fitted(job: Job, devices: int) -> Job:
    """`job` on at most `devices` processes: stages halved first, then tensor parallelism, then replicas.

    The batch shrinks with the processes, so that each keeps its share, but not below one micro-batch.
    """
    train, generate = job.train, job.generate
    while prod(train) > devices:
        train = _halved(train)
    while prod(generate) > prod(train):
        generate = _halved(generate)
    batch = max(job.microbatch, job.batch * prod(train) // prod(job.train))
    return job.model_copy(update={"train": train, "generate": generate, "batch": batch})


def _halved(axes: Axes) -> Axes:
    tp, pp, dp = axes
    if pp > 1:
        return tp, (pp + 1) // 2, dp
    return ((tp + 1) // 2, pp, dp) if tp > 1 else (tp, pp, (dp + 1) // 2)


def _axes(axes: Axes) -> dict[str, int]:
    return {"tp": axes[0], "pp": axes[1], "dp": axes[2]}
