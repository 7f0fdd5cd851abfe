"""`puzzle plan calibrate`: constants of the cost model from measured runs."""

from __future__ import annotations

from puzzle.cli import Parser, named, new_file
from puzzle.cli.workloads import Measured, measured_runs
from puzzle.config.memory_report import parse_bytes
from puzzle.errors import UserError
from puzzle.files import durable
from puzzle.plan.predict.calibration import Calibration, read_calibration
from puzzle.plan.predict.fit import Sample, fit


def run(arguments: list[str]) -> int:
    """Fit, write the file, and say what was used."""
    parser = Parser(prog="puzzle plan calibrate", description="Fit the cost model to measured runs.")
    parser.add_argument("--logs", type=named, nargs="+", required=True, help="folders or logs of runs")
    parser.add_argument(
        "--use", nargs="+", required=True, metavar="RUN", help="runs to fit, as figure8/orion/7b_7b_base"
    )
    parser.add_argument(
        "--expect", required=True, metavar="C", help="calibration to start from: a name or a file"
    )
    for name, text in (
        ("device", "what ran"),
        ("engine", "commit or name of the engine"),
        ("host", "the machine"),
    ):
        parser.add_argument(f"--{name}", required=True, help=text)
    parser.add_argument("--device-memory", required=True, metavar="SIZE", help="of a device, such as 80GB")
    parser.add_argument("--out", type=new_file, required=True, metavar="FILE", help="the calibration")
    given = parser.parse_args(arguments)
    memory = parse_bytes(given.device_memory)
    found = {one.run.run_id: one for one in measured_runs(given.logs)}
    if unknown := [name for name in given.use if name not in found]:
        raise UserError(f"--use {unknown[0]}: no such run; there are {', '.join(found)}")
    used = [found[name] for name in given.use]
    rates = fit([_sample(one) for one in used], read_calibration(given.expect).rates)
    taken = max((one.run.started or "")[:10] for one in used)
    parallel = any(one.work.actor.layout.tp > 1 for one in used)
    made = Calibration(
        given.device, memory, given.engine, given.host, taken, tuple(given.use), parallel, rates
    )
    durable.write_text(given.out, made.text())
    print(f"{given.out}: {len(rates.values())} constants from {', '.join(given.use)}")
    return 0


def _sample(one: Measured) -> Sample:
    return Sample(one.work, one.seconds.generation, one.seconds.inference, one.seconds.training)
