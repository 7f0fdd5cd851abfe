"""Calibration files: what was found out about a machine and an engine, and where it comes from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from puzzle.errors import UserError
from puzzle.files import jsonio
from puzzle.files.jsonio import Fields
from puzzle.plan.predict.rates import NAMES, Rates

SCHEMA = 1
PROFILES = Path(__file__).parent / "profiles"
SMALLEST, LARGEST = 1e-9, 1e18
"""Of a constant; others belong to no machine."""


@dataclass(frozen=True)
class Calibration:
    """Constants with their origin. `engine` is the commit or the name of the engine that ran: calibrations
    age with it. `runs` are those that the constants were fitted on, `tensor_parallel` whether one was.
    `memory_bytes`: of a device."""

    device: str
    memory_bytes: int
    engine: str
    host: str
    taken: str
    runs: tuple[str, ...]
    tensor_parallel: bool
    rates: Rates

    def text(self) -> str:
        """The file."""
        values = {
            "schema": SCHEMA,
            "device": self.device,
            "memory_bytes": self.memory_bytes,
            "engine": self.engine,
            "host": self.host,
            "taken": self.taken,
            "runs": list(self.runs),
            "tensor_parallel": self.tensor_parallel,
            "rates": {name: float(f"{value:.4g}") for name, value in self.rates.values().items()},
        }
        return json.dumps(values, indent=2) + "\n"


def profiles() -> list[str]:
    """Names of the calibrations that come with the project."""
    return sorted(path.stem for path in PROFILES.glob("*.json"))


def read_calibration(name: str) -> Calibration:
    """A calibration that comes with the project, by name, or a file. UserError for what is none."""
    shipped = name in profiles()
    path = PROFILES / f"{name}.json" if shipped else Path(name)
    if not shipped and not path.exists():
        raise UserError(
            f"--calibration {name}: no such file, and no profile; there are {', '.join(profiles())}"
        )
    fields = Fields(jsonio.read_object(path), str(path))
    schema = fields.integer("schema", least=1)
    if schema != SCHEMA:
        raise UserError(
            f"{path}: schema is {schema}, this version reads {SCHEMA}; take the calibration again"
        )
    rates = fields.section("rates")
    if unknown := [key for key in rates if key not in NAMES]:
        raise UserError(f"{rates.place}: {unknown[0]} is no constant; there are {', '.join(NAMES)}")
    found = {name: rates.number(name, least=SMALLEST, most=LARGEST) for name in NAMES}
    return Calibration(
        fields.text("device"),
        fields.integer("memory_bytes", least=1),
        fields.text("engine"),
        fields.text("host"),
        fields.text("taken"),
        tuple(fields.texts("runs") or ()),
        fields.flag("tensor_parallel"),
        Rates(**found),
    )
