"""Reads logs of the published artifact: the file's name says what the run was, its text what was measured."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from puzzle.runlog.published.lines import PUZZLE_STAGES
from puzzle.runlog.published.scan import Block, Scan, scan
from puzzle.runlog.record import is_count
from puzzle.runlog.records import End, Iteration, Printed, Switch
from puzzle.runlog.run import Report, Run, missing

_NAME = re.compile(
    r"[a-z][a-z0-9.]*_(?P<actor>\d+(?:\.\d+)?[mb])_(?P<critic>\d+(?:\.\d+)?[mb])_"
    r"(?:(?P<batch>\d+)_(?P<pp>\d+)_(?P<dp>\d+)_(?P<tp>\d+)_)?(?P<variant>[a-z][a-z0-9_]*?)_"
    r"(?P<time>\d{4}-\d\d-\d\dT\d\d[:_-]?\d\d[:_-]?\d\d)(?P<zone>Z|[+-]\d\d:?\d\d)?\.log",
    re.IGNORECASE,
)
_FIGURE = re.compile(r"(?:figure|table)\d+")
# DeepSpeed-Chat prints an iteration's end-to-end time twice; in a public log the two differ by 0.6 % at most.
_APART = 0.02
# Seconds below which a rest is the rounding of printed milliseconds, as a share of the whole.
_ROUNDING = 1e-6
# Arguments as the logs print them -> the names used in `config`.
_CONFIG = {
    "global_batch_size": "global_batch_size",
    "train_batch_size": "global_batch_size",
    "micro_batch_size": "micro_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "pf_stage_mbs": "prefill_microbatch",
    "ar_stage_mbs": "decode_microbatch",
    "max_prompt_seq_len": "max_prompt_tokens",
    "max_answer_seq_len": "max_new_tokens",
    "bulk_switch_on": "bulk",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
}


@dataclass(frozen=True)
class LogName:
    """What folder and name of a published log say. `started` is None where the name's time is none."""

    figure: str
    cluster: str
    actor: str
    critic: str
    variant: str
    batch: int | None
    layout: Mapping[str, int] | None
    started: datetime | None

    @property
    def run_id(self) -> str:
        """The same for every log of one run: figure, cluster, pair, batch and layout if named, variant."""
        parts = [self.actor.lower(), self.critic.lower()]
        if self.layout is not None:
            parts += [str(self.batch), *(str(self.layout[axis]) for axis in ("pp", "dp", "tp"))]
        return "/".join(
            part for part in (self.figure, self.cluster, "_".join([*parts, self.variant])) if part
        )


