"""What the launcher's side of a run on several hosts makes of what agents tell, or do not."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from puzzle.launch.deaths import Death
from puzzle.launch.hosts import OVER, AgentMonitor
from puzzle.launch.local import WorkerError

FOLLOWS = Death(0, "error", "RuntimeError: Connection closed by peer", 1, time.time())


@pytest.mark.parametrize(
    ("beats", "line", "code"),
    [
        ((OVER, "7", OVER), "rank 2 on b: its agent was killed; its log: ranks/rank-002.txt", 137),
        # Ended before it began, because another had ended: not the cause.
        ((OVER, None, OVER), "rank 0 on a: RuntimeError: Connection closed by peer", 1),
        # Who ends all agents is not among them.
        (("3", "7", "5"), "rank 0 on a: RuntimeError: Connection closed by peer", 1),
    ],
)
def test_an_agent_that_ended_without_a_word_is_the_cause(
    beats: tuple[str | None, ...], line: str, code: int
) -> None:
    monitor = AgentMonitor("abc", (2, 2, 2), ["127.0.0.1"] * 3)
    order = monitor.order("module:function", [], None)
    store = TCPStore(order.address, order.port, is_master=False)
    store.set("death/0", json.dumps(asdict(FOLLOWS)))
    for index, beat in enumerate(beats):
        if beat is not None:
            store.set(f"beat/{index}", beat)
    monitor.find_mute()
    with pytest.raises(WorkerError) as raised:
        monitor.settle(143, "it was ended", Path("ranks"))
    assert str(raised.value) == line
    assert raised.value.code == code


def test_without_deaths_all_hosts_are_named() -> None:
    monitor = AgentMonitor("ab", (1, 1), ["127.0.0.1"] * 2)
    monitor.find_mute()
    monitor.settle(0, "", None)
    with pytest.raises(WorkerError, match=r"^the run on a, b ended: srun ended with code 1$") as raised:
        monitor.settle(1, "srun ended with code 1", None)
    assert raised.value.code == 1
