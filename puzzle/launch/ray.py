"""Ray places the agents of a run (`hosts.py`), by an actor per host in a placement group. No tensors in Ray.

The cluster is the one that RAY_ADDRESS names (`ray job submit` sets it), else one of our own: over the nodes
of this Slurm job, or on this host alone. Our own asks for a token, which its processes' environment holds.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from puzzle.errors import UserError, leave, terminate_as_exit
from puzzle.launch import slurm
from puzzle.launch.hosts import STOPPED, AgentMonitor, filled
from puzzle.launch.local import WorkerError
from puzzle.launch.network import LOOPBACK, address_towards

STORE_BYTES = 100_000_000  # for objects, of which there are hardly any
POLL_SECONDS = 0.05
PLACE_SECONDS = 60.0
NODE_SECONDS = 60.0
CONTROL_SECONDS = 10.0  # without an answer of Ray's control process
RAY_SECONDS = 45  # after which Ray itself ends processes that miss it: later than we have ended them
MARK = "RAY_OF_PUZZLE"  # in the environment of all that belongs to a Ray of our own: its folder
# What a worker is given of this process's environment, besides what Ray gives it.
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
PASSED = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "PUZZLE_", "HF_", "NCCL_", "GLOO_", "TORCH", "PYTORCH_")


class ControlLost(WorkerError):
    """Ray's control process (GCS) is gone: whatever asks it would wait."""


class Agent:
    """The actor: it starts its host's agent, hands on its output, and takes it along when it dies."""

    def run(self, order: str, index: int, folder: str, values: dict[str, str]) -> Generator[bytes | int]:
        """Yields the output of the agent as it comes, and its exit code at the end."""
        agent = subprocess.Popen(
            [sys.executable, "-P", "-u", "-m", "puzzle.launch.agent", str(index)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, **values},
        )
        assert agent.stdin is not None
        assert agent.stdout is not None
        agent.stdin.write(order.encode())
        agent.stdin.flush()
        while some := os.read(agent.stdout.fileno(), 1 << 16):
            yield some
        code = agent.wait()
        yield code if code >= 0 else 128 - code


def run(target: str, args: Sequence[Any], world: int, logs: Path | None, device: str) -> None:
    """Run `target(*args)` as `world` processes of a Ray cluster, as local.run does. `args`: JSON values."""
    with terminate_as_exit(), cluster(world, device), _placed(world, device) as (counts, group):
        import ray
        from ray.util import placement_group_table

        placed = placement_group_table(group)["bundles_to_node_id"]
        nodes = {node["NodeID"]: node for node in ray.nodes()}
        chosen = [nodes[placed[index]] for index in range(len(counts))]
        addresses = [node["NodeManagerAddress"] for node in chosen]
        monitor = AgentMonitor([node["NodeManagerHostname"] for node in chosen], counts, addresses)
        order = monitor.order(target, args, logs).text()
        ends = _Agents(monitor, group, counts, order)
        try:
            monitor.until(ends.ended)
        except BaseException:
            monitor.end(STOPPED)
            raise
        finally:
            ends.wait()
        monitor.find_mute()
        monitor.settle(ends.code, f"an agent ended with code {ends.code}; its output tells why", logs)


class _Agents:
    """The actors of a run and what comes of them."""

    def __init__(self, monitor: AgentMonitor, group: Any, counts: Sequence[int], order: str) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._monitor = monitor
        self._control, self._answered = ray.get_runtime_context().gcs_address, time.monotonic()
        self.code = 0
        values = {name: value for name, value in os.environ.items() if name.startswith(PASSED)}
        self._actors: list[Any] = []  # of which nobody had a handle, Ray would end them
        self._streams: dict[Any, int] = {}
        for index, count in enumerate(counts):
            kind = next(kind for kind in ("GPU", "CPU") if kind in group.bundle_specs[index])
            what = {"num_gpus": count, "num_cpus": 0} if kind == "GPU" else {"num_cpus": count}
            where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            actor: Any = ray.remote(Agent).options(scheduling_strategy=where, max_restarts=0, **what).remote()
            self._actors.append(actor)
            self._streams[actor.run.remote(order, index, os.getcwd(), values)] = index

    def ended(self, seconds: float) -> bool:
        """Wait at most so long for something to come of the agents; whether all have ended.

        Raises ControlLost.
        """
        try:
            _connect(self._control)
            self._answered = time.monotonic()
        except OSError as error:
            if time.monotonic() - self._answered > CONTROL_SECONDS:
                raise ControlLost(f"Ray's control process (GCS) at {self._control}: {error}", 1) from None
        return self._read(seconds)

    def _read(self, seconds: float) -> bool:
        import ray
        from ray.exceptions import RayError

        if not self._streams:
            return True
        deadline = time.monotonic() + seconds
        found: Any = ([], [])
        while not found[0] and time.monotonic() < deadline:
            # Signals arrive while Python sleeps: Ray's own waiting swallows what their handlers raise.
            time.sleep(POLL_SECONDS)
            found = ray.wait(list(self._streams), num_returns=1, timeout=0)
        ready: list[Any] = found[0]
        for stream in ready:
            try:
                some: Any = ray.get(next(stream))
            except StopIteration:
                del self._streams[stream]
                continue
            except RayError as error:
                index = self._streams.pop(stream)
                self._monitor.lose(index, f"its Ray actor is gone: {type(error).__name__}")
                continue
            if isinstance(some, int):
                self.code = self.code or some
            else:
                sys.stdout.buffer.write(some)
                sys.stdout.buffer.flush()
        return not self._streams

    def wait(self) -> None:
        """Until all that the actors started, and was told to end, has ended, but not for ever: actors that
        are left end with the placement group."""
        deadline = time.monotonic() + slurm.END_SECONDS
        while not self._read(0.5) and time.monotonic() < deadline:
            pass


