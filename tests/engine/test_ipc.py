"""Tensors of another process: read as they are, written while they are read, and gone with it."""

from __future__ import annotations

import ctypes
import multiprocessing
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from puzzle.engine.reshard import ipc

CPU = torch.device("cpu")


def offering(pipe: Connection) -> None:
    """Offers three tensors, two of one storage; then changes one where it lies, when it is told to."""
    whole = torch.arange(12, dtype=torch.float32)
    tensors = {"whole": whole.view(3, 4), "end": whole[8:].view(2, 2), "none": torch.empty(0, 5)}
    pipe.send(ipc.offer(tensors, CPU))
    pipe.recv()
    tensors["whole"][2, 0] = -1.0
    pipe.send(tensors["end"].tolist())
    pipe.recv()


def test_another_process_reads_what_is_written_as_long_as_it_likes() -> None:
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("forkserver").Process(target=offering, args=(theirs,))
    child.start()
    try:
        offered = ours.recv()
        assert ipc.unreachable(offered, CPU) is None
        other = ipc.unreachable(offered._replace(device="pid:[1]"), CPU)
        assert other == "its processes are numbered in another namespace (a container of its own)"
        found = ipc.opened(offered, CPU)
        assert found["whole"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
        assert found["none"].shape == (0, 5)
        ours.send(None)
        assert ours.recv() == [[-1, 9], [10, 11]]
        assert found["end"].tolist() == [[-1, 9], [10, 11]]
        assert found["end"].untyped_storage().data_ptr() == found["whole"].untyped_storage().data_ptr()
    finally:
        ours.send(None)
        child.join()
    with pytest.raises(RuntimeError, match=rf"/proc/{child.pid}/fd/\d+: No such file"):
        ipc.opened(offered, CPU)
    assert found["whole"].tolist()[1] == [4, 5, 6, 7], "what is opened stays"


@pytest.mark.parametrize(
    ("code", "value", "said"),
    [
        (0, 1, None),
        (0, 0, "the link between the devices has no atomic operations"),
        (101, 1, "the link between the devices has no atomic operations"),
    ],
)
def test_counting_on_another_device_needs_a_link_with_atomics(
    code: int, value: int, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver is asked for this device and that one, by their numbers here; readers do not ask."""
    asked = []

    def attribute(found: Any, *what: int) -> int:
        asked.append(what)
        found._obj.value = value
        return code

    monkeypatch.setattr(ipc, "_place", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: True)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(cuDeviceGetP2PAttribute=attribute))
    offered, device = ipc.Offer(ipc._host(), "GPU 2", (), {}), torch.device("cuda", 1)
    found = ipc.unreachable(offered, device, counts=True)
    assert found == said
    assert asked == [(3, 1, 2)]
    assert ipc.unreachable(offered, device) is None
    assert ipc.unreachable(offered._replace(device="GPU 1"), device, counts=True) is None
    assert len(asked) == 1
