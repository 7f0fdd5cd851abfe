"""Calibration files: what was found out about a machine and an engine, and where it comes from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from puzzle.errors import UserError
from puzzle.files import jsonio
from puzzle.files.jsonio import Fields
from puzzle.plan.predict.costs import Fixed, Nodes
from puzzle.plan.predict.rates import NAMES, Rates
from puzzle.plan.predict.tables import (
    CollectiveRow,
    DecodeRow,
    HeadRow,
    LayerRow,
    MessageRow,
    Shape,
    StepRow,
    Tables,
)

SCHEMA, TABLES = 1, 2
"""Of files with constants and with tables."""
PROFILES = Path(__file__).parent / "profiles"
SMALLEST, LARGEST = 1e-18, 1e18
"""Of a constant or of seconds; others belong to no machine."""
MOST_COUNT = 1 << 40
"""Of a size in a table."""
ROWS: dict[str, type] = {
    "layers": LayerRow,
    "heads": HeadRow,
    "decodes": DecodeRow,
    "collectives": CollectiveRow,
    "messages": MessageRow,
    "steps": StepRow,
}
SHAPE = tuple(one.name for one in fields(Shape))
Made = TypeVar("Made")


@dataclass(frozen=True)
class Calibration:
    """A cost model with its origin. `engine` is the commit or the name of the engine that ran: calibrations
    age with it. `runs` are those that constants were fitted on, `tensor_parallel` whether one was, or whether
    tables have such rows. `memory_bytes`: of a device. `spread`: how far off constants may be that come from
    a data sheet (0: they do not), `sources` where those are from."""

    device: str
    memory_bytes: int
    engine: str
    host: str
    taken: str
    runs: tuple[str, ...]
    tensor_parallel: bool
    costs: Rates | Tables
    versions: Mapping[str, str] | None = None
    spread: float = 0.0
    sources: tuple[str, ...] = ()

    @property
    def rates(self) -> Rates:
        """Its constants; UserError if it holds tables."""
        if isinstance(self.costs, Tables):
            raise UserError(f"a calibration of {self.device} holds tables; give one of constants")
        return self.costs

    def text(self) -> str:
        """The file."""
        costs = self.costs
        values: dict[str, Any] = {
            "schema": SCHEMA if isinstance(costs, Rates) else TABLES,
            "device": self.device,
            "memory_bytes": self.memory_bytes,
            "engine": self.engine,
            "host": self.host,
            "taken": self.taken,
            "runs": list(self.runs),
            "tensor_parallel": self.tensor_parallel,
        }
        if self.versions:
            values["versions"] = dict(self.versions)
        if self.spread:
            values |= {"spread": self.spread, "sources": list(self.sources)}
        if costs.nodes is not None:
            values["nodes"] = asdict(costs.nodes)
        if costs.fixed != Fixed():
            values["fixed"] = asdict(costs.fixed)
        if isinstance(costs, Rates):
            if costs.this_engine:
                values["this_engine"] = True
            values["rates"] = {name: _short(value) for name, value in costs.values().items()}
        else:
            values["tables"] = {
                "item": costs.item,
                "step_s_per_parameter": _short(costs.step_s_per_parameter),
                "pass_host": _short(costs.pass_host),
                **{name: [_flat(row) for row in getattr(costs, name)] for name in ROWS},
            }
        return json.dumps(values, indent=1) + "\n"


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
    expected = TABLES if "tables" in fields else SCHEMA
    if schema != expected:
        raise UserError(
            f"{path}: schema is {schema}, this version reads {expected}; take the calibration again"
        )
    versions = fields.optional_section("versions")
    said = None if versions is None else {key: versions.text(key) for key in versions}
    spread = fields.number("spread", 0.0, least=0.0, most=1.0)
    costs = _costs(fields)
    return Calibration(
        fields.text("device"),
        fields.integer("memory_bytes", least=1),
        fields.text("engine"),
        fields.text("host"),
        fields.text("taken"),
        tuple(fields.texts("runs") or ()),
        fields.flag("tensor_parallel"),
        costs,
        said,
        spread,
        tuple(fields.texts("sources", []) or ()),
    )


def _costs(fields: Fields) -> Rates | Tables:
    within, beside = fields.optional_section("nodes"), fields.optional_section("fixed")
    nodes = None if within is None else _nodes(within)
    fixed = Fixed() if beside is None else _fixed(beside)
    if "tables" in fields:
        return replace(_tables(fields.section("tables")), nodes=nodes, fixed=fixed)
    rates = fields.section("rates")
    if unknown := [key for key in rates if key not in NAMES]:
        raise UserError(f"{rates.place}: {unknown[0]} is no constant; there are {', '.join(NAMES)}")
    found = {name: rates.number(name, least=SMALLEST, most=LARGEST) for name in NAMES}
    return replace(Rates.of(found), nodes=nodes, fixed=fixed, this_engine=fields.flag("this_engine", False))


def _nodes(found: Fields) -> Nodes:
    devices = found.integer("devices", least=1, most=MOST_COUNT)
    bus, message, small = (
        found.number(key, least=SMALLEST, most=LARGEST) for key in ("bus", "message", "small")
    )
    return Nodes(devices, bus, message, small)


def _fixed(found: Fields) -> Fixed:
    return Fixed(*(found.number(one.name, 0.0, least=0.0, most=LARGEST) for one in fields(Fixed)))


def _tables(found: Fields) -> Tables:
    rows = {name: _rows(found, name, kind) for name, kind in ROWS.items() if name != "steps" or name in found}
    if not rows["layers"] or not rows["heads"] or not rows["decodes"]:
        raise UserError(
            f"{found.place}: layers, heads and decodes must have rows; take the calibration again"
        )
    return Tables(
        item=found.integer("item", least=1, most=8),
        step_s_per_parameter=found.number("step_s_per_parameter", least=0.0, most=LARGEST),
        pass_host=found.number("pass_host", least=0.0, most=LARGEST),
        **rows,  # ty: ignore[invalid-argument-type] - each is of its kind
    )


def _rows(found: Fields, name: str, kind: Callable[..., Made]) -> tuple[Made, ...]:
    return tuple(_row(one, kind) for one in found.objects(name))


def _row(one: Fields, kind: Callable[..., Made]) -> Made:
    """A row of a table: by its fields' types, seconds positive."""
    values: dict[str, Any] = {}
    for given in fields(kind):  # ty: ignore[invalid-argument-type] - kinds are the dataclasses of ROWS
        name = given.name
        if given.type == "Shape":
            values[name] = Shape(*(one.integer(key, least=1, most=MOST_COUNT) for key in SHAPE))
        elif given.type == "int":
            values[name] = one.integer(name, least=1, most=MOST_COUNT)
        elif given.type == "float":
            values[name] = one.number(name, least=SMALLEST, most=LARGEST)
        elif given.type == "bool":
            values[name] = one.flag(name)
        else:
            values[name] = one.text(name)
    return kind(**values)


def _flat(row: Any) -> dict[str, Any]:
    """A row with its shape's widths beside its own fields."""
    values = asdict(row)
    flat = {**values.pop("shape", {}), **values}
    return {key: _short(value) if isinstance(value, float) else value for key, value in flat.items()}


def _short(value: float) -> float:
    return float(f"{value:.4g}")
