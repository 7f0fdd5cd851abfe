"""Predictions of fixed jobs, against the file that says what they were."""

import pytest
import whatif
from predictions import FILE, text

from puzzle.plan.predict.calibration import read_calibration
from puzzle.plan.predict.rates import Rates


def parsed(lines: str) -> dict[str, list[float]]:
    named = (line.rsplit(": ", 1) for line in lines.splitlines())
    return {name: [float(word) for word in words.split()] for name, words in named}


def test_predictions_change_knowingly() -> None:
    """`python scripts/predictions.py` writes the file anew; its diff says what a change does."""
    said, found = parsed(FILE.read_text(encoding="utf-8")), parsed(text())
    assert len(said) == 100
    assert said.keys() == found.keys()
    for name, values in said.items():
        assert found[name] == pytest.approx(values, rel=1e-3), f"{name}: python scripts/predictions.py"


def test_without_an_idea_nothing_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the picture of docs/planner.md shows; without all of them it takes the longest."""
    monkeypatch.setattr(whatif, "DEVICES", (8,))
    found = {name: points[0][1] for name, points in whatif.ideas(read_calibration("h200")).items()}
    assert all(longer >= -0.5 for longer in found.values())
    assert max(found, key=lambda name: found[name]) == "none of these"
    (nvlink,), (pcie,) = whatif.links(read_calibration("h200")).values()
    assert nvlink[1] < pcie[1]


def test_a_change_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    before, whole = parsed(text()), Rates.send
    monkeypatch.setattr(Rates, "send", lambda self, *given, **how: 1.02 * whole(self, *given, **how))
    after = parsed(text())
    moved = [name for name in before if after[name] != pytest.approx(before[name], rel=1e-3)]
    assert len(moved) > 50