def _connect(address: str) -> None:
    """Raises OSError if nobody listens at host:port."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=2).close()


@contextlib.contextmanager
def _placed(world: int, device: str) -> Generator[tuple[list[int], Any]]:
    """Processes per host, hosts filled in order, and the placement group that holds their devices."""
    import ray
    from ray._private.state import available_resources_per_node
    from ray.util import placement_group, remove_placement_group

    there = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    gpus = any("GPU" in resources for resources in there.values())
    kind = "GPU" if device == "cuda" or (device == "auto" and gpus) else "CPU"
    filled(world, [int(resources.get(kind, 0)) for resources in there.values()])
    rooms: list[int] = []
    deadline = time.monotonic() + PLACE_SECONDS
    while sum(rooms) < world and time.monotonic() < deadline:
        free = available_resources_per_node()  # less than there is, while another run ends
        rooms = sorted((int(free.get(node, {}).get(kind, 0)) for node in there), reverse=True)
        time.sleep(0.2)
    counts = filled(world, [room for room in rooms if room])
    bundles = [{kind: float(count)} for count in counts]
    group = placement_group(bundles, strategy="STRICT_SPREAD" if len(counts) > 1 else "STRICT_PACK")
    try:
        if not group.wait(PLACE_SECONDS):
            raise UserError(
                f"Ray did not free {world} {kind}s in {PLACE_SECONDS:g} s; is the cluster in use?"
            )
        yield counts, group
    except ControlLost:
        raise
    except BaseException:
        remove_placement_group(group)
        raise
    remove_placement_group(group)


@contextlib.contextmanager
def _joined(address: str) -> Generator[None]:
    """Connected to a cluster that was there before and stays."""
    import ray

    try:
        if ":" in address and "://" not in address:
            _connect(address)  # Ray itself would try for minutes
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS {address}: no Ray there ({error}); start it, or unset RAY_ADDRESS to have one"
        ) from None
    ray.init(**QUIET)
    signal.signal(signal.SIGTERM, leave)  # instead of Ray's handler, which aborts
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def cluster(world: int, device: str) -> Generator[None]:
    """Connected to the cluster of RAY_ADDRESS, or to one of our own that lives as long as the block."""
    if lent := os.environ.get("RAY_ADDRESS"):
        with _joined(lent):
            yield
        return
    nodes = slurm.job_nodes(device) if slurm.inside() else []
    address = address_towards([node.address for node in nodes])
    joining = nodes if len(nodes) > 1 or address != LOOPBACK else []
    folder = tempfile.mkdtemp(prefix="ray-")
    values = {
        "RAY_AUTH_MODE": "token",
        # A process reads its token once: a second cluster of this one has the first one's.
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(RAY_SECONDS),
        "RAY_enable_metrics_collection": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_worker_prestart": "0",
        MARK: folder,
    }
    if not joining:
        # Else Ray takes another address of this host for 127.0.0.1, and listens on all. No node can join it.
        values["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.update(values)
    import ray

    started: list[subprocess.Popen] = []
    room: dict[str, Any] = {"num_cpus": world} if device == "cpu" else {}
    if joining:
        room = {"num_cpus": 0, "num_gpus": 0}
    try:
        ray.init(
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            _node_ip_address=address,
            _temp_dir=folder,
            **room,
            **QUIET,
        )
        signal.signal(signal.SIGTERM, leave)
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        for node in joining:  # one after another: together, some are lost
            _join(node, device, started)
        yield
    finally:
        for step in started:
            slurm.end_step(step)
        ray.shutdown()
        _end_left(folder)
        for name in ("RAY_ADDRESS", MARK):
            os.environ.pop(name, None)
        shutil.rmtree(folder, ignore_errors=True)


def _end_left(folder: str) -> None:
    """End what the shutdown left of our Ray: its helpers wait a minute for a control process that is gone."""
    mark = f"{MARK}={folder}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            if mark in (process / "environ").read_bytes().split(b"\0") and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)


def _join(node: slurm.Node, device: str, started: list[subprocess.Popen]) -> None:
    """Start Ray on another node of this Slurm job and wait until it has joined."""
    import ray

    kind = ["--num-gpus=0", f"--num-cpus={node.room}"] if device == "cpu" else []
    ray_start = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block"]
    options = [
        "--disable-usage-stats",
        f"--address={os.environ['RAY_ADDRESS']}",
        f"--node-ip-address={node.address}",
        *kind,
    ]
    options.append(f"--object-store-memory={STORE_BYTES}")
    before = len(ray.nodes())
    command = slurm.srun([node], *ray_start, *options)
    step = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    started.append(step)
    deadline = time.monotonic() + NODE_SECONDS
    while len(ray.nodes()) == before:
        if step.poll() is not None or time.monotonic() > deadline:
            raise UserError(f"Ray did not start on node {node.name} in {NODE_SECONDS:g} s")
        time.sleep(0.2)
