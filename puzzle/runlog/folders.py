"""The folder of a run: what may be in it before the run begins or goes on, and which checkpoints are."""

import os
from pathlib import Path

from puzzle.errors import UserError, describe
from puzzle.files import durable
from puzzle.runlog.past import past_of, read_lines
from puzzle.runlog.records import Checkpoint, Iteration

FILES = ("run.jsonl", "run.log", "samples.jsonl")
FOLDERS = ("checkpoints", "ranks", "plots", "traces", "profiles", "trackers", "tensorboard")


def states(checkpoints: Path) -> dict[int, Path]:
    """Checkpoints that a run may go on from."""
    return durable.numbered(checkpoints, "state")


def models(checkpoints: Path) -> list[str]:
    """Names of the model folders among the checkpoints."""
    return sorted(path.parent.name for path in checkpoints.glob("*/config.json"))


def check(out: Path) -> None:
    """Refuse an output folder that is none, or cannot be made. Raises UserError."""
    if os.path.lexists(out) and not out.is_dir():
        what = "a link to nothing" if out.is_symlink() and not out.exists() else "a file, not a folder"
        raise UserError(f"--out {out}: is {what}")
    try:
        durable.make_folder(out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made: {describe(error)}") from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: cannot be written")


def prepare(out: Path, resume: bool, saves: bool) -> None:
    """Refuse what would stop the run later or replace what another one left; `saves`: it writes checkpoints.

    Folders that a killed process was just replacing are put right. Raises UserError.
    """
    if not resume and (out / "run.jsonl").exists():
        raise UserError(f"--out {out}: already holds a run; choose another folder, or go on with --resume")
    for name in FILES:
        if os.path.lexists(out / name) and ((out / name).is_dir() or not (out / name).exists()):
            raise UserError(f"{out / name}: is no file; move it away")
    for name in FOLDERS:
        path = out / name
        if os.path.lexists(path) and not (path.is_dir() and os.access(path, os.W_OK | os.X_OK)):
            dangling = path.is_symlink() and not path.exists()
            raise UserError(
                f"{path}: {'leads nowhere' if dangling else 'is no folder that can be written'}; move it away"
            )
    checkpoints = out / "checkpoints"
    if saves:
        durable.make_folder(checkpoints)
    if checkpoints.is_dir():
        durable.settle(checkpoints)
    if resume:
        _refuse_beginning_again(out)


def _refuse_beginning_again(out: Path) -> None:
    if states(out / "checkpoints"):
        return
    refuse_replacing(out / "checkpoints")
    past = past_of(read_lines(out / "run.jsonl"))
    if past is not None and past.completed:
        raise UserError(
            f"--resume: the run in {out} is complete and left no checkpoint (checkpoint.save false) to go on"
            " from; begin a new run in another folder"
        )


def refuse_replacing(checkpoints: Path) -> None:
    """Raise UserError if models are there, which a run that begins again would replace.

    What was saved before anything was trained is no loss: the run writes the same again.
    """
    log = [line.record for line in read_lines(checkpoints.parent / "run.jsonl")]
    began = any(isinstance(record, Iteration) for record in log)
    saved = {record.path: record.iteration for record in log if isinstance(record, Checkpoint)}

    def trained(name: str) -> bool:
        return saved.get(f"{checkpoints.name}/{name}") != 0 and (began or name != "best")

    if found := list(filter(trained, models(checkpoints))):
        policies = [name for name in found if not name.endswith("-critic")]
        from_it = checkpoints / (policies or found)[-1]
        raise UserError(
            f"--resume: {checkpoints} holds models ({', '.join(found)}) but no state-N to go on from: the run"
            " would begin again and replace them; begin a new one in another folder, with --actor.model"
            f" {from_it} from that model, and with checkpoint.every to be able to go on"
        )
