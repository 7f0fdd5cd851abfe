"""Reads `run.jsonl`: our own runs, and the transcribed published ones."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

from puzzle.errors import UserError
from puzzle.runlog.record import BadLine, Line, Record, decode
from puzzle.runlog.records import Iteration, Printed, Resume, RunHeader, Warned
from puzzle.runlog.run import Report, Run, missing

Reports = list[tuple[int | None, str]]


@dataclass
class _Seen:
    """What a log has told so far, to doubt what it tells again."""

    iterations: set[int] = field(default_factory=set)
    printed: set[str] = field(default_factory=set)

    def doubt(self, record: Record) -> str | None:
        """What a reader should know of the next record, None if nothing."""
        match record:
            case Warned():
                return f"the run warned: {record.text}"
            case Resume():
                self.iterations.clear()
                if record.changed:
                    names = ", ".join(sorted(record.changed.keys() - {"given"})) or "settings given"
                    return f"resumed at iteration {record.iteration} with other {names}"
            case Iteration(iteration=index):
                if index in self.iterations:
                    return f"iteration {index} again without a resume; this one counts"
                self.iterations.add(index)
            case Printed(name=name):
                if name in self.printed:
                    return f"printed {name} again; this one counts"
                self.printed.add(name)
        return None


def read_jsonl(path: Path) -> Run | tuple[Report, ...]:
    """The run of one log, or, where the log holds no readable header, the reports that say why.

    Lines that are torn, damaged, doubled, out of order or missing are reported, in the run's `reports`.

    Raises:
        UserError: two headers in one log disagree.
        OSError: the file cannot be read.
    """
    reports: Reports = []
    header: RunHeader | None = None
    records: list[Record] = []
    seen = _Seen()
    for found in _in_order(valid_lines(path.read_bytes(), reports), reports):
        record = found.record
        if not isinstance(record, RunHeader):
            records.append(record)
            if (what := seen.doubt(record)) is not None:
                reports.append((found.number, what))
        elif header is None:
            header = record
        elif record == header:
            reports.append((found.number, "the same run record again"))
        else:
            raise UserError(
                f"{path} holds two runs that disagree: line {found.number} has another header; "
                "give every run a folder of its own"
            )
    if header is None:
        first = "; line {}: {}".format(*reports[0]) if reports else ""
        return (Report(str(path), None, f"no readable run record, so not the log of a run{first}"),)
    if gap := missing(one.iteration for one in records if isinstance(one, Iteration)):
        reports.append((None, gap))
    return Run(
        **{one.name: getattr(header, one.name) for one in fields(header)},
        source=str(header.log.get("name", path)),
        records=tuple(records),
        reports=tuple(Report(str(path), *report) for report in reports),
    )


def valid_lines(data: bytes, reports: Reports) -> list[Line]:
    """The lines that can be read, in order; what is wrong with others is reported."""
    found: list[Line] = []
    bare: list[int] = []
    if not data.strip():
        reports.append((0, "empty log"))
    for number, text in enumerate(data.split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            found.append(decode(text, number))
        except BadLine as error:
            reports.append((number, f"line dropped, {error}"))
        else:
            bare += [] if b'"crc":' in text else [number]
    if len(bare) < len(found):
        reports += [(number, "no checksum, unlike other lines: it may be damaged") for number in bare]
    return found


def _in_order(lines: list[Line], reports: Reports) -> Iterator[Line]:
    """The lines by `seq`, each once; doubles, disorder and gaps are reported."""
    by_seq: dict[int, Line] = {}
    highest = -1
    for found in lines:
        seq = found.seq
        if seq in by_seq:
            first = by_seq[seq]
            same = (first.record, first.time) == (found.record, found.time)
            what = "the same line again" if same else "another line with the same seq; this one counts"
            reports.append((found.number, f"{what}, seq {seq}, also line {first.number}"))
        elif seq < highest:
            reports.append((found.number, f"out of order: seq {seq} after {highest}"))
        by_seq[seq] = found
        highest = max(highest, seq)
    expected = 0
    for seq in sorted(by_seq):
        if seq > expected:
            lost = f"seq {expected}" if seq == expected + 1 else f"seq {expected} to {seq - 1}"
            reports.append((by_seq[seq].number, f"records are missing before this line: {lost}"))
        expected = seq + 1
        yield by_seq[seq]