def log_name(path: Path) -> LogName | None:
    """The meaning of `figureN/CLUSTER/llama_ACTOR_CRITIC[_BATCH_PP_DP_TP]_VARIANT_TIME.log`, or None.

    A figure without a cluster level is orion's.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        return None
    folders = path.absolute().parts[:-1]
    depth = next((len(folders) - i for i, name in enumerate(reversed(folders)) if _FIGURE.fullmatch(name)), 0)
    under = folders[depth:] if depth else ()
    layout = {axis: int(match[axis]) for axis in ("tp", "pp", "dp")} if match["batch"] else None
    return LogName(
        figure=folders[depth - 1] if depth else "",
        cluster=under[0] if under else ("orion" if depth else "unknown"),
        actor=match["actor"].upper(),
        critic=match["critic"].upper(),
        variant=match["variant"].lower(),
        batch=int(match["batch"]) if match["batch"] else None,
        layout=layout,
        started=_time(match["time"], match["zone"]),
    )


def _time(local: str, zone: str | None) -> datetime | None:
    digits = re.sub(r"\D", "", local)
    offset = "+0000" if zone in (None, "Z", "z") else zone.replace(":", "")
    try:
        return datetime.strptime(digits + offset, "%Y%m%d%H%M%S%z")
    except ValueError:
        return None


def read_published(path: Path, name: LogName) -> Run | tuple[Report, ...]:
    """The run of one published log, or, where it holds no complete iteration, the reports that say why.

    Raises OSError where the file cannot be read.
    """
    found = scan(path.read_bytes())
    reports = [Report(str(path), line, what) for line, what in found.reports]
    reports += [Report(str(path), None, what) for what in _doubts(found, name)]
    blocks = _last_of_each(found.blocks, str(path), reports)
    iterations = _iterations(blocks, str(path), reports)
    if not iterations:
        return (Report(str(path), None, "no readable iteration: not used"), *reports)
    arguments = found.arguments
    first = blocks[0].values
    batch = first.get("global_batch_size") or first.get("perf_batch_size")
    config: dict[str, Any] = {"global_batch_size": int(batch[0])} if batch else {}
    for argument, key in _CONFIG.items():
        if argument in arguments:
            config[key] = _value(arguments[argument])
    if name.batch is not None:
        config["global_batch_size"] = name.batch
    world = _size(arguments, "world_size")
    switches = tuple(
        Switch(one.iteration, one.stage_seconds["switch"])
        for one in iterations
        if one.stage_seconds["switch"] > 0
    )
    printed = [Printed(key, "s", values) for key, values in _printed(found, blocks).items()]
    return Run(
        run_id=name.run_id,
        figures=(name.figure,) if name.figure else (),
        cluster=name.cluster,
        variant=name.variant,
        actor=name.actor,
        critic=name.critic,
        config=config,
        layouts=_layouts(name, arguments),
        provenance="published",
        software={},
        hardware={} if world is None else {"devices": world},
        git_commit=None,
        started=None if name.started is None else name.started.isoformat(),
        source=str(path),
        records=(*printed, *iterations, *switches, *found.notes, End("completed")),
        reports=tuple(reports),
    )


def _value(text: str) -> int | bool | str | None:
    if text in ("True", "False"):
        return text == "True"
    return int(text) if re.fullmatch(r"\d{1,18}", text) else None if text == "None" else text


def _size(arguments: Mapping[str, str], name: str) -> int | None:
    """The argument where it is a whole number >= 1."""
    value = _value(arguments.get(name, "None"))
    return value if is_count(value) and value > 0 else None


def _layouts(name: LogName, arguments: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Layouts of training and, for PUZZLE, of generation; DeepSpeed-Chat shards parameters over all ranks."""
    world = _size(arguments, "world_size")
    if name.variant == "dschat":
        return {} if world is None else {"training": {"tp": 1, "pp": 1, "dp": world}}
    printed = {
        "tp": _size(arguments, "tensor_model_parallel_size"),
        "pp": _size(arguments, "pipeline_model_parallel_size"),
        "dp": _size(arguments, "data_parallel_size"),
    }
    training = name.layout or {axis: value for axis, value in printed.items() if value is not None}
    if len(training) < 3:
        return {}
    layouts = {"training": dict(training)}
    shadow_tp, shadow_pp = (
        _size(arguments, f"shadow_{kind}_model_parallel_size") for kind in ("tensor", "pipeline")
    )
    if arguments.get("use_shadow") == "True" and shadow_tp and shadow_pp:
        ranks = math.prod(training.values())
        layouts["generation"] = {"tp": shadow_tp, "pp": shadow_pp, "dp": ranks // (shadow_tp * shadow_pp)}
    elif arguments.get("use_shadow") == "False":
        layouts["generation"] = dict(training)
    return layouts


def _doubts(found: Scan, name: LogName) -> list[str]:
    """Where the arguments inside a log are not those that its name promises."""
    doubts = []
    arguments = found.arguments
    promised: dict[str, int | None] = {"global_batch_size": name.batch}
    if name.layout is not None:
        promised["tensor_model_parallel_size"] = name.layout["tp"]
        promised["pipeline_model_parallel_size"] = name.layout["pp"]
        promised["data_parallel_size"] = name.layout["dp"]
    for argument, value in promised.items():
        if value is not None and arguments.get(argument, str(value)) != str(value):
            doubts.append(f"the name says {argument} {value}, the log {arguments[argument]}; the name counts")
    if name.variant == "opt" and arguments.get("use_shadow") == "False":
        doubts.append("the name says opt, but re-sharding is off in the log's arguments")
    if name.started is None:
        doubts.append("the time in the name is none: other logs of this run count as newer")
    if not name.figure:
        doubts.append("in no folder figureN or tableN: it belongs to no figure")
    return doubts


def _last_of_each(blocks: Sequence[Block], source: str, reports: list[Report]) -> list[Block]:
    """The blocks in order of iteration, the last of each; disorder, doubles and gaps are reported."""
    last: dict[int, Block] = {}
    highest = -1
    for block in blocks:
        if block.iteration in last:
            again = "the same numbers" if last[block.iteration].values == block.values else "other numbers"
            what = f"iteration {block.iteration} again, with {again}: this one counts"
            reports.append(Report(source, block.line, what))
        elif block.iteration < highest:
            what = f"out of order: iteration {block.iteration} after {highest}"
            reports.append(Report(source, block.line, what))
        last[block.iteration] = block
        highest = max(highest, block.iteration)
    if gap := missing(last):
        reports.append(Report(source, None, gap))
    return [last[index] for index in sorted(last)]


def _iterations(blocks: Sequence[Block], source: str, reports: list[Report]) -> tuple[Iteration, ...]:
    found = []
    for block in blocks:
        one = _puzzle_iteration(block) if "stage1_gen" in block.values else _chat_iteration(block)
        if one is None:
            what = f"iteration {block.iteration} dropped: its end-to-end time is not in the log"
            reports.append(Report(source, block.line, what))
            continue
        found.append(one)
        (told,) = block.values.get("perf_e2e_latency", [one.e2e_seconds])[:1]
        if abs(told - one.e2e_seconds) > _APART * one.e2e_seconds:
            what = f"iteration {block.iteration}: two end-to-end times, {told:g} and {one.e2e_seconds:g} s"
            reports.append(Report(source, block.line, f"{what}: a line may be another iteration's"))
    return tuple(found)


def _from_ms(milliseconds: float) -> float:
    return round(milliseconds / 1e3, 9)


def _puzzle_iteration(block: Block) -> Iteration:
    generation, inference, training, e2e = (_from_ms(block.values[name][0]) for name in PUZZLE_STAGES)
    # The re-shard runs inside stage 1. Where it was not printed it stays there.
    switch = max(block.values.get("apply_shadow_model_time", [0.0]))
    return _iteration(block, min(generation, switch), generation, inference, training, e2e)


def _chat_iteration(block: Block) -> Iteration | None:
    """Without the prints of generation and training times, the rounded figures of the engine serve."""
    values = {name: numbers[0] for name, numbers in block.values.items()}
    if "e2e_latency" not in values:
        return None
    gather = values["gather_latency"]
    generation = values.get("generation_time", values["engine_generate_time"] + gather)
    experience = values.get("exp_gen_time", values.get("perf_generation_latency", generation))
    ranks = block.values.get("training_time_rank_print", [])
    training = max([*ranks, *block.values.get("training_time_other_node_print", [])], default=None)
    if training is None:
        training = values.get("perf_training_latency", 0.0)
    inference = max(experience - generation, 0.0)
    return _iteration(block, min(generation, gather), generation, inference, training, values["e2e_latency"])


def _iteration(
    block: Block, switch: float, generation: float, inference: float, training: float, e2e: float
) -> Iteration:
    """Exclusive stages from printed ones: `generation` as printed contains `switch`; the rest is `other`.

    What is derived is rounded to 1e-9 s.
    """
    stages = {
        "generation": round(generation - switch, 9),
        "inference": round(inference, 9),
        "training": training,
        "switch": switch,
    }
    rest = e2e - math.fsum(stages.values())
    stages["other"] = 0.0 if abs(rest) <= _ROUNDING * e2e else round(rest, 9)
    return Iteration(block.iteration, stages, e2e, _metrics(block))


_NOT_METRICS = {
    *PUZZLE_STAGES,
    "apply_shadow_model_time",
    "training_time_rank_print",
    "training_time_other_node_print",
}


def _metrics(block: Block) -> dict[str, float]:
    """The first number of everything else that the log prints per iteration."""
    named = {"average_reward": "reward"}
    return {
        named.get(name, name): numbers[0]
        for name, numbers in block.values.items()
        if name not in _NOT_METRICS
    }


def _printed(found: Scan, blocks: Sequence[Block]) -> dict[str, tuple[float, ...]]:
    """Per quantity the numbers that the published plot scripts read, in seconds."""
    puzzle = any("stage1_gen" in block.values for block in blocks)
    scale = _from_ms if puzzle else float
    names = (
        {
            "e2e": "e2e_time",
            "generation": "stage1_gen",
            "inference": "stage2_infer",
            "training": "stage3_train",
        }
        if puzzle
        else {"e2e": "e2e_latency", "generation": "generation_time", "experience": "exp_gen_time"}
    )
    series = {
        key: tuple(scale(block.values[name][0]) for block in blocks if name in block.values)
        for key, name in names.items()
    }
    switch, name = ("reshard", "apply_shadow_model_time") if puzzle else ("gather", "gather_latency")
    series[switch] = tuple(max(block.values[name]) for block in blocks if name in block.values)
    if not puzzle:
        series["training"] = tuple(found.training)
    return {key: values for key, values in series.items() if values}
