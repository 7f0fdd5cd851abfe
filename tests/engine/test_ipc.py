"""Tensors of another process: read as they are, written while they are read, and gone with it."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

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
