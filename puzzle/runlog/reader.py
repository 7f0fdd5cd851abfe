"""Reads `run.jsonl`: our own runs, and the transcribed published ones."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from puzzle.errors import UserError
from puzzle.runlog import records
from puzzle.runlog.run import Evaluation, Iteration, Report, Run, RunHeader, Switch

Record = dict[str, Any]


@dataclass(frozen=True)
class _Line:
    """A valid record and the line it stood in, counted from 1."""

    number: int
    record: Record


@dataclass
class _Collected:
    """What the records of one log say, in their order."""

    source: str
    header: Record | None = None
    attempt: int = 0
    iterations: dict[int, tuple[int, Iteration]] = field(default_factory=dict)
    switches: dict[int, list[tuple[int, Switch]]] = field(default_factory=dict)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    ranks: dict[int, Record] = field(default_factory=dict)
    stages: list[Record] = field(default_factory=list)
    simulations: list[Record] = field(default_factory=list)
    offloads: list[Record] = field(default_factory=list)
    notes: list[Record] = field(default_factory=list)
    printed: dict[str, tuple[float, ...]] = field(default_factory=dict)
    ended: bool = False
    reports: list[Report] = field(default_factory=list)

    def report(self, line: int | None, what: str) -> None:
        self.reports.append(Report(self.source, line, what))


def read_jsonl(path: Path) -> Run | tuple[Report, ...]:
    """The run of one log, or, where the log holds no readable header, the reports that say why.

    Lines that are torn, damaged, doubled, out of order or missing are reported, in the run's `reports`.

    Raises:
        UserError: two headers in one log disagree.
        OSError: the file cannot be read.
    """
    collected = _Collected(str(path))
    for line in _in_order(_valid_lines(path.read_bytes(), collected), collected):
        _take(line, collected)
    header = collected.header
    if header is None:
        first = (
            f"; line {collected.reports[0].line}: {collected.reports[0].what}" if collected.reports else ""
        )
        return (Report(collected.source, None, f"no readable run record, so not the log of a run{first}"),)
    return _run(collected, header)


def _valid_lines(data: bytes, collected: _Collected) -> list[_Line]:
    found = []
    checked: list[int] = []
    unchecked: list[int] = []
    if not data.strip():
        collected.report(0, "empty log")
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            found.append(_Line(number, records.decode(line)))
        except records.BadLine as error:
            collected.report(number, f"line dropped, {error}")
            continue
        (checked if b'"crc":' in line else unchecked).append(number)
    if checked:
        for number in unchecked:
            collected.report(number, "no checksum, unlike other lines: it may be damaged")
    return found


def _in_order(found: list[_Line], collected: _Collected) -> Iterable[_Line]:
    """The lines by `seq`, each once; doubles, disorder and gaps are reported."""
    by_seq: dict[int, _Line] = {}
    highest = -1
    for line in found:
        seq = line.record["seq"]
        if seq in by_seq:
            first = by_seq[seq]
            same = first.record == line.record
            what = "the same line again" if same else "another line with the same seq; this one counts"
            collected.report(line.number, f"{what}, seq {seq}, also line {first.number}")
        elif seq < highest:
            collected.report(line.number, f"out of order: seq {seq} after {highest}")
        by_seq[seq] = line
        highest = max(highest, seq)
    expected = 0
    for seq in sorted(by_seq):
        if seq > expected:
            lost = f"seq {expected}" if seq == expected + 1 else f"seq {expected} to {seq - 1}"
            collected.report(by_seq[seq].number, f"records are missing before this line: {lost}")
        expected = seq + 1
        yield by_seq[seq]


def _take(line: _Line, collected: _Collected) -> None:
    record = line.record
    match record["record"]:
        case "run":
            _take_header(line, collected)
        case "resume":
            collected.attempt += 1
            collected.ended = False
            if record.get("changed"):
                names = ", ".join(sorted(record["changed"].keys() - {"given"})) or "settings given"
                collected.report(
                    line.number, f"resumed at iteration {record['iteration']} with other {names}"
                )
        case "iteration":
            _take_iteration(line, collected)
        case "evaluation":
            values = _numbers(record["metrics"])
            collected.evaluations[record["iteration"]] = Evaluation(record["iteration"], values)
        case "switch":
            known = {"record", "seq", "time", "iteration", "seconds"}
            fields = {name: value for name, value in record.items() if name not in known}
            switch = Switch(record["iteration"], float(record["seconds"]), fields)
            collected.switches.setdefault(switch.iteration, []).append((collected.attempt, switch))
        case "rank":
            collected.ranks.setdefault(record["rank"], {}).update(_content(record))
        case "simulation":
            collected.simulations.append(_content(record))
        case "offload":
            collected.offloads.append(_content(record))
        case "stage":
            collected.stages.append(_content(record))
        case "note":
            collected.notes.append(_content(record))
        case "printed":
            if record["name"] in collected.printed:
                collected.report(line.number, f"printed {record['name']} again; this one counts")
            collected.printed[record["name"]] = tuple(map(float, record["values"]))
        case "warning":
            collected.report(line.number, f"the run warned: {record['text']}")
        case "end":
            collected.ended = True


def _content(record: Record) -> Record:
    return {name: value for name, value in record.items() if name not in ("record", "seq", "time")}


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else float(value) for name, value in values.items()}


def _take_header(line: _Line, collected: _Collected) -> None:
    if collected.header is None:
        collected.header = line.record
        return
    if _content(line.record) != _content(collected.header):
        raise UserError(
            f"{collected.source} holds two runs that disagree: line {line.number} has another header; "
            "give every run a folder of its own"
        )
    collected.report(line.number, "the same run record again")


def _take_iteration(line: _Line, collected: _Collected) -> None:
    record = line.record
    index = record["iteration"]
    metrics = _numbers(record["metrics"])
    seconds = {name: float(value) for name, value in record["stage_seconds"].items()}
    before = collected.iterations.get(index)
    if before is not None and before[0] == collected.attempt:
        collected.report(line.number, f"iteration {index} again without a resume; this one counts")
    iteration = Iteration(index, seconds, float(record["e2e_seconds"]), metrics)
    collected.iterations[index] = (collected.attempt, iteration)


def _run(collected: _Collected, header: Record) -> Run:
    order = sorted(collected.iterations)
    iterations = tuple(collected.iterations[index][1] for index in order)
    gap = next((place for place, index in enumerate(order) if place != index), None)
    if gap is not None:
        missing = order[-1] + 1 - len(order)
        collected.report(None, f"{missing} iterations are missing, the first is {gap}")
    switches = []
    for index in sorted(collected.switches):
        last = max(attempt for attempt, _ in collected.switches[index])
        switches += [switch for attempt, switch in collected.switches[index] if attempt == last]
    log = header.get("log", {})
    known: Record = {one.name: header[one.name] for one in fields(RunHeader) if one.name in header}
    known["figures"] = tuple(header["figures"])
    return Run(
        **known,
        source=str(log.get("name", collected.source)),
        iterations=iterations,
        switches=tuple(switches),
        stages=tuple(collected.stages),
        simulations=tuple(collected.simulations),
        offloads=tuple(collected.offloads),
        ranks=tuple(collected.ranks[rank] for rank in sorted(collected.ranks)),
        printed=collected.printed or printed_series(header["variant"], iterations),
        notes=tuple(collected.notes),
        reports=tuple(collected.reports),
        ended=collected.ended,
        evaluations=tuple(collected.evaluations[index] for index in sorted(collected.evaluations)),
    )


def printed_series(variant: str, iterations: Iterable[Iteration]) -> Mapping[str, tuple[float, ...]]:
    """What the lines of `run.log` say, per quantity, unrounded: a switch counts as generation there."""
    rows = [(one.stage_seconds, one.e2e_seconds) for one in iterations]
    if not rows:
        return {}
    switches = tuple(stages["switch"] for stages, _ in rows)
    series = {
        "e2e": tuple(e2e for _, e2e in rows),
        "generation": tuple(stages["generation"] + stages["switch"] for stages, _ in rows),
        "training": tuple(stages["training"] for stages, _ in rows),
    }
    if variant == "dschat":
        series["experience"] = tuple(
            stages["generation"] + stages["switch"] + stages["inference"] for stages, _ in rows
        )
    else:
        series["inference"] = tuple(stages["inference"] for stages, _ in rows)
    # Where nothing switched, or nobody timed it, there is no time of a switch: that is not a switch of 0 s.
    return {**series, "gather" if variant == "dschat" else "reshard": switches} if any(switches) else series
