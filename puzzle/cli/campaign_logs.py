"""The logs of a campaign as figures read them, small enough to ship: of finished runs `run.jsonl` alone, of
others a log that says why there are no numbers."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from puzzle.campaign.runs import FINISHED, Outcome
from puzzle.config.resolve import resolve
from puzzle.errors import UserError, describe
from puzzle.files import durable
from puzzle.rlhf.provenance import run_header
from puzzle.runlog import RunWriter
from puzzle.runlog.records import GAP, End, Note

GAPS = {"failed": "failed", "later": "not run yet"}


def ship(outcomes: Sequence[Outcome], out: Path, folder: Path) -> None:
    """Write NAME.jsonl of every run into `folder`, in place of what is there of that name. A run without
    numbers has a log only where no repeat of it has any. UserError where that cannot be written."""
    measured = {one.experiment.job for one in outcomes if one.status in FINISHED}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for one in outcomes:
            log = folder / f"{one.experiment.name}.jsonl"
            if one.status in FINISHED:
                durable.write_text(log, (out / "logs" / one.experiment.name / "run.jsonl").read_text())
            elif one.experiment.job not in measured and not one.experiment.config.log.repeat:
                _write_gap(one, log)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the logs to ship: {describe(error)}") from None


def _write_gap(outcome: Outcome, log: Path) -> None:
    """The log of a run that has no numbers, which says why in few words and in full."""
    gap = GAPS.get(outcome.status) or ("no memory" if "GiB" in outcome.why else "not possible")
    header = run_header(resolve(outcome.experiment.config), {})
    with RunWriter(log.with_suffix(""), header) as writer:
        writer.write(Note(GAP, gap))
        writer.write(End("not run", outcome.why or gap))
    (log.with_suffix("") / "run.jsonl").replace(log)
    shutil.rmtree(log.with_suffix(""))
