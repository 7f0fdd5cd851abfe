"""Who ran what where: the header of a run's log from its configuration and this machine."""

import os
import platform
import subprocess
import uuid
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from puzzle import __version__
from puzzle.config.resolve import Plan
from puzzle.config.run import TrainConfig
from puzzle.config.sections import ModelConfig
from puzzle.files.path import ROOT
from puzzle.runlog import RunHeader

_PACKAGES = ("torch", "transformers", "numpy", "safetensors", "tokenizers")


def run_header(plan: Plan, hardware: dict[str, Any]) -> RunHeader:
    """The header of a run; `hardware` adds what the engine knows of its devices."""
    config, log = plan.config, plan.config.log
    layouts = {
        "training" if name == plan.main.role else name: {"tp": layout.tp, "pp": layout.pp, "dp": layout.dp}
        for name, layout in config.layouts().items()
    }
    critic = config.critic if isinstance(config, TrainConfig) else None
    return RunHeader(
        run_id=uuid.uuid4().hex,
        figures=log.figures,
        cluster=log.cluster,
        variant=log.variant,
        actor=log.actor or _name(config.main),
        critic=None if critic is None else log.critic or _name(critic),
        config={**config.resolved(), "global_batch_size": plan.batch.sequences},
        layouts=layouts,
        provenance=log.provenance,
        software={"puzzle": __version__, "python": platform.python_version(), **_versions()},
        hardware={"host": platform.node(), "cores": len(os.sched_getaffinity(0)), **hardware},
        git_commit=git_commit(),
        plan={"hash": plan.hash, **plan.describe()},
        given=plan.given,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        repeat=log.repeat,
    )


def _name(source: ModelConfig) -> str:
    if source.model is not None:
        folder = Path(source.model).resolve()
        if folder.parent.name == "snapshots":  # of the Hub's cache: models--ORG--NAME/snapshots/REVISION
            return folder.parents[1].name.split("--", 2)[-1]
        return folder.name
    assert source.init is not None
    return source.init.preset or f"{source.init.num_hidden_layers}x{source.init.hidden_size}"


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the project's checkout, with + behind it when tracked files differ; None outside."""
    if not (ROOT / ".git").exists():
        return None
    try:
        return _git(ROOT, "rev-parse", "HEAD") + ("+" if _git(ROOT, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
