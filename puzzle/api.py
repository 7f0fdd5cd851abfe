"""What Python calls, under the name `puzzle`: run a configuration, load what a run wrote, plan a switch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puzzle.config.base import RunConfig
from puzzle.config.document import read_yaml
from puzzle.config.load import Given, Layer
from puzzle.config.renamed import modernised
from puzzle.config.run import TrainConfig
from puzzle.config.supervised import SUPERVISED
from puzzle.data import hub
from puzzle.errors import UserError, describe, lacking
from puzzle.launch import Launcher, local
from puzzle.plan.cluster import Cluster
from puzzle.plan.layout import Layout, Placement
from puzzle.plan.reshard import plan as reshard
from puzzle.plan.reshard.plan import MIB, Strategy, SwitchPlan
from puzzle.runlog import load_runs
from puzzle.runlog.follow import Follower
from puzzle.runlog.records import Iteration
from puzzle.runlog.run import Run
from puzzle.spec.model import ModelSpec

if TYPE_CHECKING:
    import pandas

GIVEN = "given"
"""The name of a callable's place in `reward.function`."""


class RunError(RuntimeError):
    """A run died of something that no setting mends; `code` is the exit code that the command would have."""

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line)
        self.code = code


class _Raised(Exception):
    """What `on_iteration` raised, which may be of a kind that means something else to a launcher."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


@dataclass(frozen=True)
class RunFolder:
    """What a run wrote. The frames need pandas (UserError without it); `log` does not."""

    folder: Path
    log: Run

    @cached_property
    def iterations(self) -> pandas.DataFrame:
        """A row per iteration (the index `iteration`): metrics by name, then `seconds.STAGE`, `seconds.e2e`
        and `speed.NAME`. NaN where an iteration lacks a metric."""
        rows = [
            {
                **one.metrics,
                **{f"seconds.{name}": value for name, value in _seconds(one).items()},
                **{f"speed.{name}": value for name, value in (one.speed or {}).items()},
            }
            for one in self.log.iterations
        ]
        return _frame(rows, [one.iteration for one in self.log.iterations])

    @cached_property
    def evaluations(self) -> pandas.DataFrame:
        """A row per held-out evaluation; the index `iteration` says how many came before it."""
        rows = [dict(one.metrics) for one in self.log.evaluations]
        return _frame(rows, [one.iteration for one in self.log.evaluations])

    @cached_property
    def switches(self) -> pandas.DataFrame:
        """A row per change of layout: `seconds`, `bytes` and what else its record has."""
        rows = [{"seconds": one.seconds, **one.fields} for one in self.log.switches]
        return _frame(rows, [one.iteration for one in self.log.switches])

    @cached_property
    def samples(self) -> pandas.DataFrame:
        """A row per logged sample: `prompt`, `response`, `reward`, `kl`, ... (docs/log-schema.md); of an
        iteration that was done again after a resume, those of the last time."""
        file = self.folder / "samples.jsonl"
        try:
            lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        except OSError as error:
            raise UserError(describe(error)) from None
        last: dict[tuple[Any, ...], dict[str, Any]] = {}
        for line in lines:
            try:
                row = json.loads(line)
                iteration, held_out, prompt = row["iteration"], row.get("held_out"), row.get("prompt_id")
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # a line that a killed process tore
            last[iteration, held_out, str(prompt), row.get("response")] = row
        rows = list(last.values())
        return _frame(rows, [row.pop("iteration") for row in rows])


def _seconds(one: Iteration) -> dict[str, float]:
    return {**one.stage_seconds, "e2e": one.e2e_seconds}


def _frame(rows: list[dict[str, Any]], iterations: list[int]) -> pandas.DataFrame:
    try:
        import pandas
    except ModuleNotFoundError:
        raise UserError(lacking("pandas")) from None
    return pandas.DataFrame(rows, index=pandas.Index(iterations, name="iteration", dtype="int64"))


def run(
    config: RunConfig | Mapping[str, Any] | Path | str,
    out: Path | str | None = None,
    *,
    reward: Callable[..., Any] | None = None,
    on_iteration: Callable[[Iteration], object] | None = None,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    launcher: Launcher = "local",
) -> RunFolder:
    """Train as `puzzle train` does, in processes of their own; returns when the run has ended. A
    configuration that says `task: sft`, `reward-model` or `dpo` is run as that command would.

    Nothing of the calling program runs again in those processes: a script needs no `__main__` guard, and a
    notebook's functions work, too.

    Args:
        config: a YAML file, its content as nested values, or a configuration that is made already.
        out: the folder of the run; by default `runs/TIME` here.
        reward: scores responses (docs/rewards.md), in place of what the configuration says; where one of
            `reward.functions` is called `given`, it takes that place; in a configuration that is made
            already, one must be.
        on_iteration: called here with the log's record of each iteration soon after its end. What it raises
            ends the run, and is raised.
        overrides: settings by dotted key, such as {"generation.samples": 4}; they win over `config`.
        resume: go on with the run in `out`.
        launcher: who starts the processes.

    Raises:
        UserError: what the command would say in one line.
        RunError: the run died.
    """
    from puzzle.cli.train import start

    made, given = hub.localised(*_configured(config, reward, overrides or {}))
    folder = Path(out) if out is not None else Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}"
    if on_iteration is not None and launcher != "local":
        raise UserError(f"on_iteration follows runs of the launcher local, not of {launcher}")
    follower = Follower(folder / "run.jsonl")

    def follow() -> None:
        for record in follower.new():
            if on_iteration is not None and isinstance(record, Iteration):
                try:
                    on_iteration(record)
                except Exception as error:  # noqa: BLE001 - whatever a user's function raises
                    raise _Raised(error) from None

    meanwhile = follow if launcher == "local" else None
    try:
        with local.environment(_still()):
            code = start(made, folder, resume, launcher, given, reward, meanwhile)
        follow()
    except _Raised as raised:
        raise raised.cause from None
    if code:
        raise RunError(f"the run in {folder} died, exit code {code}", code)
    return load_run(folder)


def _still() -> dict[str, str]:
    """For processes whose output is no terminal's: a notebook asks for colours, as if a bar could move."""
    return {} if sys.stdout is not None and sys.stdout.isatty() else {"TTY_INTERACTIVE": "0"}


