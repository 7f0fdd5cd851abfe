# ruff: noqa: ANN001, ANN202 (Triton reads the types of a kernel's arguments off its call)
"""A sum over tensor ranks, the residual and the norm behind it: one kernel that reads peers' memory.

Every rank has two buffers, used by turns, and a count for each program; its peers reach both. A row belongs
to the same program in every call and on every rank, so a program meets that program of its peers and no
other. Its call n:

    rank 0  | own part to buffer n % 2 | 1 to all counts | own count = size (n + 1)? | sum of buffers n % 2 |
    rank 1     | own part to buffer n % 2 | 1 to all counts | own count = ...?        | sum of buffers n % 2 |

    count    0 ... size | ... 2 size | ... 3 size    a rank adds for call n + 1 when all have for call n,
    call         0      |     1      |     2         so the count passes size (n + 1) when the last has

What is written before a release is there after the acquire that reads what that added. A buffer is written
again in call n + 2, behind the meeting of call n + 1: all ranks have then begun that call, so their call n,
which alone read the buffer, is over. One meeting a call is enough; with one buffer, a rank could write for
call n + 1 while a slower one reads for call n.

Programs wait for each other, so all of them must have a place on the device: there are at most as many as the
smallest device of the run has multiprocessors. Where another kernel holds some of these, programs that have a
place meet and end all the same, for they begin in their order, and make place for the others. All ranks make
the same calls in the same order, each on one stream: the rank that is behind waits for nobody, so nobody
waits for ever. All that changes from call to call lies on the device, so that CUDA graphs can hold calls.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from puzzle.model.kernels.inference import put_normed, warps


def launch(
    x: Tensor,
    part: Tensor,
    weight: Tensor | None,
    total: Tensor,
    normed: Tensor,
    addresses: Tensor,
    calls: Tensor,
    rank: int,
    rows: int,
    eps: float,
) -> None:
    """total = x + the sum of all ranks' `part`; `normed` its norm, if there is a `weight`; (B, D) each.

    `addresses` int64 (2, size): where the ranks' buffers of 2 x `rows` x D begin, and their counts. `calls`
    int64 (programs,): how often each program was called here.
    """
    count, width = part.shape
    block = triton.next_power_of_2(width)
    size = addresses.shape[1]
    _peer_sum[(min(count, len(calls)),)](
        *(x, part, part if weight is None else weight, total, normed, addresses, calls),
        *(count, len(calls), rows * width, width, eps),
        *(rank, size, triton.next_power_of_2(size), weight is not None, block),
        num_warps=warps(block),
    )


@triton.jit(do_not_specialize=["count", "programs"])
def _peer_sum(
    x_ptr,
    part_ptr,
    weight_ptr,
    total_ptr,
    normed_ptr,
    addresses_ptr,
    calls_ptr,
    count,
    programs,
    room,
    width,
    eps,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    PEERS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows `program`, `program + programs`, ... of `count`; a buffer has `room` elements."""
    program = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < width
    counts_ptr = addresses_ptr + SIZE
    call = tl.atomic_add(calls_ptr + program, 1, sem="relaxed")
    buffer = call % 2 * room
    own_ptr = tl.multiple_of(tl.load(addresses_ptr + RANK).to(part_ptr.dtype), 16) + buffer
    q = tl.arange(0, PEERS)
    their_counts = tl.load(counts_ptr + q, mask=q < SIZE, other=0).to(calls_ptr.dtype) + program
    own_count = tl.load(counts_ptr + RANK).to(calls_ptr.dtype) + program
    weight = at.to(tl.float32)
    if NORM:
        weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    for row in range(program, count, programs):
        here = row * width + at
        tl.store(own_ptr + here, tl.load(part_ptr + here, mask=inside), mask=inside)
    tl.debug_barrier()  # all threads' parts are written before any count says so
    tl.atomic_add(their_counts, 1, mask=q < SIZE, sem="release", scope="sys")
    while tl.atomic_add(own_count, 0, sem="acquire", scope="sys") < SIZE * (call + 1):
        pass
    tl.debug_barrier()  # no thread reads before the one that has seen the count
    for row in range(program, count, programs):
        here = row * width + at
        x = tl.load(x_ptr + here, mask=inside, other=0.0).to(tl.float32)
        added = x
        for peer in tl.static_range(SIZE):
            peer_ptr = tl.multiple_of(tl.load(addresses_ptr + peer).to(part_ptr.dtype), 16) + buffer
            one = tl.load(peer_ptr + here, mask=inside, other=0.0).to(tl.float32)
            added = one if peer == 0 else added + one  # a sum of -0 is -0
        x += added.to(part_ptr.dtype.element_ty).to(tl.float32)
        rounded = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + here, rounded, mask=inside)
        if NORM:
            put_normed(normed_ptr + here, rounded.to(tl.float32), weight, width, eps, inside)
