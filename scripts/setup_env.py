"""Builds and checks the environment that env.sh activates, with the standard library only.

`ensure [TIER]` makes `.venv` hold a tier (without TIER: the richest built so far, else plot); `check [TIER]`
says what the running interpreter lacks. Exit code 2 and one line say what is wrong.

Each tier of `requirements/` holds the one before, with the same versions: one `.venv` serves all, and a built
tier builds the lesser ones. A stamp per tier records what it was installed from. `.venv.lock` is locked
while installing and holds a word from then until success: what a killed installation left is installed anew.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIERS = ("plot", "engine", "baseline", "dev")
OPTIONS = "options"  # the extra whose packages only single features need
UV = "uv>=0.9"
CPU_INDEX = ("--torch-backend=cpu",)


class SetupError(Exception):
    """One line for people: what is wrong and how to mend it."""


# What is asked for


def extra(name: str, root: Path = ROOT) -> list[str]:
    """Requirements (PEP 508, without markers) of an extra of pyproject.toml, the extras it names included."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    found: list[str] = []
    for requirement in project["optional-dependencies"][name]:
        inner = re.fullmatch(rf"{project['name']}\[(.+)\]", requirement)
        found += [r for part in inner[1].split(",") for r in extra(part, root)] if inner else [requirement]
    return found


def split_requirement(requirement: str) -> tuple[str, str]:
    """`"torch>=2.11,<2.14"` -> `("torch", ">=2.11,<2.14")`."""
    match = re.fullmatch(r"([A-Za-z0-9._-]+)(.*)", requirement)
    if match is None:
        raise SetupError(f"pyproject.toml: requirement {requirement!r} is not NAME followed by versions")
    return match[1], match[2]


def torch_requirement(root: Path = ROOT) -> str:
    """The range of torch; the locks leave torch out, because its build depends on the machine."""
    return next(r for r in extra("engine", root) if split_requirement(r)[0] == "torch")


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
    if needs_torch(tier):
        total.update(torch_requirement(root).encode())
    return total.hexdigest()


# Which torch


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


# What is there


def stamp_path(tier: str, root: Path) -> Path:
    """Where a built tier records what it was built from."""
    return root / ".venv" / f".puzzle-{tier}.json"


def is_current(tier: str, root: Path = ROOT) -> bool:
    """Whether the tier was built from today's locks, with a torch that uses the GPU if there is one."""
    try:
        stamp = json.loads(stamp_path(tier, root).read_text())
    except (OSError, ValueError):
        return False
    if stamp.get("digest") != digest(tier, root):
        return False
    # A CUDA build serves hosts without a GPU too (login nodes); a CPU build wastes hosts with one.
    return not (needs_torch(tier) and stamp.get("torch") == "cpu" and has_gpu())


def richest(root: Path = ROOT) -> str:
    """The richest tier ever built here (it may be out of date), else plot."""
    return next((tier for tier in reversed(TIERS) if stamp_path(tier, root).exists()), "plot")


# Installing


@contextlib.contextmanager
def exclusive(root: Path) -> Generator[bool]:
    """Locks installation in this checkout; yields whether the last one was cut off."""
    try:
        handle = open(root / ".venv.lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise SetupError(
            f"cannot install into {root}: {error.strerror}; make it writable or set PUZZLE_PYTHON"
        ) from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is installing here; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        handle.seek(0)
        interrupted = bool(handle.read())
        yield interrupted
        handle.truncate(0)


def mark_installing(root: Path) -> None:
    """From here until success an end of this process means a half-made environment."""
    (root / ".venv.lock").write_text("installing\n")


def say(text: str) -> None:
    """Progress for people; standard output belongs to the caller."""
    print(f"puzzle: {text}", file=sys.stderr, flush=True)


def command(arguments: list[str], environ: Mapping[str, str], failure: str) -> None:
    """Runs one installer; its own words go to standard error."""
    try:
        code = subprocess.run(arguments, env=environ, stdout=sys.stderr, check=False).returncode
    except OSError as error:
        raise SetupError(f"{failure} ({error})") from None
    if code != 0:
        raise SetupError(f"{failure} (the reason is above)")


def require_venv_module() -> None:
    """Debian and Ubuntu ship venv without ensurepip; as root this is mended, else said."""
    if importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip"):
        return
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    failure = f"Python's venv module is incomplete; install it (Debian, Ubuntu: apt-get install {package})"
    if os.geteuid() != 0 or shutil.which("apt-get") is None or not sys.base_prefix.startswith("/usr"):
        raise SetupError(failure)
    say(f"installing {package} (apt-get)")
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # apt-get has no way to be silent but for its errors, so a shell drops the rest.
    script = f"{{ apt-get -qq update && apt-get -qq install -y {package}; }} </dev/null >/dev/null"
    command(["sh", "-c", script], environ, failure)


