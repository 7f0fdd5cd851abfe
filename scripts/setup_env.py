"""Builds and checks the environment that env.sh activates, with the standard library only.

`ensure [TIER]` makes `.venv` hold a tier (without TIER: the richest built so far, else plot); `check [TIER]`
says what the running interpreter lacks. Exit code 2 and one line say what is wrong.

Each tier of `requirements/` holds the one before, with the same versions: one `.venv` serves all, and a built
tier builds the lesser ones.
"""

import argparse
import contextlib
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tiers import (
    CPU_INDEX,
    OPTIONS,
    ROOT,
    TIERS,
    UV,
    SetupError,
    choose_torch,
    digest,
    extra,
    has_gpu,
    needs_torch,
    requirement_files,
    satisfies,
    split_requirement,
    unlocked,
)

IN_DOUBT = ""  # in place of a digest: an installation began and has not ended well


@dataclass
class State:
    """What `.venv` holds: the digest each built tier was made from, the kind of torch build, and the build
    that was asked for by name (UV_TORCH_BACKEND)."""

    tiers: dict[str, str] = field(default_factory=dict)
    torch: str = ""
    asked: str = ""

    @staticmethod
    def path(root: Path) -> Path:
        """It goes when the environment goes."""
        return root / ".venv" / ".puzzle.json"

    @classmethod
    def load(cls, root: Path) -> "State":
        """The recorded state; an empty one where there is none to read."""
        try:
            return cls(**json.loads(cls.path(root).read_text()))
        except (OSError, ValueError, TypeError):
            return cls()

    def save(self, root: Path) -> None:
        """Replaces the record at once."""
        temporary = self.path(root).with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self)))
        os.replace(temporary, self.path(root))

    def is_current(self, tier: str, root: Path) -> bool:
        """Whether the tier was built from today's locks, with the torch that is asked for, or else one that
        uses the GPU if there is one."""
        if self.tiers.get(tier) != digest(tier, root):
            return False
        asked = os.environ.get("UV_TORCH_BACKEND")
        if needs_torch(tier) and asked:
            return asked == self.asked
        # A CUDA build serves hosts without a GPU too (login nodes); a CPU build wastes hosts with one.
        return not (needs_torch(tier) and self.torch == "cpu" and has_gpu())

    def richest(self) -> str:
        """The richest tier built so far (it may be out of date), else plot."""
        built = [tier for tier, made_from in self.tiers.items() if made_from != IN_DOUBT]
        return max(built, key=TIERS.index, default=TIERS[0])


# Installing


