"""How the next token is chosen, over vocabulary rows cut across the tensor group.

Noise is keyed by (seed, iteration, prompt, sample, position): a token depends neither on the batch it was
drawn in nor on the layout. Suffixes: B rows, V vocabulary rows here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.errors import UserError
from puzzle.model.noise import gumbel, position_keys
from puzzle.model.parallel import TensorGroup
from puzzle.model.pointwise import has_kernels


@dataclass(frozen=True)
class SamplingParams:
    """`top_k` 0 and `top_p` 1 filter nothing; a sampled stop token ends a sequence and is its last token."""

    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    max_new_tokens: int = 128
    stop_ids: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise UserError for values that no sampler can obey."""
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}: it must be above 0 (for argmax set greedy)")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}: it must be at least 0 (0 keeps all tokens)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: it must be above 0 and at most 1")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: it must be at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UserError(f"min_new_tokens is {self.min_new_tokens}: it must be in [0, max_new_tokens]")

    @property
    def filtered(self) -> bool:
        """Whether top-k or top-p may forbid a token."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1)


@dataclass(frozen=True)
class VocabShard:
    """The vocabulary rows of one rank of `group`: from `offset` on, `width` of them with padding."""

    group: TensorGroup
    offset: int
    width: int
    log_total: Callable[[Tensor], Tensor] | None = None
    """(B,) logarithms of the sums of exponentials of logits (B, V) over the group, in training's order; None:
    in whatever order is quick."""


@dataclass(frozen=True)
class Sampled:
    """What a pass drew for its rows, on the device: int32 (2, B), ids and the bits of log-probabilities."""

    packed: Tensor

    @property
    def tokens(self) -> Tensor:
        """int32 (B,)."""
        return self.packed[0]

    @property
    def logprobs(self) -> Tensor:
        """float32 (B,): log_softmax(logits / T) of the tokens."""
        return self.packed[1].view(torch.float32)

    def fetch(self) -> Fetched:
        """Start copying to the host; the device goes on."""
        return Fetched(self.packed)


class Fetched:
    """Sampled tokens on their way to the host."""

    def __init__(self, packed: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = packed
        if packed.is_cuda:
            self._host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._host.copy_(packed, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def lists(self) -> tuple[list[int], list[float]]:
        """Tokens and log-probabilities by row; waits for the device if the pass is not done."""
        if self._event is not None:
            self._event.synchronize()
        return self._host[0].tolist(), self._host[1].view(torch.float32).tolist()


def draw(
    logits_BV: Tensor, row_seed_B: Tensor, count_B: Tensor, params: SamplingParams, shard: VocabShard
) -> Tensor:
    """The next token of every row, as int32 (2, B): ids, and the bits of their log-probabilities.

    `row_seed_B` are the rows' `noise.row_seeds`, `count_B` the tokens sampled so far, both int64; nothing
    waits for the device. Otherwise as `choose`.
    """
    if has_kernels(logits_BV.device) and not params.filtered and shard.log_total is None:
        return draw_by_kernel(logits_BV, row_seed_B, count_B, params, shard)
    keys_B2 = None if params.greedy else position_keys(row_seed_B, count_B)
    young_B = count_B < params.min_new_tokens if params.stop_ids and params.min_new_tokens else None
    tokens_B, logprobs_B = choose(logits_BV, keys_B2, young_B, params, shard)
    return torch.stack((tokens_B.int(), logprobs_B.view(torch.int32)))


def draw_by_kernel(
    logits_BV: Tensor, row_seed_B: Tensor, count_B: Tensor, params: SamplingParams, shard: VocabShard
) -> Tensor:
    """`draw` without filters, in two passes over memory."""
    from puzzle.model.kernels import sample as sample_kernel

    noise = None if params.greedy else row_seed_B
    offers = sample_kernel.offers(
        logits_BV, noise, count_B, shard.offset, params.temperature, params.stop_ids, params.min_new_tokens
    )
    return sample_kernel.settle(shard.group.all_gather(offers))


def choose(
    logits_BV: Tensor,
    keys_B2: Tensor | None,
    young_B: Tensor | None,
    params: SamplingParams,
    shard: VocabShard,
) -> tuple[Tensor, Tensor]:
    """Tokens int64 (B,) and their log_softmax(logits / T) float32 (B,), the same on every tensor rank.

    `logits_BV` (float32, overwritten) are the real vocabulary rows of this rank. The log-probabilities are
    those before filtering. Rows marked in `young_B` may not stop yet; `keys_B2` are the noise's row keys
    (None when greedy).
    """
    if params.temperature != 1:
        logits_BV.mul_(1.0 / params.temperature)
    if params.filtered:
        assert keys_B2 is not None
        return _draw_filtered(logits_BV, keys_B2, young_B, params, shard)
    return _draw(logits_BV, keys_B2, young_B, params, shard)


def _draw(
    logits_BV: Tensor,
    keys_B2: Tensor | None,
    young_B: Tensor | None,
    params: SamplingParams,
    shard: VocabShard,
) -> tuple[Tensor, Tensor]:
    """argmax(logits + noise) over all shards.

    Each rank offers its best; all ranks compare the same bits, so the owner of the best decides for all.
    """
    rows, count = logits_BV.shape
    total_B = None if shard.log_total is None else shard.log_total(logits_BV)
    offers = logits_BV.new_full((1, 4, rows), -torch.inf)
    if count:
        if shard.log_total is None:
            offers[0, 3] = logits_BV.logsumexp(1)
        noisy_BV = without_stops(logits_BV, young_B, params.stop_ids, shard.offset)
        if keys_B2 is not None:
            noisy_BV = gumbel(keys_B2, shard.offset, count).add_(noisy_BV)
        best, index = noisy_BV.max(1)
        offers[0, 0] = best
        # Exact in float32 up to 2^24 tokens.
        offers[0, 1] = index + shard.offset
        offers[0, 2] = logits_BV.gather(1, index[:, None])[:, 0]
    offers = shard.group.all_gather(offers)
    winner = offers[:, 0].argmax(0, keepdim=True)
    token, picked = (offers[:, row].gather(0, winner)[0] for row in (1, 2))
    return token.long(), picked - (offers[:, 3].logsumexp(0) if total_B is None else total_B)


def _draw_filtered(
    logits_BV: Tensor, keys_B2: Tensor, young_B: Tensor | None, params: SamplingParams, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """A draw under top-k and top-p: the first rank sees the whole vocabulary and decides."""
    total_B = None if shard.log_total is None else shard.log_total(logits_BV)
    padded = F.pad(logits_BV, (0, shard.width - logits_BV.shape[1]), value=-torch.inf)
    whole_BV = shard.group.all_gather(padded.t()).t().contiguous()
    tokens_B = torch.empty(len(whole_BV), dtype=torch.int64, device=whole_BV.device)
    if shard.group.rank == 0:
        kept_BV = without_stops(whole_BV, young_B, params.stop_ids, 0)
        kept_BV = keep_likely(kept_BV, params.top_k, params.top_p)
        tokens_B = gumbel(keys_B2, 0, kept_BV.shape[1]).add_(kept_BV).argmax(1)
    tokens_B = shard.group.broadcast(tokens_B)
    total_B = whole_BV.logsumexp(1) if total_B is None else total_B
    return tokens_B, whole_BV.gather(1, tokens_B[:, None])[:, 0] - total_B


def keep_likely(logits_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits of the `top_k` likeliest tokens and, among those, of the fewest that reach `top_p`.

    -inf elsewhere.
    """
    if 0 < top_k < logits_BV.shape[1]:
        least = logits_BV.topk(top_k, dim=1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, -torch.inf)
    if top_p < 1:
        ordered, index = torch.sort(logits_BV, dim=1, descending=True, stable=True)
        p = ordered.softmax(1)
        beyond = p.cumsum(1) - p >= top_p
        logits_BV = logits_BV.masked_fill(beyond.scatter(1, index, beyond), -torch.inf)
    return logits_BV


def without_stops(
    logits_BV: Tensor, young_B: Tensor | None, stop_ids: tuple[int, ...], offset: int
) -> Tensor:
    """Logits with -inf at the stop tokens of this shard in the rows marked in `young_B`."""
    here = [i - offset for i in stop_ids if 0 <= i - offset < logits_BV.shape[1]]
    if young_B is None or not here:
        return logits_BV
    out = logits_BV.clone()
    for i in here:  # a list of them as an index would wait for the device
        out[:, i].masked_fill_(young_B, -torch.inf)
    return out