def pip_settings(python: Path) -> dict[str, str]:
    """pip's settings (files and environment) that uv has no way to see, as variables that uv reads."""
    listing = subprocess.run(
        [str(python), "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    found: dict[str, list[str]] = {}
    # Lines are SECTION.KEY='VALUE'; the environment's section (:env:) outranks the files'.
    for line in sorted(listing.splitlines(), key=lambda line: line.startswith(":env:")):
        match = re.fullmatch(r"(?:global|install|:env:)\.([a-z-]+)='(.*)'", line)
        if match:
            found[match[1]] = match[2].replace("\\n", " ").split()
    names = {"find-links": "UV_FIND_LINKS", "index-url": "UV_DEFAULT_INDEX", "cert": "SSL_CERT_FILE"}
    return {name: ",".join(found[key]) for key, name in names.items() if found.get(key)}


def make_venv(root: Path, wheels: str | None) -> None:
    """A fresh `.venv` with uv in it."""
    require_venv_module()
    shutil.rmtree(root / ".venv", ignore_errors=True)
    base = getattr(sys, "_base_executable", None) or sys.executable
    command([base, "-I", "-m", "venv", str(root / ".venv")], os.environ, f"cannot make {root / '.venv'}")
    pip = [str(root / ".venv/bin/python"), "-I", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    offline = ["--no-index", "--find-links", wheels] if wheels else []
    where = f"from PUZZLE_WHEELS={wheels}" if wheels else "with pip"
    command([*pip, *offline, UV], os.environ, f"cannot install uv {where}")


def uv_runs(root: Path) -> bool:
    """Whether the environment exists and its installer works."""
    try:
        return all(
            subprocess.run(
                [str(root / ".venv/bin" / name), "--version"], capture_output=True, check=False
            ).returncode
            == 0
            for name in ("python", "uv")
        )
    except OSError:
        return False


def install(tier: str, root: Path, repair: bool) -> str:
    """Makes `.venv` hold the tier; returns the kind of torch build ("" for none)."""
    wheels = os.environ.get("PUZZLE_WHEELS")
    if wheels and not Path(wheels).is_dir():
        raise SetupError(f"PUZZLE_WHEELS={wheels} is no folder; give one that holds wheels, or unset it")
    if not uv_runs(root):
        make_venv(root, wheels)
    python = root / ".venv/bin/python"
    environ = {**pip_settings(python), **os.environ, "UV_PYTHON_DOWNLOADS": "never"}
    uv = [str(root / ".venv/bin/uv"), "pip", "install", "--python", str(python)]
    if wheels:
        uv += ["--no-index", "--find-links", wheels]
    if not sys.stderr.isatty():
        uv.append("--quiet")
    if repair:
        uv.append("--reinstall")
    failure = f"cannot install the tier {tier}"
    torch = TorchBuild("")
    arguments = ["-r", str(requirement_files(tier, root)[0])]
    if needs_torch(tier):
        requirement = torch_requirement(root)
        folders = environ.get("UV_FIND_LINKS", "").split(",")
        torch = choose_torch(os.environ, folders, requirement, sys.version_info[:2], has_gpu())
        arguments += [requirement, *torch.options]
        if torch.options == CPU_INDEX:
            failure += (
                "; where PyTorch's index is out of reach, name a folder with its CPU wheel in UV_FIND_LINKS"
            )
        if torch.kind == "gpu" and built_torch(root) == "cpu":
            arguments += ["--reinstall-package", "torch"]
    command([*uv, *arguments], environ, failure)
    if needs_torch(tier):
        command([*uv, "--no-deps", "-r", str(root / "requirements/no-deps.txt")], environ, failure)
    return torch.kind


def built_torch(root: Path) -> str:
    """The kind of torch build that the stamps speak of."""
    for tier in reversed(TIERS):
        with contextlib.suppress(OSError, ValueError):
            return json.loads(stamp_path(tier, root).read_text()).get("torch", "")
    return ""


def ensure(tier: str, root: Path = ROOT) -> None:
    """Makes `.venv` hold the tier, unless it does."""
    if is_current(tier, root):
        return
    with exclusive(root) as interrupted:
        if not interrupted and is_current(tier, root):
            return
        say(
            f"installing the tier {tier} into {root / '.venv'}"
            + (" anew: it was cut off" if interrupted else "")
        )
        mark_installing(root)
        kind = install(tier, root, repair=interrupted)
        for lesser in TIERS[: TIERS.index(tier) + 1]:
            path = stamp_path(lesser, root)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps({"digest": digest(lesser, root), "torch": kind}))
            os.replace(temporary, path)


# Checking an interpreter that is used as it is


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


def check(tier: str) -> None:
    """Says what this interpreter lacks of the tier; missing options and other versions are a notice."""
    missing, options, versions = [], [], []
    needless = set(extra(OPTIONS)) if tier == "engine" else set()
    wanted = dict.fromkeys([*extra(tier), *needless])
    for requirement in sorted(wanted, key=str.lower):
        name, ranges = split_requirement(requirement)
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            (options if requirement in needless else missing).append(name)
            continue
        if not satisfies(version, ranges):
            versions.append(f"{name} {version} (made for {ranges})")
    if missing:
        names = ", ".join(missing)
        raise SetupError(
            f"PUZZLE_PYTHON={sys.executable} lacks, for the tier {tier}: {names}; install them there"
        )
    if options:
        say(f"PUZZLE_PYTHON lacks {', '.join(options)}; what needs them will not work")
    if versions:
        say(f"PUZZLE_PYTHON has versions that are not tested: {', '.join(versions)}")


def main() -> int:
    """Exit codes: 0 done, 2 one line said why not, 130 interrupted."""
    parser = argparse.ArgumentParser(description="Build or check the environment of this checkout.")
    parser.add_argument("action", choices=["ensure", "check"])
    parser.add_argument("tier", nargs="?")
    arguments = parser.parse_args()
    try:
        if arguments.tier and arguments.tier not in TIERS:
            raise SetupError(f"PUZZLE_ENV={arguments.tier} is not a tier; use one of {', '.join(TIERS)}")
        if arguments.action == "check":
            check(arguments.tier or "plot")
        else:
            ensure(arguments.tier or richest())
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot set up the environment: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; the next use repairs what is half-made", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
