"""env.sh in the shells people use; uv is a stand-in that writes down what it is asked (see conftest)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.setup.conftest import Checkout, write_program

SHELLS = [shell for shell in ("bash", "zsh") if shutil.which(shell)]
CURRENT = f"python{sys.version_info.major}.{sys.version_info.minor}"


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    """The one line starting with `error:`."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.parametrize("shell", SHELLS)
def test_first_use_installs_and_the_second_does_not(checkout: Checkout, shell: str) -> None:
    script = """
        PUZZLE_ENV=plot; . "$ENV"; echo $?
        command -v python puzzle; echo "$PYTHONPATH"; echo "$VIRTUAL_ENV"
    """
    for _ in range(2):
        result = checkout.shell(script, shell)
        root = checkout.root
        expected = ["0", f"{root}/.venv/bin/python", f"{root}/scripts/bin/puzzle", f"{root}", f"{root}/.venv"]
        assert result.stdout.splitlines() == expected, result.stderr
    assert len(checkout.uv_calls()) == 1
    assert checkout.uv_calls()[0].endswith("requirements/plot.txt")


@pytest.mark.parametrize("shell", SHELLS)
def test_leaves_the_callers_shell_as_it_was(checkout: Checkout, shell: str) -> None:
    state = "set -o; alias; echo $PWD; echo $#; echo $1"
    names = "typeset -f | grep -c _puzzle_; true"
    result = checkout.shell(
        f'set -eu; set -- first second; before=$({state}); . "$ENV" third; after=$({state})\n'
        f'test "$before" = "$after" && echo same; {names}',
        shell,
    )
    assert result.stdout.split() == ["same", "0"], result.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_sourcing_again_does_not_grow_the_paths(checkout: Checkout, shell: str) -> None:
    script = f"""
        export PYTHONPATH=/mine PYTHONDONTWRITEBYTECODE=1
        . "$ENV"; first=$PATH
        PUZZLE_PYTHON={sys.executable}; . "$ENV"; unset PUZZLE_PYTHON; . "$ENV"; . "$ENV"
        test "$first" = "$PATH" && echo same; echo "$PYTHONPATH"; echo "${{PYTHONDONTWRITEBYTECODE-none}}"
    """
    result = checkout.shell(script, shell)
    assert result.stdout.splitlines() == ["same", f"{checkout.root}:/mine", "none"], result.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_failure_returns_two_and_the_shell_lives(checkout: Checkout, shell: str) -> None:
    result = checkout.shell('PUZZLE_ENV=huge; . "$ENV"; echo "returned $?"', shell)
    assert result.stdout == "returned 2\n"
    assert (
        error_line(result) == "error: PUZZLE_ENV=huge is not a tier; use one of plot, engine, baseline, dev"
    )


@pytest.mark.parametrize("shell", SHELLS)
def test_through_a_symbolic_link_and_a_relative_path(checkout: Checkout, shell: str) -> None:
    (checkout.home / "link.sh").symlink_to(checkout.root / "env.sh")
    result = checkout.shell('. ./link.sh; echo "$VIRTUAL_ENV"', shell)
    assert result.stdout == f"{checkout.root}/.venv\n", result.stderr


@pytest.mark.parametrize("shell", [shell for shell in ("dash", "ksh") if shutil.which(shell)])
def test_other_shells_are_refused(checkout: Checkout, shell: str) -> None:
    result = subprocess.run(
        [shell, "-c", '. "$ENV"; echo $?'],
        env=checkout.environment(ENV=str(checkout.root / "env.sh")),
        capture_output=True,
        text=True,
    )
    assert result.stdout == "2\n"
    assert "bash and zsh" in error_line(result)


