"""Under a Ray that the command starts itself, and under one that is there already."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers import PATIENCE
from tests.launch.running import (
    cleared,
    config,
    console,
    environment,
    listening,
    metrics,
    of_test,
    puzzle,
    wait_for,
)

LOOPBACK = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
TRAIN = ("train", "--config", "run.yaml", "--out", "out")
# Two nodes of two cores each; then a third, and the second dies. Its first output is the address.
NODES = """
import sys
from ray.cluster_utils import Cluster
nodes = Cluster()
first, second = (nodes.add_node(num_cpus=2, object_store_memory=80_000_000) for _ in range(2))
print(nodes.address, flush=True)
sys.stdin.readline()
nodes.add_node(num_cpus=2, object_store_memory=80_000_000)
nodes.remove_node(second, allow_graceful=False)
print("one is gone", flush=True)
sys.stdin.readline()
nodes.shutdown()
"""


@pytest.fixture
def folder(tmp_path: Path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config()))
    with cleared(tmp_path):
        yield tmp_path


def test_runs_of_one_host_listen_on_loopback_and_leave_nothing(folder: Path) -> None:
    local = puzzle(folder, *TRAIN[:-1], "alone")
    wait_for(lambda: (folder / "alone/run.jsonl").exists(), run=local)
    assert LOOPBACK & listening(of_test(folder)) == listening(of_test(folder)) != set()
    assert local.wait(PATIENCE) == 0, console(folder)
    run = puzzle(folder, *TRAIN, "--launcher", "ray")
    wait_for(lambda: (folder / "out/run.jsonl").exists(), run=run)
    assert any("raylet" in line for line in of_test(folder).values())
    assert listening(of_test(folder)) <= LOOPBACK
    assert run.wait(PATIENCE) == 0, console(folder)
    assert "3/3" in console(folder)
    assert metrics(folder / "out") == metrics(folder / "alone")


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_what_ends_the_command_ends_all(folder: Path, number: int, code: int) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump(config(iterations=2000)))
    run = puzzle(folder, *TRAIN, "--launcher", "ray")
    wait_for(lambda: (folder / "out/run.jsonl").exists(), run=run)
    os.kill(run.pid, number)
    assert run.wait(PATIENCE) == code, console(folder)
    wait_for(lambda: not of_test(folder))


@pytest.mark.long
def test_a_lost_node_is_named_and_the_run_goes_on_elsewhere(folder: Path) -> None:
    values = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    of_a_job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": '{"runtime_env": {}, "metadata": {"job_name": "puzzle"}}'}
    nodes = subprocess.Popen(
        [sys.executable, "-c", NODES],
        env=environment(PUZZLE_TEST=str(folder), **values),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert nodes.stdin is not None
    assert nodes.stdout is not None
    try:
        address = nodes.stdout.readline().strip()
        many = config(iterations=150, launch={"max_restarts": 3})
        (folder / "run.yaml").write_text(yaml.safe_dump(many))
        run = puzzle(folder, *TRAIN, "--launcher", "ray", RAY_ADDRESS=address, **values, **of_a_job)
        wait_for(lambda: (folder / "out/checkpoints/state-3").exists(), run=run)
        print(file=nodes.stdin, flush=True)
        assert nodes.stdout.readline() == "one is gone\n"
        assert run.wait(PATIENCE) == 0, console(folder)
        assert len(metrics(folder / "out")) == 150
        records = [json.loads(line) for line in (folder / "out/run.jsonl").read_text().splitlines()]
        assert "resume" in {record["record"] for record in records}
        assert "its Ray actor is gone" in console(folder)
        assert sum("raylet/raylet" in line for line in of_test(folder).values()) == 2  # not ours to end
    finally:
        nodes.communicate("\n", timeout=PATIENCE)


def test_a_cluster_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from puzzle.errors import UserError
    from puzzle.launch.ray import cluster

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"  # nobody listens there
        monkeypatch.setenv("RAY_ADDRESS", address)
        with (
            pytest.raises(UserError, match=f"RAY_ADDRESS {address}: no Ray there .*refused"),
            cluster(1, "cpu"),
        ):
            pass


def test_more_processes_than_devices_are_refused() -> None:
    from puzzle.errors import UserError
    from puzzle.launch.hosts import filled

    assert filled(5, [2, 2, 2]) == [2, 2, 1]
    assert filled(4, [8]) == [4]
    assert filled(4, [2, 2, 2]) == [2, 2]
    with pytest.raises(UserError, match="wants 7 devices and there are 6"):
        filled(7, [2, 2, 2])
