"""What a tier is made of and which build of torch this machine wants: decisions that install nothing."""

import hashlib
import os
import re
import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TIERS = ("plot", "engine", "baseline", "dev")
OPTIONS = "options"  # the extra whose packages only single features need
UV = "uv>=0.9"
CPU_INDEX = ("--torch-backend=cpu",)


class SetupError(Exception):
    """One line for people: what is wrong and how to mend it."""


def extra(name: str, root: Path = ROOT) -> list[str]:
    """Requirements (PEP 508, without markers) of a tier, or of the options alone, as pyproject.toml has them:
    the extra plot; with it the package's own dependencies (engine); with both an extra of the tier's name."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    own = (
        [] if name in ("plot", OPTIONS) else [*map(_bare, project["dependencies"]), *_listed("plot", project)]
    )
    return list(dict.fromkeys(own + (_listed(name, project) if name != "engine" else [])))


def _listed(name: str, project: Mapping[str, Any]) -> list[str]:
    """An extra, with the extras that it names."""
    found: list[str] = []
    for requirement in project["optional-dependencies"][name]:
        inner = re.fullmatch(rf"{project['name']}\[(.+)\]", requirement)
        found += (
            [r for p in inner[1].split(",") for r in _listed(p, project)] if inner else [_bare(requirement)]
        )
    return found


def _bare(requirement: str) -> str:
    return requirement.partition(";")[0]


def split_requirement(requirement: str) -> tuple[str, str]:
    """`"torch>=2.11,<2.14"` -> `("torch", ">=2.11,<2.14")`."""
    match = re.fullmatch(r"([A-Za-z0-9._-]+)(.*)", requirement)
    if match is None:
        raise SetupError(f"pyproject.toml: requirement {requirement!r} is not NAME followed by versions")
    return match[1], match[2]


def unlocked(tier: str, root: Path = ROOT) -> list[str]:
    """The ranges of what the locks leave out: torch, whose build depends on the machine, and Triton, whose
    version depends on the torch where that is one for CUDA."""
    return [r for r in extra(tier, root) if split_requirement(r)[0] in ("torch", "triton")]


def needs_torch(tier: str) -> bool:
    """Whether the tier holds torch."""
    return TIERS.index(tier) >= TIERS.index("engine")


def requirement_files(tier: str, root: Path) -> list[Path]:
    """The lock of a tier and, where it has one, the list of packages installed without their dependencies."""
    files = [root / "requirements" / f"{tier}.txt"]
    return [*files, root / "requirements" / "no-deps.txt"] if needs_torch(tier) else files


def digest(tier: str, root: Path = ROOT) -> str:
    """sha256 over everything that decides what a tier installs."""
    total = hashlib.sha256(UV.encode())
    for file in requirement_files(tier, root):
        total.update(file.read_bytes())
    for requirement in unlocked(tier, root):
        total.update(requirement.encode())
    return total.hexdigest()


def satisfies(version: str, ranges: str) -> bool:
    """Whether a version lies in comma-separated ranges of `>=` and `<` (all that pyproject.toml uses)."""

    def parts(text: str) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", text.partition("+")[0])[:3]]

    for one in filter(None, ranges.split(",")):
        if one.startswith(">="):
            good = parts(version) >= parts(one[2:])
        elif one.startswith("<"):
            good = parts(version) < parts(one[1:])
        else:
            raise SetupError(f"pyproject.toml: {one!r} is neither >= nor <")
        if not good:
            return False
    return True


def has_gpu() -> bool:
    """Whether nvidia-smi runs and lists a GPU."""
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and "GPU" in answer.stdout


def offers_cpu_torch(folders: list[str], requirement: str, python: tuple[int, int]) -> bool:
    """Whether a local find-links folder holds a CPU build of torch in the wanted range for this Python."""
    pattern = re.compile(rf"torch-([0-9.]+)\+cpu-cp{python[0]}{python[1]}-.*{os.uname().machine}\.whl")
    for folder in folders:
        path = Path(folder.removeprefix("file://"))
        names = os.listdir(path) if path.is_dir() else []
        for match in filter(None, map(pattern.fullmatch, names)):
            if satisfies(match[1], split_requirement(requirement)[1]):
                return True
    return False


@dataclass(frozen=True)
class TorchBuild:
    """`kind` (cpu, gpu, or given: what the user's settings lead to) and the options that make uv take it."""

    kind: str
    options: tuple[str, ...] = ()


def choose_torch(
    environ: Mapping[str, str], folders: list[str], requirement: str, python: tuple[int, int], gpu: bool
) -> TorchBuild:
    """No gigabytes of CUDA where no GPU is; the user's word (UV_TORCH_BACKEND, PUZZLE_WHEELS) goes first."""
    if environ.get("UV_TORCH_BACKEND") or environ.get("PUZZLE_WHEELS"):
        return TorchBuild("given")
    if gpu:
        return TorchBuild("gpu", ("--torch-backend=auto",))
    if offers_cpu_torch(folders, requirement, python):
        return TorchBuild("cpu")
    return TorchBuild("cpu", CPU_INDEX)