def _configured(
    config: RunConfig | Mapping[str, Any] | Path | str,
    reward: Callable[..., Any] | None,
    overrides: Mapping[str, Any],
) -> tuple[RunConfig, dict[str, Any] | None]:
    if isinstance(config, RunConfig):
        if overrides:
            raise UserError("overrides change a file or nested values; this configuration is made already")
        return config, None
    where = str(config) if isinstance(config, (Path, str)) else "config"
    document = read_yaml(Path(config)) if isinstance(config, (Path, str)) else None
    data = dict(config) if isinstance(config, Mapping) else {} if document is None else document.data
    changes = dict(overrides)
    if reward is not None:
        told = [*(data.get("reward") or {}).get("functions", ()), data.get("reward") or {}]
        if not any(isinstance(part, Mapping) and part.get("function") == GIVEN for part in told):
            changes["reward.function"] = GIVEN
    lines = {} if document is None else document.lines
    given = Given((Layer(where, modernised(data)[0], lines),)).over("overrides", changes)
    return given.build(SUPERVISED.get(data.get("task", ""), TrainConfig)), given.values


def load_run(folder: Path | str) -> RunFolder:
    """The run that `folder` holds (or that the log `folder` tells of), also while it is running.

    Raises:
        UserError: there is none, or there are several.
    """
    folder = Path(folder)
    found = load_runs(folder).runs
    if len(found) != 1:
        raise UserError(f"{folder} holds {len(found)} runs; give the folder of one")
    (log,) = found
    return RunFolder(Path(log.source).parent, log)


def plan_switch(
    model: ModelSpec | Path | str,
    source: tuple[int, int, int],
    destination: tuple[int, int, int],
    *,
    gpus_per_node: int = 8,
    intra_gbs: float = Cluster.intra_gbs,
    inter_gbs: float = Cluster.inter_gbs,
    strategy: Strategy = "planned",
    itemsize: int = 2,
    staging_bytes: int = 256 * MIB,
    nest: bool = False,
    zero: bool = False,
) -> SwitchPlan:
    """Plan how a model's weights get from one layout to another, as `puzzle plan switch` does.

    Args:
        model: a published size (`7b`), a Hugging Face folder, or its shape.
        source, destination: tp, pp and dp; layers are split evenly, ranks in the default order.
        gpus_per_node: ranks that share a node, whose links have `intra_gbs`; others have `inter_gbs`
            (1e9 bytes/s in each direction).
        strategy: `planned` moves the fewest bytes; the others are baselines (docs/switching.md).
        itemsize: bytes of a weight.
        staging_bytes: most memory for packing messages, per device.
        nest: stages of the destination begin and end where those of the source do.
        zero: the weights come out of ZeRO-1 shards, before they are gathered.

    Raises:
        UserError: the model is none, or cannot have such a layout.
    """
    from puzzle.cli.plan_switch import model_spec

    spec = model if isinstance(model, ModelSpec) else model_spec(str(model))
    before, after = (Layout.even(*numbers, spec.num_layers) for numbers in (source, destination))
    return reshard.plan_switch(
        spec,
        Placement.default(before),
        Placement.default(after),
        Cluster(gpus_per_node, intra_gbs, inter_gbs),
        strategy=strategy,
        itemsize=itemsize,
        staging_bytes=staging_bytes,
        nest=nest,
        zero=zero,
    )