@contextlib.contextmanager
def exclusive(root: Path) -> Generator[None]:
    """Lets one process at a time install into this checkout."""
    try:
        handle = open(root / ".venv.lock", "a")  # noqa: SIM115
    except OSError as error:
        reason = f"{error.strerror}; make it writable or set PUZZLE_PYTHON"
        raise SetupError(f"cannot install into {root}: {reason}") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is installing here; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


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
    found: dict[str, str] = {}
    # Lines are SECTION.KEY='VALUE'; the environment's section (:env:) outranks the files'.
    for line in sorted(listing.splitlines(), key=lambda line: line.startswith(":env:")):
        match = re.fullmatch(r"(?:global|install|:env:)\.([a-z-]+)='(.*)'", line)
        if match:
            found[match[1]] = match[2]
    names = {"find-links": "UV_FIND_LINKS", "index-url": "UV_DEFAULT_INDEX", "cert": "SSL_CERT_FILE"}
    if "find-links" in found:  # a list: lines in files (printed as \\n), blanks in the environment
        found["find-links"] = ",".join(found["find-links"].replace("\\n", " ").split())
    return {name: found[key] for key, name in names.items() if found.get(key)}


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
        for name in ("python", "uv"):
            subprocess.run([str(root / ".venv/bin" / name), "--version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def choose_arguments(
    tier: str, root: Path, environ: Mapping[str, str], state: State
) -> tuple[State, list[str], str]:
    """The torch to have instead of the one of `state`, what uv shall install, and a failure's words."""
    arguments = ["-r", str(requirement_files(tier, root)[0])]
    failure = f"cannot install the tier {tier}"
    if tier == "baseline":
        failure += "; PUZZLE_ENV=engine does without DeepSpeed-Chat"
    if not needs_torch(tier):
        return state, arguments, failure
    ranges = unlocked(tier, root)
    requirement = next(r for r in ranges if split_requirement(r)[0] == "torch")
    folders = environ.get("UV_FIND_LINKS", "").split(",")
    torch = choose_torch(environ, folders, requirement, sys.version_info[:2], has_gpu())
    arguments += [*ranges, *torch.options]
    asked = environ.get("UV_TORCH_BACKEND", "")
    kind = torch.kind
    if state.torch and not asked and (kind == "cpu" or state.torch != "cpu"):
        kind = state.torch  # what is there serves, unless it wastes a GPU
    if state.torch and (kind != state.torch or (asked and asked != state.asked)):
        arguments += ["--reinstall-package", "torch"]  # uv takes any build of the right version for it
    if torch.options == CPU_INDEX or asked:
        failure += "; where PyTorch's index is out of reach, name a folder with its wheel in UV_FIND_LINKS"
    return State(torch=kind, asked=asked or state.asked), arguments, failure


def install(tier: str, root: Path) -> None:
    """Makes `.venv` hold the tier, and records it; what a killed or failed try left in doubt is made anew."""
    wheels = os.environ.get("PUZZLE_WHEELS")
    if wheels and not Path(wheels).is_dir():
        raise SetupError(f"PUZZLE_WHEELS={wheels} is no folder; give one that holds wheels, or unset it")
    if not uv_runs(root):
        make_venv(root, wheels)
    state = State.load(root)
    repair = IN_DOUBT in state.tiers.values()
    # Lesser tiers that are current stay usable meanwhile: their packages are not touched.
    touched = [t for t in (*state.tiers, tier) if repair or t == tier or not state.is_current(t, root)]
    replace(state, tiers={**state.tiers, **dict.fromkeys(touched, IN_DOUBT)}).save(root)

    python = root / ".venv/bin/python"
    environ = {**pip_settings(python), **os.environ, "UV_PYTHON_DOWNLOADS": "never"}
    if not environ.get("UV_TORCH_BACKEND"):
        environ.pop("UV_TORCH_BACKEND", None)  # uv refuses an empty one
    uv = [str(root / ".venv/bin/uv"), "pip", "install", "--python", str(python)]
    uv += ["--no-index", "--find-links", wheels] if wheels else []
    uv += [] if sys.stderr.isatty() else ["--quiet"]
    uv += ["--reinstall"] if repair else []
    made, arguments, failure = choose_arguments(tier, root, environ, state)
    command([*uv, *arguments], environ, failure)
    if needs_torch(tier):
        check_torch(root, environ)
    for extra_file in requirement_files(tier, root)[1:]:
        command([*uv, "--no-deps", "-r", str(extra_file)], environ, failure)
    built = {lesser: digest(lesser, root) for lesser in TIERS[: TIERS.index(tier) + 1]}
    replace(made, tiers={**state.tiers, **built}).save(root)


def check_torch(root: Path, environ: Mapping[str, str]) -> None:
    """Raises SetupError where the torch that came is of another kind than the one that was asked for."""
    asked = environ.get("UV_TORCH_BACKEND", "auto")
    for folder in (root / ".venv").glob("lib/python*/site-packages/torch-*.dist-info"):
        version = folder.name.removeprefix("torch-").removesuffix(".dist-info")
        build = version.partition("+")[2]  # empty: as PyPI has it
        if asked != "auto" and (build not in ("", "cpu") if asked == "cpu" else build == "cpu"):
            raise SetupError(
                f"UV_TORCH_BACKEND={asked} is asked for, and what could be had is torch {version}; "
                "look at the folders in UV_FIND_LINKS, PIP_FIND_LINKS and PUZZLE_WHEELS"
            )


def ensure(tier: str | None, root: Path = ROOT) -> None:
    """Makes `.venv` hold the tier (None: the richest it holds), unless it does."""
    state = State.load(root)
    tier = tier or state.richest()
    if state.is_current(tier, root):
        return
    with exclusive(root):
        if not State.load(root).is_current(tier, root):
            say(f"installing the tier {tier} into {root / '.venv'}")
            install(tier, root)


# Checking an interpreter that is used as it is


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
            ensure(arguments.tier)
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
