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
from puzzle.config.memory_report import estimate
from puzzle.config.resolve import resolve
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
    once; half: half of these), and what else it configures.

    `logged` is what logs and figures call it, where that is another name; `options` are of the baseline's
    program, which runs a variant that logs call `dschat`.
    """

    training: Literal["train", "generate", "data"]
    generation: Literal["train", "generate", "data"]
    decode: Literal["small", "large", "rows"]
    microbatch: Literal["job", "rows", "half"] = "job"
    logged: str | None = None
    options: tuple[str, ...] = ()
    config: dict[str, Any] = {}


class Figure(_Section):
    """The runs of a figure: its `pairs`, or with `grid` the layouts and batches of the scale's grid."""

    variants: tuple[str, ...]
    pairs: tuple[str, ...] = ()
    grid: bool = False


class Grid(_Section):
    """Layouts and batches of one pair, all combinations.

    `every` layout of the devices there are, whose batches are then not cut with the devices: so many
    micro-batches pass as in the published runs. Otherwise `layouts`, which shrink as jobs do.
    """

    batches: tuple[Count, ...]
    layouts: tuple[Axes, ...] = ()
    every: bool = False


class Scale(_Section):
    """One size of the whole table; `devices` is how many processes its largest layouts want.

    `fit`: jobs shrink to the devices there are, and models whose pair does not fit into their memory have as
    many layers as do fit. `figures` are run instead of the table's, where given.
    """

    devices: Count
    fit: bool = False
    figures: dict[str, Figure] | None = None
    config: dict[str, Any]
    models: dict[str, dict[str, Any]]
    jobs: dict[str, Job]
    grid: dict[str, Grid] = {}
    clusters: dict[str, dict[str, Change]] = {}


class Table(_Section):
    """`experiments.yaml`; `same`: other names of variants, of which figures draw the same run."""

    config: dict[str, Any]
    variants: dict[str, Variant]
    same: dict[str, str] = {}
    figures: dict[str, Figure]
    scales: dict[str, Scale]


@dataclass(frozen=True)
class Experiment:
    """One run of a `variant` of the table: `name` is its folder's, `job` that of all its repeats; `lacks`
    says what is missing for it; `options` are the baseline's; `cut`: a model of its pair has fewer layers
    than it should."""

    name: str
    job: str
    variant: str
    config: TrainConfig
    lacks: tuple[str, ...]
    options: tuple[str, ...] = ()
    cut: bool = False

    @property
    def label(self) -> str:
        """Pair, variant, layouts and batch, for people."""
        train, generate = self.config.actor.layout, self.config.generation.layout
        layouts = f"{train.tp},{train.pp},{train.dp}"
        if generate != train:
            layouts += f" -> {generate.tp},{generate.pp},{generate.dp}"
        log = self.config.log
        return f"{log.actor}/{log.critic} {self.variant} ({layouts}) batch {self.config.batch}"


@dataclass(frozen=True)
class Selection:
    """What to expand: `only` names figures (all if empty); `devices` and bytes of `memory` of each are what
    there is (None: enough)."""

    scale: str
    only: tuple[str, ...] = ()
    cluster: str = "local"
    devices: int | None = None
    memory: int | None = None
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
    """The runs of the requested figures, the most valuable first: all of them once before any is repeated,
    whole models before cut ones, otherwise as the table lists them. A run that several figures share is there
    once.

    Raises UserError for unknown names, and for a configuration that is none.
    """
    scale = table.scales[_known("--scale", selection.scale, table.scales)]
    wanted = table.figures if scale.figures is None else scale.figures
    for figure in selection.only:
        _known("--only", figure, wanted)
    figures: dict[tuple[str, str, Job], list[str]] = {}
    for name, figure in wanted.items():
        if not selection.only or name in selection.only:
            for pair, job in _jobs(scale, figure, selection):
                for variant in figure.variants:
                    variant = _known(name, table.same.get(variant, variant), table.variants)
                    named = figures.setdefault((pair, variant, job), [])
                    named += [name] if name not in named else []
    layers = {pair: most_layers(table, selection, pair) for pair in dict.fromkeys(key[0] for key in figures)}
    found = [
        _experiment(table, selection, pair, variant, job, tuple(names), repeat, layers[pair])
        for repeat in range(selection.repeats)
        for (pair, variant, job), names in figures.items()
    ]
    return sorted(found, key=lambda one: (one.config.log.repeat, one.cut))


def _known(what: str, name: str, names: Mapping[str, Any]) -> str:
    if name not in names:
        near = get_close_matches(name, names, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names)}"
        raise UserError(f"{what}: {name} is unknown{hint}")
    return name


def _job(scale: Scale, pair: str, selection: Selection) -> Job:
    """What a pair does on the cluster, however many devices there are."""
    job = scale.jobs[_known("pair", pair, scale.jobs)]
    changes = scale.clusters.get(selection.cluster, {})
    for name in changes:
        _known("pair", name, scale.jobs)
    return job.model_copy(update=changes[pair].model_dump(exclude_none=True)) if pair in changes else job