def test_richest_tier_is_activated_and_builds_the_lesser(checkout: Checkout) -> None:
    checkout.shell('PUZZLE_ENV=baseline; . "$ENV"')
    calls = checkout.uv_calls()
    assert len(calls) == 2
    assert "requirements/baseline.txt torch>=2.11,<2.14 --torch-backend=cpu" in calls[0]
    assert calls[1].endswith("--no-deps -r " + str(checkout.root / "requirements/no-deps.txt"))
    for tier in ("plot", "engine", "baseline", ""):
        assert checkout.shell('. "$ENV"', PUZZLE_ENV=tier).returncode == 0
    assert checkout.uv_calls() == calls
    # Without a word the richest tier is brought up to date, not the least.
    with open(checkout.root / "requirements/baseline.txt", "a") as lock:
        lock.write("another==1.0\n")
    checkout.shell('. "$ENV"')
    assert "requirements/baseline.txt" in checkout.uv_calls()[2]


def test_failed_installation_leaves_no_stamp_and_is_tried_again(checkout: Checkout) -> None:
    (checkout.root / "fail").touch()
    result = checkout.shell('. "$ENV"; echo $?; command -v puzzle')
    assert result.stdout == "2\n"
    assert "cannot install the tier plot" in error_line(result)
    (checkout.root / "fail").unlink()
    assert checkout.shell('. "$ENV" && command -v puzzle').stdout
    assert "--reinstall" in checkout.uv_calls()[1]


def test_killed_installation_is_repaired(checkout: Checkout) -> None:
    (checkout.root / "hold").touch()
    environment = checkout.environment(ENV=str(checkout.root / "env.sh"))
    first = subprocess.Popen(
        ["bash", "-c", '. "$ENV"'], env=environment, start_new_session=True, stderr=subprocess.DEVNULL
    )
    wait_for(checkout.root / "uv-calls")
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    (checkout.root / "hold").unlink()
    result = checkout.shell('. "$ENV"; . "$ENV"; echo $?')
    assert result.stdout == "0\n"
    calls = checkout.uv_calls()
    assert ["--reinstall" in call for call in calls] == [False, True]


def test_a_tier_that_cannot_be_had_does_not_bar_the_lesser(checkout: Checkout) -> None:
    (checkout.root / "fail").touch()
    assert "PyTorch's index" in error_line(checkout.shell('PUZZLE_ENV=engine; . "$ENV"'))
    (checkout.root / "fail").unlink()
    assert checkout.shell('PUZZLE_ENV=plot; . "$ENV"').returncode == 0
    assert checkout.shell('PUZZLE_ENV=plot; . "$ENV"').returncode == 0
    assert checkout.shell('PUZZLE_ENV=engine; . "$ENV"').returncode == 0
    calls = checkout.uv_calls()
    assert ["--reinstall" in call for call in calls] == [False, True, True, True]
    assert [tier in call for tier, call in zip(["engine", "plot", "engine", "no-deps"], calls, strict=True)]


def test_a_failed_richer_tier_leaves_the_lesser_usable(checkout: Checkout) -> None:
    assert checkout.shell('PUZZLE_ENV=plot; . "$ENV"').returncode == 0
    (checkout.root / "fail").touch()
    assert checkout.shell('PUZZLE_ENV=dev; . "$ENV"').returncode == 2
    assert checkout.shell('. "$ENV"').returncode == 0
    assert len(checkout.uv_calls()) == 2


