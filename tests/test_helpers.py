"""The multi-process helper itself: results, errors and hangs."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers import RankError, run_ranks


def total(rank, add):
    x = torch.full((3,), float(rank + add))
    dist.all_reduce(x)
    return x


def fail_on_one(rank):
    if rank == 1:
        raise ValueError("broken here")
    dist.barrier()


def die_on_one(rank):
    if rank == 1:
        os._exit(7)
    dist.barrier()


def hang(rank):
    time.sleep(60)


def test_results_come_back_by_rank():
    for result in run_ranks(total, 3, 10):
        assert result.tolist() == [33.0] * 3


def test_first_error_is_shown_and_ends_all():
    start = time.monotonic()
    with pytest.raises(RankError, match="broken here"):
        run_ranks(fail_on_one, 2)
    assert time.monotonic() - start < 20


def test_a_dead_rank_is_noticed():
    with pytest.raises(RankError):
        run_ranks(die_on_one, 2)


def test_timeout():
    with pytest.raises(RankError, match="did not end in time"):
        run_ranks(hang, 2, timeout=4)