def _jobs(scale: Scale, figure: Figure, selection: Selection) -> Iterator[tuple[str, Job]]:
    devices = selection.devices or scale.devices
    for pair in figure.pairs:
        yield pair, fitted(_job(scale, pair, selection), devices)
    for pair, grid in scale.grid.items() if figure.grid else ():
        job = _job(scale, pair, selection)
        for batch in grid.batches:
            for layout in grid.layouts:
                yield pair, fitted(job.model_copy(update={"batch": batch, "train": layout}), devices)
            for layout in every_layout(devices) if grid.every else ():
                yield pair, fitted(job, devices).model_copy(update={"batch": batch, "train": layout})


def every_layout(devices: int) -> list[Axes]:
    """All tp, pp, dp of so many devices, the deepest pipelines first."""
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    return sorted(
        ((tp, pp, devices // (tp * pp)) for tp in sizes for pp in sizes if devices % (tp * pp) == 0),
        key=lambda axes: (-axes[1], axes[2]),
    )


ROOM = 0.94
"""Share of a device's memory that the report may fill where it chooses the depth of models: contexts, NCCL's
buffers and what torch keeps come on top of it."""


def most_layers(table: Table, selection: Selection, pair: str) -> int | None:
    """How deep the pair's models can be on the devices; None where the whole ones fit. One depth for all that
    is compared: that in which the hungriest of our engine's variants fits, in the pair's own layouts."""
    scale = table.scales[selection.scale]
    if not scale.fit or selection.memory is None or pair not in scale.jobs:
        return None
    job = fitted(_job(scale, pair, selection), selection.devices or scale.devices)
    ours = [name for name, variant in table.variants.items() if not variant.options]
    limit = int(ROOM * selection.memory)

    def fits(most: int | None) -> bool:
        runs = [_experiment(table, selection, pair, name, job, (), 0, most) for name in ours]
        plans = [resolve(run.config) for run in runs]
        return all(max(r.peak for r in estimate(plan, True, limit)) <= limit for plan in plans)

    if fits(None):
        return None
    whole = resolve(_experiment(table, selection, pair, ours[0], job, (), 0, None).config)
    step = max(job.train[1], job.generate[1])  # so that stages are even
    most = max(model.spec.num_layers for model in whole.models.values()) // step
    least = 1  # whether it fits is for the run's own check to say
    while least < most:  # fits at `least` at the end, if anything does
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle * step) else (least, middle - 1)
    return least * step


def _experiment(
    table: Table,
    selection: Selection,
    pair: str,
    variant_name: str,
    job: Job,
    figures: Sequence[str],
    repeat: int,
    most: int | None,
) -> Experiment:
    scale, variant = table.scales[selection.scale], table.variants[variant_name]
    layouts = {"train": job.train, "generate": job.generate, "data": (1, 1, prod(job.train))}
    actor, slash, critic = pair.partition("/")
    if not slash or "/" in critic:
        raise UserError(f"pair {pair}: write it as ACTOR/CRITIC")
    microbatch, decode = _microbatches(variant, job, replicas=layouts[variant.training][2])
    named_actor, actor_shape = _model(scale, actor, most)
    named_critic, critic_shape = _model(scale, critic, most)
    log = {"actor": named_actor, "critic": named_critic, "cluster": selection.cluster}
    log |= {"variant": variant.logged or variant_name}
    data = merge(
        table.config,
        scale.config,
        {
            "seed": repeat,
            "batch": job.batch,
            "layout": _axes(layouts[variant.training]),
            "actor": {"init": actor_shape},
            "critic": {"init": critic_shape},
            "reward": {"init": critic_shape},
            "algorithm": {"microbatch": microbatch},
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
    name = f"{named_actor}_{named_critic}_{variant_name}_{job.batch}_{tp}-{pp}-{dp}".lower()

    def place(_key: Key) -> str:
        return f"{TABLE.name}: {name}"

    config = build(data, place)
    return Experiment(
        f"{name}_r{repeat}" if repeat else name,
        name,
        variant_name,
        config,
        tuple(missing(config)),
        variant.options,
        (named_actor, named_critic) != (actor, critic),
    )


def _microbatches(variant: Variant, job: Job, replicas: int) -> tuple[int, int]:
    """Sequences of a micro-batch of training, and of decoding."""
    rows = -(-job.batch // replicas)
    training = {"job": job.microbatch, "rows": rows, "half": max(1, rows // 2)}[variant.microbatch]
    return training, {"small": job.decode[0], "large": job.decode[1], "rows": rows}[variant.decode]


def _model(scale: Scale, name: str, most: int | None) -> tuple[str, dict[str, Any]]:
    """The shape of the model of that name with `most` layers at most, and its name, which tells these."""
    model = scale.models[_known("model", name, scale.models)]
    if most is None:
        return name, model
    preset = model.get("preset")
    whole = published(preset).num_layers if isinstance(preset, str) else model["num_hidden_layers"]
    return (f"{name}-{most}L", {**model, "num_hidden_layers": most}) if most < whole else (name, model)


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
