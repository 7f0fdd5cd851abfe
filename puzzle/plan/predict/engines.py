"""What passes of the published engine and of this one are made of: how often they go over their tensors, and
how much of the host's work each of them takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Counts that belong to code, not to a machine.

    Attributes:
        hidden, rotated, ffn, scores: how often a layer reads or writes, elementwise, its hidden states, its
            queries (and what is as wide), its ffn columns, attention's scores per token and head.
        pairs: the share of a sequence's pairs of positions that attention computes.
        logits, logits_back: bytes that a head moves per logit, forward and backward.
        head_back: products of a head's backward, in those of its forward.
        block: logits that a head makes at a time, each block issued by the host; None: all at once.
        issue_block, issue_block_back: host seconds of a block, in those of a layer's pass without gradients.
        issue_forward, issue_backward: the same of a layer's passes of training.
        summed: bytes of a gradient that replicas sum; its parameter has `rates.ITEM`.
        unhidden: the share of a decode pass's products that reading its weights does not hide.
    """

    hidden: float
    rotated: float
    ffn: float
    scores: float
    pairs: float
    logits: float
    logits_back: float
    head_back: float
    block: int | None
    issue_block: float
    issue_block_back: float
    issue_forward: float
    issue_backward: float
    summed: float
    unhidden: float


PUBLISHED = Engine(
    # Two norms in fp32 and two sums; the rotation of queries and keys, both of them; the gate; scale, mask
    # and softmax of scores, the causal half.
    hidden=22,
    rotated=16,
    ffn=5,
    scores=3,
    pairs=1.0,
    logits=14,  # half precision, its fp32 copy, a log-softmax
    logits_back=14,
    head_back=2.0,
    block=None,
    issue_block=0.0,
    issue_block_back=0.0,
    issue_forward=1.0,
    issue_backward=1.0,
    summed=2,
    unhidden=1.0,  # with few rows, products reach neither the one rate nor the other
)
OWN = Engine(
    # Kernels read once and write once: sum and norm (two of each), heads' rotation and attention, the gate.
    # Attention keeps no scores and leaves out the pairs that causality hides.
    hidden=8,
    rotated=9,
    ffn=3,
    scores=0,
    pairs=0.5,
    # The fp32 logits of `model/logprobs.py`: written, scaled, maximum, difference, exponential, sum; backward
    # made again, with differences, products and a half-precision copy instead.
    logits=36,
    logits_back=54,
    head_back=3.0,
    block=1 << 24,
    # Layers and heads of hidden size 512, which wait for their host: medians of a calibration on H200 of
    # 2026-11-30 (logs/bench/2026-11-30-2xh200-c/calibration.json).
    issue_block=0.63,
    issue_block_back=0.95,
    issue_forward=1.7,
    issue_backward=3.2,
    summed=4,
    unhidden=0.4,  # steps of 16 to 256 rows of a 7B shape on H200 (logs/bench/2026-12-01-1xh200-tiles)
)
