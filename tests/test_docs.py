"""The pages: their Python examples run, their links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "logs").glob("*.md")])
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
FENCES = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path) -> list[str]:
    """Relative links of a page that lead to no file, or to no heading of one."""
    dead = []
    for link in LINK.findall(FENCED.sub("", page.read_text("utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[a](gone.md) [b](page.md#a-heading) [c](#gone) [d](https://x.org/y)\n")
    assert dead_links(page) == ["gone.md", "#gone"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_pages_name_are_there(page: Path) -> None:
    """Paths of the repository in backticks, without placeholders."""
    named = re.findall(
        r"`((?:puzzle|plotting|tests|scripts|docs|examples)/[\w./-]+)`", page.read_text("utf-8")
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_examples_in_python_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Block after block in one namespace, and what the page shows of their output is what they print."""
    page = ROOT / "docs" / "python.md"
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks(page, "python"), 1):
        exec(compile(block, f"{page.name}, example {number}", "exec"), names)
    assert names["schedule"].num_stages == 3
    assert len(names["run"].iterations) == 2
    printed = capsys.readouterr().out
    rewards = names["run"].iterations["reward"]
    assert all(f"iteration {index}: reward {value:.3f}\n" in printed for index, value in rewards.items())
    for shown in blocks(page, "text"):
        assert shown in printed


def test_examples_of_rewards_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Functions in files and of Python, two of them in one run; the page's output is theirs."""
    page = ROOT / "docs" / "rewards.md"
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks(page, "python"), 1):
        exec(compile(block, f"{page.name}, example {number}", "exec"), names)
    printed = capsys.readouterr().out
    for shown in blocks(page, "text"):
        assert shown in printed
    for run in ("given", "several"):
        rows = [
            json.loads(line) for line in (tmp_path / f"runs/{run}/samples.jsonl").read_text().splitlines()
        ]
        assert len(rows) == 2 * 4


def test_the_guide_s_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Page after page and block after block in one folder, as a reader would; those of `bash` are for other
    machines."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(ROOT / "scripts/bin"), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("first-run", "your-task", "after"):
        page = ROOT / f"docs/guide/{name}.md"
        names: dict[str, Any] = {}
        for language, block in FENCES.findall(page.read_text("utf-8")):
            if language == "sh":
                done = subprocess.run(["bash", "-ec", block], capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr
            elif language == "python":
                exec(compile(block, page.name, "exec"), names)
        printed = capsys.readouterr().out
        for shown in blocks(page, "text"):
            assert shown in printed
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) > 10
    log = (tmp_path / "runs/first/run.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in log if '"record":"iteration"' in line] == [0, 1, 2]
    assert (tmp_path / "runs/first/report.html").exists()


def test_the_example_of_an_algorithm_runs() -> None:
    """The best of each group alone, at its own tokens alone."""
    import torch

    from puzzle.config.algorithm import AlgorithmConfig
    from puzzle.rlhf.experience import Experience

    names: dict[str, Any] = {}
    for block in blocks(ROOT / "docs" / "architecture.md", "python"):
        exec(compile(block, "architecture.md", "exec"), names)
    experience = Experience(((1,), (2,)), (0, 1), ((3, 4), (5,), (6,), (7, 8)), samples=2)
    algorithm = names["BestOfGroup"](AlgorithmConfig())
    found = algorithm.advantages(experience, torch.tensor([1.0, 4.0, 2.0, 2.5]), 0.0)
    assert found.advantages_BS.tolist() == [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