def test_two_shells_at_once_install_once(checkout: Checkout) -> None:
    (checkout.root / "hold").touch()
    environment = checkout.environment(ENV=str(checkout.root / "env.sh"))
    script = '. "$ENV" && command -v puzzle'
    shells = [
        subprocess.Popen(
            ["bash", "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    wait_for(checkout.root / "uv-calls")
    time.sleep(0.5)
    (checkout.root / "hold").unlink()
    outputs = [shell.communicate(timeout=60) for shell in shells]
    assert [out for out, _ in outputs] == [f"{checkout.root}/scripts/bin/puzzle\n"] * 3
    assert sum("waiting" in err for _, err in outputs) == 2
    assert len(checkout.uv_calls()) == 1


def test_cpu_build_is_replaced_once_there_is_a_gpu_and_not_back(checkout: Checkout) -> None:
    checkout.shell('PUZZLE_ENV=engine; . "$ENV"')
    write_program(checkout.tools / "nvidia-smi", "#!/bin/sh\necho 'GPU 0: some card'\n")
    checkout.shell('PUZZLE_ENV=engine; . "$ENV"')
    assert "--torch-backend=auto --reinstall-package torch" in checkout.uv_calls()[2]
    write_program(checkout.tools / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    checkout.shell('PUZZLE_ENV=engine; . "$ENV"')
    assert len(checkout.uv_calls()) == 4
    assert json.loads((checkout.root / ".venv/.puzzle.json").read_text())["torch"] == "gpu"


def test_another_build_of_torch_replaces_the_one_that_is_there(checkout: Checkout) -> None:
    """A login node without a GPU: an environment for CPUs is there, and the nodes have GPUs."""
    checkout.shell('PUZZLE_ENV=engine; . "$ENV"')
    assert "--reinstall-package" not in checkout.uv_calls()[0]
    for _ in range(2):
        result = checkout.shell('PUZZLE_ENV=engine; . "$ENV"; echo $?', UV_TORCH_BACKEND="cu130")
        assert result.stdout == "0\n", result.stderr
    calls = checkout.uv_calls()
    assert len(calls) == 4  # two for each build: the tier, and what is installed without dependencies
    assert "--reinstall-package torch" in calls[2]
    # Without the word the build that was asked for stays; another word brings another one.
    checkout.shell('PUZZLE_ENV=engine; . "$ENV"')
    checkout.shell('. "$ENV"')
    assert len(checkout.uv_calls()) == 4
    checkout.shell('. "$ENV"', UV_TORCH_BACKEND="cpu")
    assert "--reinstall-package torch" in checkout.uv_calls()[4]


@pytest.mark.parametrize(("came", "asked"), [("2.13.0+cpu", "cu130"), ("2.13.0+cu130", "cpu")])
def test_a_build_that_could_not_be_had_is_said(checkout: Checkout, came: str, asked: str) -> None:
    packages = checkout.root / f".venv/lib/{CURRENT}/site-packages"
    (packages / f"torch-{came}.dist-info").mkdir(parents=True)
    result = checkout.shell('PUZZLE_ENV=engine; . "$ENV"; echo $?', UV_TORCH_BACKEND=asked)
    assert result.stdout == "2\n"
    assert f"UV_TORCH_BACKEND={asked} is asked for, and what could be had is torch {came}" in error_line(
        result
    )


def test_wheels_folder_installs_without_index(checkout: Checkout) -> None:
    result = checkout.shell('. "$ENV"; echo $?', PUZZLE_WHEELS="/nowhere")
    assert result.stdout == "2\n"
    assert "PUZZLE_WHEELS=/nowhere is no folder" in error_line(result)
    wheels = checkout.home / "wheels"
    wheels.mkdir()
    assert checkout.shell('PUZZLE_ENV=engine . "$ENV"', PUZZLE_WHEELS=str(wheels)).returncode == 0
    for call in checkout.uv_calls():
        assert f"--no-index --find-links {wheels}" in call
        assert "torch-backend" not in call


def test_given_interpreter_is_used_and_nothing_installed(checkout: Checkout) -> None:
    shutil.rmtree(checkout.root / ".venv")
    # A name that is not `python`, given by a relative path.
    given = write_program(checkout.home / "our-python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    script = """
        . "$ENV" || exit; cd /
        python -c 'import sys; print(sys.path[1])'
        python3 -c 'import numpy, os; print(os.environ["PUZZLE_PYTHON"])'
    """
    result = checkout.shell(script, PUZZLE_PYTHON="./our-python", PUZZLE_ENV="plot")
    assert result.stdout.splitlines() == [str(checkout.root), f"{checkout.home}/./{given.name}"], (
        result.stderr
    )
    assert not (checkout.root / ".venv").exists()


@pytest.mark.parametrize("value", ["/nowhere/python", "/bin/true-or-not", "no-such-program"])
def test_given_interpreter_that_does_not_run(checkout: Checkout, value: str) -> None:
    result = checkout.shell('. "$ENV"; echo $?', PUZZLE_PYTHON=value)
    assert result.stdout == "2\n"
    assert f"PUZZLE_PYTHON={value}" in error_line(result)


def test_given_interpreter_that_lacks_packages(checkout: Checkout) -> None:
    bare = checkout.root / ".venv/bin/python"
    result = checkout.shell('. "$ENV"; echo $?', PUZZLE_PYTHON=str(bare), PUZZLE_ENV="plot")
    assert result.stdout == "2\n"
    assert "tier plot: matplotlib, numpy, pandas;" in error_line(result)
    assert checkout.uv_calls() == []


def fake_pythons(checkout: Checkout, versions: dict[str, bool]) -> str:
    """A PATH whose interpreters are these; True ones are real, the others too old for anything."""
    tools = checkout.home / "pythons"
    for name, real in versions.items():
        write_program(
            tools / name, f'#!/bin/sh\nexec {sys.executable} "$@"\n' if real else "#!/bin/sh\nexit 1\n"
        )
    for name in ("readlink", "grep"):
        program = shutil.which(name)
        assert program
        (tools / name).symlink_to(program)
    return str(tools)


def test_an_old_python3_is_passed_over(checkout: Checkout) -> None:
    (checkout.root / ".venv/bin/python").unlink()
    path = fake_pythons(checkout, {"python3": False, CURRENT: True})
    # The refusal of the tier shows that the installer ran, so the search ended at the right interpreter.
    result = subprocess.run(
        [shutil.which("bash") or "bash", "-c", '. "$ENV"'],
        env={
            "PATH": path,
            "HOME": str(checkout.home),
            "ENV": str(checkout.root / "env.sh"),
            "PUZZLE_ENV": "huge",
        },
        capture_output=True,
        text=True,
    )
    assert "is not a tier" in error_line(result)


def test_no_python_at_all_is_said(checkout: Checkout) -> None:
    (checkout.root / ".venv/bin/python").unlink()
    path = fake_pythons(checkout, {"python3": False, "python3.12": False})
    result = subprocess.run(
        [shutil.which("bash") or "bash", "-c", '. "$ENV"'],
        env={"PATH": path, "HOME": str(checkout.home), "ENV": str(checkout.root / "env.sh")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "Python 3.11 or newer" in error_line(result)


def test_unwritable_checkout_is_said(checkout: Checkout) -> None:
    (checkout.root / ".venv.lock").mkdir()
    result = checkout.shell('. "$ENV"; echo $?')
    assert result.stdout == "2\n"
    assert "cannot install into" in error_line(result)


@pytest.mark.parametrize("arguments", [[], ["--only", "figure8", "table3"], ["--out=x y", "--logs", "/logs"]])
def test_runme_a_passes_arguments_and_the_exit_code(checkout: Checkout, arguments: list[str]) -> None:
    (checkout.root / "puzzle/plotting").mkdir(parents=True)
    (checkout.root / "puzzle/plotting/__main__.py").write_text(
        "import json, sys\nprint(json.dumps(sys.argv[1:]))\nsys.exit(2)\n"
    )
    link = checkout.home / "draw"
    link.symlink_to(checkout.root / "RUNME-a.sh")
    result = subprocess.run(
        [str(link), *arguments],
        env=checkout.environment(PUZZLE_PYTHON=sys.executable),
        cwd=checkout.home,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2, result.stderr
    start, passed, end = result.stdout.splitlines()
    assert start.startswith("start: ")
    assert end.startswith("end: ")
    assert " duration: " in end
    assert json.loads(passed) == arguments
    assert sorted(p.name for p in checkout.home.iterdir()) == ["draw"]
