"""Slurm places the agents of a run (`hosts.py`) by srun; outside a job the command submits itself by sbatch.

Everything a cluster wants to know is in one file, slurm.yaml (PUZZLE_SLURM names another).
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from puzzle.config.document import read_yaml
from puzzle.errors import UserError, terminate_as_exit
from puzzle.files import lock
from puzzle.files.path import ROOT
from puzzle.launch.hosts import AgentMonitor, filled

SETTINGS = ROOT / "slurm.yaml"
AGENT = (sys.executable, "-P", "-u", "-m", "puzzle.launch.agent")
JOB = Path(__file__).with_name("job.sh")
LOG = "slurm.log"
END_SECONDS = 15.0


class Settings(BaseModel):
    """slurm.yaml; None leaves it to Slurm. `gres` says how many devices a node has, `preamble` holds shell
    lines that a job runs first; the others are options of sbatch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    gres: str | None = None
    constraint: str | None = None
    nodelist: str | None = None
    reservation: str | None = None
    preamble: str | None = None

    @property
    def devices(self) -> int:
        """GPUs of a node; 0 without `gres`."""
        if self.gres is None:
            return 0
        found = re.fullmatch(r"gpu:(?:[\w.-]+:)?([1-9][0-9]{0,3})", self.gres)
        if found is None:
            raise UserError(f"{file()}: gres {self.gres}: expected as gpu:8")
        return int(found[1])

    def options(self, world: int) -> list[str]:
        """sbatch's options for a job of `world` processes: whole nodes of devices, or a core for each."""
        named = [f"--{name}={value}" for name, value in self if value is not None and name != "preamble"]
        if not self.devices:
            return [*named, f"--ntasks={world}"]
        return [*named, f"--nodes={self.nodes(world)}", "--exclusive", "--mem=0"]

    def nodes(self, world: int) -> int:
        """How many nodes hold `world` processes, a device each; for nodes with devices."""
        return -(-world // self.devices)

    def asked(self, world: int) -> str:
        """Nodes and limit of a job of `world` processes, in words."""
        limit = f"limit {self.time}" if self.time is not None else "Slurm's own time limit"
        if not self.devices:
            return f"{world} cores, {limit}"
        nodes = self.nodes(world)
        return f"{nodes} node{'s' * (nodes > 1)} of {self.devices} GPUs, {limit}"


@dataclass(frozen=True)
class Node:
    """A node of this job: `room` for so many processes."""

    name: str
    address: str
    room: int


def settings() -> Settings:
    """slurm.yaml; raises UserError naming the key."""
    if not file().is_file():
        raise UserError(f"{file()}: no such file; a checkout has slurm.yaml, and PUZZLE_SLURM names another")
    try:
        return Settings.model_validate(read_yaml(file()).data)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        hint = "; put it in quotes" if problem["type"] == "string_type" else ""
        raise UserError(f"{file()}: {key}: {problem['msg'].lower()}{hint}") from None


def inside() -> bool:
    """Whether this process belongs to a Slurm job."""
    return bool(os.environ.get("SLURM_JOB_ID"))


def is_here() -> bool:
    """Whether jobs can be submitted from this host."""
    return shutil.which("sbatch") is not None


def require() -> None:
    """Raise UserError where no job can be submitted."""
    if not is_here():
        raise UserError(
            "--launcher slurm: there is no sbatch here; run this on a login node of the cluster, or use"
            " --launcher local or ray"
        )


def run(target: str, args: Sequence[Any], world: int, logs: Path | None, device: str) -> None:
    """Run `target(*args)` as `world` processes of this job, as local.run does; `args` are JSON values."""
    nodes = job_nodes(device)
    counts = filled(world, [node.room for node in nodes])
    nodes = nodes[: len(counts)]
    monitor = AgentMonitor([node.name for node in nodes], counts, [node.address for node in nodes])
    order = monitor.order(target, args, logs)
    with terminate_as_exit():
        # A session of its own: a Ctrl-C is for this process, which ends srun.
        step = subprocess.Popen(
            srun(nodes, "--kill-on-bad-exit=1", *AGENT), stdin=subprocess.PIPE, start_new_session=True
        )
        assert step.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                step.stdin.write(order.text().encode())
                step.stdin.flush()
            monitor.until(lambda seconds: _ended(step, seconds))
        finally:
            end_step(step)
    code = step.returncode
    if code > 0:  # srun itself lives: it has ended the other agents, and they had the time to say so
        monitor.find_mute()
    monitor.settle(
        code if code >= 0 else 128 - code, f"srun ended with code {code}; its output tells why", logs
    )


def srun(nodes: Sequence[Node], *words: str) -> list[str]:
    """The command that runs `words` once on each of this job's `nodes`, with all that the job has there."""
    names = ",".join(node.name for node in nodes)
    tasks = [f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1", f"--nodelist={names}"]
    return ["srun", *tasks, "--overlap", "--export=ALL", *words]


def end_step(step: subprocess.Popen) -> None:
    """End what srun started and srun, if they live."""
    if step.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            step.stdin.close()
    if step.poll() is None:
        step.send_signal(signal.SIGTERM)
        if not _ended(step, END_SECONDS):
            step.kill()
            step.wait()


def _ended(step: subprocess.Popen, seconds: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        step.wait(seconds)
    return step.returncode is not None


def job_nodes(device: str) -> list[Node]:
    """The nodes of this job in Slurm's order, with their devices: GPUs, or cores for `device` cpu.

    Raises UserError for variables that are left of another job, or set by hand.
    """
    names = _answer("scontrol", "show", "hostnames", _variable("SLURM_JOB_NODELIST")).split()
    cores = [
        int(cores)
        for cores, _, times in re.findall(r"(\d{1,9})(\(x(\d{1,9})\))?", _variable("SLURM_JOB_CPUS_PER_NODE"))
        for _ in range(min(int(times or 1), len(names) + 1))
    ]
    gpus = gpus_here()
    if device == "cuda" and not gpus:
        raise UserError(f"job {os.environ['SLURM_JOB_ID']} has no GPUs; say gres in {file()}")
    rooms = cores if device == "cpu" or not gpus else [gpus] * len(names)
    if len(rooms) != len(names):
        raise _odd("SLURM_JOB_CPUS_PER_NODE", f"does not fit the {len(names)} nodes of SLURM_JOB_NODELIST")
    found = _answer("scontrol", "show", "node", "--oneliner", ",".join(names))
    addresses = dict(re.findall(r"^NodeName=(\S+) .*? NodeAddr=(\S+)", found, re.MULTILINE))
    if absent := [name for name in names if name not in addresses]:
        raise UserError(f"scontrol show node: tells no address of {', '.join(absent)}")
    return [Node(name, addresses[name], room) for name, room in zip(names, rooms, strict=True)]


def gpus_here() -> int:
    """GPUs that the job has on this node."""
    text = os.environ.get("SLURM_GPUS_ON_NODE") or "0"
    if not re.fullmatch("[0-9]{1,9}", text):
        raise _odd("SLURM_GPUS_ON_NODE", "is no number")
    return int(text)


def _variable(name: str) -> str:
    """What Slurm says to every job under `name`."""
    if not os.environ.get(name):
        raise _odd(name, "is not set")
    return os.environ[name]


def _odd(name: str, what: str) -> UserError:
    return UserError(f"SLURM_JOB_ID is set but {name} {what}: unset SLURM_JOB_ID where this is no Slurm job")


def submission(words: Sequence[str], world: int, out: Path) -> list[str]:
    """The command that submits the command `words` as a job with room for `world` processes."""
    how = ["--parsable", "--wait", "--open-mode=append", "--export=ALL"]
    where = [f"--job-name={out.name}", f"--output={(out / LOG).resolve()}"]
    return ["sbatch", *how, *where, *settings().options(world), str(JOB), *words]


def ahead(words: Sequence[str], world: int, out: Path) -> list[str]:
    """Lines that say what `submit` would ask for, and how."""
    asked = f"job: {settings().asked(world)}, as {file().name} says; submitted by"
    return [asked, f"  {shlex.join(submission(words, world, out))}"]


def submit(words: Sequence[str], world: int, out: Path) -> int:
    """Run the command `words` as a job with room for `world` processes; its output and exit code are ours.

    Ctrl-C and SIGTERM end the job, and no other.
    """
    require()
    command = submission(words, world, out)
    made = not out.exists()
    log = out / LOG
    with lock.hold(out, lock.SUBMISSION), terminate_as_exit():
        log.write_bytes(b"")
        submitted = subprocess.Popen(
            command,
            env={**os.environ, "PUZZLE_PREAMBLE": settings().preamble or ""},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert submitted.stdout is not None
        job = submitted.stdout.readline().strip().partition(";")[0]
        try:
            if job:
                print(f"Slurm job {job}; its output, also in {log}:", flush=True)
            with log.open("rb") as output:
                over = False
                while not over:
                    over = _ended(submitted, 0.5)
                    sys.stdout.buffer.write(output.read())
                    sys.stdout.buffer.flush()
        finally:
            if job and submitted.poll() is None:
                _cancel(job)
            end_step(submitted)
    if not job:
        if made:
            shutil.rmtree(out)
        raise UserError(
            f"sbatch refused the job (its words are above); the command was: {shlex.join(command)}"
        )
    return submitted.returncode


def _cancel(job: str) -> None:
    """Cancel the job that this process submitted, and wait until Slurm has ended its processes."""
    subprocess.run(["scancel", job], check=False)
    deadline = time.monotonic() + 2 * END_SECONDS
    asking = ["squeue", "--noheader", f"--jobs={job}"]  # an error once the job is forgotten
    while time.monotonic() < deadline and subprocess.run(asking, capture_output=True, check=False).stdout:
        time.sleep(0.5)


def _answer(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except FileNotFoundError:
        raise UserError(
            f"--launcher slurm: there is no {words[0]} here; use --launcher local or ray"
        ) from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"{shlex.join(words)}: {error.stderr.strip().splitlines()[-1:]}") from None


def file() -> Path:
    """Where the settings are."""
    return Path(os.environ.get("PUZZLE_SLURM", SETTINGS))
