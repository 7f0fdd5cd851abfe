"""The installer's decisions."""

import itertools
import re
import sys
import tomllib
from pathlib import Path

import pytest
import setup_env
import tiers
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.setup.conftest import REPOSITORY, write_program

(TORCH,) = tiers.unlocked("engine")
WHEEL = "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl"


def lock(tier: str) -> dict[str, str]:
    lines = (REPOSITORY / f"requirements/{tier}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines)


def test_each_lock_holds_the_one_before_in_the_same_versions() -> None:
    locks = [lock(tier) for tier in tiers.TIERS]
    for lesser, richer in itertools.pairwise(locks):
        assert lesser.items() < richer.items()


@pytest.mark.parametrize("tier", tiers.TIERS)
def test_locks_satisfy_pyproject(tier: str) -> None:
    extras = [*tiers.extra(tier), *(tiers.extra("options") if tier == "engine" else [])]
    locked = lock(tier)
    for requirement in map(Requirement, extras):
        if requirement.name not in ("torch", "triton"):
            assert requirement.specifier.contains(locked[requirement.name.lower()]), requirement


def test_the_installed_package_brings_what_it_needs() -> None:
    """`pip install .` installs `dependencies`: with what draws, all that the tier engine is made of."""
    document = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    own = set(document["project"]["dependencies"])
    engine = set(tiers.extra("engine"))
    assert own | set(tiers.extra("plot")) == engine
    assert own != engine
    assert engine < set(tiers.extra("baseline")) < set(tiers.extra("dev"))
    assert not engine & set(tiers.extra("options"))
    assert {"ray", "tensorboard"} <= {tiers.split_requirement(r)[0] for r in tiers.extra("options")}


def test_locks_name_no_address_and_no_machine_dependent_package() -> None:
    text = "".join(file.read_text() for file in (REPOSITORY / "requirements").iterdir())
    assert not re.search(r"://|^--|^torch==|^nvidia-|^cuda-|^triton==", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("environ", "wheels", "gpu", "kind", "options"),
    [
        ({}, [], False, "cpu", ("--torch-backend=cpu",)),
        ({}, [WHEEL], False, "cpu", ()),
        ({}, [], True, "gpu", ("--torch-backend=auto",)),
        ({}, [WHEEL], True, "gpu", ("--torch-backend=auto",)),
        ({}, [WHEEL.replace("2.13.0", "2.10.0")], False, "cpu", ("--torch-backend=cpu",)),
        ({}, [WHEEL.replace("2.13.0", "2.14.0")], False, "cpu", ("--torch-backend=cpu",)),
        ({}, [WHEEL.replace("cp311", "cp312")], False, "cpu", ("--torch-backend=cpu",)),
        ({}, [WHEEL.replace("x86_64", "aarch64")], False, "cpu", ("--torch-backend=cpu",)),
        ({}, [WHEEL.replace("+cpu", "")], False, "cpu", ("--torch-backend=cpu",)),
        ({"UV_TORCH_BACKEND": "cu130"}, [WHEEL], False, "given", ()),
        ({"PUZZLE_WHEELS": "/wheels"}, [WHEEL], True, "given", ()),
    ],
)
def test_choice_of_torch(tmp_path, monkeypatch, environ, wheels, gpu, kind, options) -> None:
    monkeypatch.setattr(tiers.os, "uname", lambda: type("uname", (), {"machine": "x86_64"}))
    for name in wheels:
        (tmp_path / name).touch()
    folders = ["", "/nowhere", f"file://{tmp_path}"]
    assert tiers.choose_torch(environ, folders, TORCH, (3, 11), gpu) == tiers.TorchBuild(kind, options)


@pytest.mark.parametrize(
    ("program", "answer"),
    [
        ("echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'", True),
        ("echo 'No devices found'", False),
        ("echo 'GPU 0: NVIDIA H100'; exit 9", False),
        (None, False),
    ],
)
def test_gpu_is_what_nvidia_smi_lists(tmp_path, monkeypatch, program, answer) -> None:
    if program:
        write_program(tmp_path / "nvidia-smi", f"#!/bin/sh\n{program}\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tiers.has_gpu() is answer


@pytest.mark.parametrize("ranges", [">=2.11,<2.14", ">=5.0,<6", ">=0.0.100", ""])
@pytest.mark.parametrize(
    "version", ["2.10.9", "2.11.0", "2.13.0+cpu", "2.14.0", "5.23.0", "6.0", "0.0.99", "2.11"]
)
def test_version_ranges_agree_with_packaging(version: str, ranges: str) -> None:
    assert tiers.satisfies(version, ranges) == SpecifierSet(ranges).contains(version)


def test_pip_settings_reach_uv(tmp_path, monkeypatch) -> None:
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nfind-links =\n    /first\n    /second\nindex-url = http://mirror.test/simple\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_INDEX_URL", "http://nearer.test/simple")
    for name in ("PIP_FIND_LINKS", "PIP_CERT"):
        monkeypatch.delenv(name, raising=False)
    found = setup_env.pip_settings(Path(sys.executable))
    assert found["UV_FIND_LINKS"] == "/first,/second"
    assert found["UV_DEFAULT_INDEX"] == "http://nearer.test/simple"


def test_missing_ensurepip_is_said(monkeypatch) -> None:
    monkeypatch.setattr(
        setup_env.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else name
    )
    monkeypatch.setattr(setup_env.os, "geteuid", lambda: 1000)
    with pytest.raises(setup_env.SetupError, match=r"apt-get install python3\.\d+-venv"):
        setup_env.require_venv_module()


def test_check_tells_missing_from_optional_and_other_versions(monkeypatch, capsys) -> None:
    installed = {tiers.split_requirement(r)[0]: "5.9.9" for r in tiers.extra("engine")}
    installed["torch"] = "2.9.1"

    def version(name: str) -> str:
        if name not in installed:
            raise setup_env.importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(setup_env.importlib.metadata, "version", version)
    setup_env.check("engine")
    notices = capsys.readouterr().err.splitlines()
    assert "ray" in notices[0]
    assert "torch 2.9.1 (made for >=2.11,<2.14)" in notices[1]
    del installed["pydantic"]
    with pytest.raises(setup_env.SetupError, match="tier engine: pydantic; "):
        setup_env.check("engine")
    with pytest.raises(
        setup_env.SetupError, match=r"tier dev: accelerate, argcomplete, datasets, .*pydantic, .*ray"
    ):
        setup_env.check("dev")
