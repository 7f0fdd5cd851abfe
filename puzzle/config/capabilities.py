"""What cannot be run here; the command line and the campaign ask here before they start."""

import os
import shutil
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from puzzle.config.run import TrainConfig
from puzzle.errors import UserError
from puzzle.files.path import ROOT

BASELINE = "dschat"
"""The variant that another program of this project runs."""
BASELINE_SCRIPT = "DeepSpeedExamples/applications/DeepSpeed-Chat/main.py"


NO_CUDA = "a torch with CUDA"
OTHER_TORCH = (
    "the torch installed here is a CPU build; UV_TORCH_BACKEND=cu130 (or what fits the driver) before env.sh"
    " or RUNME-b.sh installs another"
)


def has_cpu_torch() -> bool:
    """Whether the installed torch is a build for CPUs alone; found without importing it."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return False
    file = Path(found.origin).with_name("version.py")
    if not file.is_file():
        return False
    version = ModuleType("version")
    SourceFileLoader("version", str(file)).exec_module(version)
    return all(getattr(version, platform, None) is None for platform in ("cuda", "hip", "xpu"))


def require_device(device: str) -> None:
    """Raise UserError where the installed torch cannot use `device`, on whatever host it will run."""
    if device == "cuda" and has_cpu_torch():
        raise UserError(f"device cuda: {OTHER_TORCH}")


def missing(config: TrainConfig) -> list[str]:
    """What `config` asks for that does not exist, or is not installed; empty when it can run."""
    lacks: list[str] = []
    if config.log.variant == BASELINE:
        if not (ROOT / BASELINE_SCRIPT).is_file():
            lacks.append(
                "the DeepSpeed-Chat baseline, which is not part of the installed package (a checkout has it)"
            )
        if find_spec("deepspeed") is None:
            lacks.append(
                "the package deepspeed for the DeepSpeed-Chat baseline (PUZZLE_ENV=baseline of env.sh)"
            )
        if shutil.which(os.environ.get("CXX") or "c++") is None:
            lacks.append(
                "a C++ compiler, by which DeepSpeed builds its operators (Debian: apt-get install g++)"
            )
        if any(getattr(config, role).lora for role in config.trained):
            lacks.append("adapters (lora) in the baseline")
        if config.generation.stop:
            lacks.append("stop texts (generation.stop) in the baseline")
    return lacks
