"""Predictions of fixed jobs, against the file that says what they were."""

import pytest
from predictions import FILE, text

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


def test_a_change_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    before, whole = parsed(text()), Rates.send
    monkeypatch.setattr(Rates, "send", lambda self, *given, **how: 1.02 * whole(self, *given, **how))
    after = parsed(text())
    moved = [name for name in before if after[name] != pytest.approx(before[name], rel=1e-3)]
    assert len(moved) > 50
