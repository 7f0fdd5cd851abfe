"""Sampling noise that is a function of names, not of a generator's state.

The noise of one token is decided by (seed, iteration, prompt id, sample index, position) and the vocabulary
entry, through integer mixing that is exact and the same on every device, for any split of the batch and any
slice of the vocabulary. Only the last step, two logarithms in fp32, may differ between devices by units in
the last place.

Why not a library's counter-based generator: Philox needs 64-bit products, and torch has no unsigned
arithmetic that is quick on a CPU. Here a row's 64-bit key is made by the finaliser of SplitMix64 (Steele,
Lea, Flood 2014), a vocabulary entry's 32 bits by a two-round xor-shift-multiply permutation with constants
of low bias (Wellons 2018, "lowbias32"). Products wrap modulo 2^32 or 2^64.
"""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIX_64 = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
MIX_32 = (0x7FEB352D, 0x846CA68B)
# The largest fp32 below 2^-31: with it (2^31 - 1, rounded to 2^31) still maps below 1.
UNIT = 2.0**-31 * (1.0 - 2.0**-24)
# Elements of one block on a CPU: 0.5 MiB per buffer stays in the second-level cache, which halves the time.
_BLOCK = 1 << 17


def _signed(value: int, bits: int) -> int:
    """The two's complement reading of the low `bits` bits."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _mix64(state: int) -> int:
    state &= 2**64 - 1
    state = ((state ^ (state >> 30)) * MIX_64[0]) & (2**64 - 1)
    state = ((state ^ (state >> 27)) * MIX_64[1]) & (2**64 - 1)
    return state ^ (state >> 31)


def _mix64_tensor(state: Tensor) -> Tensor:
    """`_mix64` on int64 tensors; shifts of signed integers copy the sign, so it is masked away."""
    for shift, factor in ((30, MIX_64[0]), (27, MIX_64[1])):
        state = (state ^ ((state >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor, 64)
    return state ^ ((state >> 31) & ((1 << 33) - 1))


def row_keys(seed: int, iteration: int, prompt_id_B: Tensor, sample_B: Tensor, position_B: Tensor) -> Tensor:
    """Keys (B, 2) int32 of the rows of one draw; the three tensors are int64, on one device, and broadcast.

    `position` counts the tokens before the sampled one in a way that the caller keeps to (here: answer tokens
    so far). Each name is mixed in after the one before it was mixed, so exchanging two of them gives
    another key.
    """
    return position_keys(row_seeds(seed, iteration, prompt_id_B, sample_B), position_B)


def row_seeds(seed: int, iteration: int, prompt_id_B: Tensor, sample_B: Tensor) -> Tensor:
    """What of `row_keys` stays the same while a response is sampled: int64 (B,)."""
    state = _mix64(_mix64(seed + GOLDEN) + iteration + GOLDEN)
    state_B = _mix64_tensor(prompt_id_B.long() + _signed(state + GOLDEN, 64))
    return _mix64_tensor(state_B + (sample_B + _signed(GOLDEN, 64)))


def position_keys(row_seed_B: Tensor, position_B: Tensor) -> Tensor:
    """`row_keys` of rows with these row_seeds, at these positions: (B, 2) int32."""
    state_B = _mix64_tensor(row_seed_B + (position_B + _signed(GOLDEN, 64)))
    return state_B.contiguous().unsqueeze(-1).view(torch.int32)


def _xor_shifted(x: Tensor, shift: int, scratch: Tensor) -> None:
    """X ^= x >> shift, as unsigned, in place (int32)."""
    torch.bitwise_right_shift(x, shift, out=scratch)
    x.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))


def _mix32(x: Tensor, scratch: Tensor) -> None:
    """Permute 32-bit integers in place so that every input bit flips every output bit with probability near
    1/2.
    """
    _xor_shifted(x, 16, scratch)
    x.mul_(_signed(MIX_32[0], 32))
    _xor_shifted(x, 15, scratch)
    x.mul_(_signed(MIX_32[1], 32))
    _xor_shifted(x, 16, scratch)


def _vocabulary_bits(offset: int, count: int, device: torch.device) -> Tensor:
    """(V,) int32: one well-mixed integer per vocabulary entry, the same for all rows."""
    entries_V = torch.arange(offset + 1, offset + 1 + count, dtype=torch.int32, device=device)
    _mix32(entries_V, torch.empty_like(entries_V))
    return entries_V


def _row_bits(vocabulary_V: Tensor, keys_B2: Tensor, bits_BV: Tensor, scratch_BV: Tensor) -> None:
    """Fill bits_BV with 32 random bits for each row and vocabulary entry: both words of the key enter
    before the last mixing.
    """
    torch.bitwise_xor(vocabulary_V, keys_B2[:, :1], out=bits_BV)
    bits_BV.mul_(keys_B2[:, 1:] | 1)
    _mix32(bits_BV, scratch_BV)


def gumbel(keys_B2: Tensor, vocab_offset: int, vocab_count: int) -> Tensor:
    """Standard Gumbel noise (B, vocab_count) fp32 for the entries [vocab_offset, vocab_offset +
    vocab_count).

    argmax(logits / T + gumbel) is a draw from softmax(logits / T) (Gumbel-max; Maddison, Tarlow, Minka
    2014). From the low 31 of the random bits k, in fp32 and in this order: v = (k + 0.5) * (2^-31 - 2^-55),
    noise = -log(-log1p(-v)). Large noise comes from small v, where fp32 is finest: it reaches 22 and two
    entries hardly ever tie at the top.
    """
    rows = keys_B2.shape[0]
    block = max(1, _BLOCK // max(1, vocab_count)) if keys_B2.device.type == "cpu" else rows
    block = max(1, min(block, rows))
    vocabulary_V = _vocabulary_bits(vocab_offset, vocab_count, keys_B2.device)
    bits_BV, scratch_BV = vocabulary_V.new_empty(2, block, vocab_count)
    noise_BV = torch.empty(rows, vocab_count, dtype=torch.float32, device=keys_B2.device)
    for start in range(0, rows, block):
        out_BV = noise_BV[start : start + block]
        bits = bits_BV[: out_BV.shape[0]]
        _row_bits(vocabulary_V, keys_B2[start : start + block], bits, scratch_BV[: out_BV.shape[0]])
        out_BV.copy_(bits.bitwise_and_(0x7FFFFFFF))
        out_BV.add_(0.5).mul_(-UNIT).log1p_().neg_().log_().neg_()
    return noise_BV
