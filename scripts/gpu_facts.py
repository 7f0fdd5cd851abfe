"""What the torch of a GPU host can do, and how long the building blocks take there; printed, for planning."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers

DEVICE = "cuda"


def milliseconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Median time of `work` on the device."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def attempt(name: str, work: Callable[[], object]) -> None:
    """Print how long `work` takes, or why it does not run here."""
    try:
        print(f"{name:<60} {milliseconds(work):8.3f} ms", flush=True)
    except Exception as error:  # noqa: BLE001 - whatever it says is the answer
        print(f"{name:<60} {type(error).__name__}: {str(error).splitlines()[0][:150]}", flush=True)


def bf16(*shape: int) -> torch.Tensor:
    """Random numbers on the device."""
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def products() -> None:
    """The weight gradient of gate and up of 7B for 2048 tokens, added up in float32."""
    grad, x, total = bf16(2048, 22016), bf16(2048, 4096), torch.zeros(22016, 4096, device=DEVICE)
    attempt("grad.T @ x, bf16", lambda: grad.t() @ x)
    attempt("grad.T @ x to fp32", lambda: torch.mm(grad.t(), x, out_dtype=torch.float32))
    attempt("fp32 += grad.T @ x, a product and a sum", lambda: total.add_(grad.t() @ x))
    attempt(
        "fp32 += grad.T @ x, one addmm",
        lambda: torch.addmm(total, grad.t(), x, out_dtype=torch.float32, out=total),
    )
    square = bf16(8192, 8192)
    attempt("8192^3, bf16", lambda: square @ square)
    fp32 = torch.randn(1 << 28, device=DEVICE)
    attempt("copy of 1 GiB", lambda: fp32.clone())
    x, w = bf16(2048, 4096), bf16(4096)
    attempt("rms_norm 2048 x 4096", lambda: F.rms_norm(x, (4096,), w, 1e-5))


def decoding() -> None:
    """Attention of one new token for 128 rows of 7B against 384 cached ones: 0.8 GB of keys and values."""
    q, k, v = bf16(128, 32, 1, 128), bf16(128, 32, 512, 128), bf16(128, 32, 512, 128)
    k, v = k[:, :, :384], v[:, :, :384]
    mask = torch.ones(128, 1, 1, 384, dtype=torch.bool, device=DEVICE)
    attempt("decode, masked SDPA", lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    attempt("decode, SDPA without mask", lambda: F.scaled_dot_product_attention(q, k, v))
    from torch.nn.attention.varlen import varlen_attn

    print(f"varlen_attn{inspect.signature(varlen_attn)}")
    flat = bf16(128 * 512, 32, 128)
    packed = bf16(128, 32, 128)
    starts = torch.arange(129, device=DEVICE, dtype=torch.int32)
    used = torch.full((128,), 384, device=DEVICE, dtype=torch.int32)
    attempt(
        "decode, varlen with seqused_k",
        lambda: varlen_attn(packed, flat, flat, starts, starts * 512, 1, 512, seqused_k=used),
    )
    pages, table = (
        bf16(128 * 2, 256, 32, 128),
        torch.arange(256, device=DEVICE, dtype=torch.int32).view(128, 2),
    )
    attempt(
        "decode, varlen with block_table of 256",
        lambda: varlen_attn(packed, pages, pages, starts, None, 1, 512, seqused_k=used, block_table=table),
    )
    dense = torch.arange(128 * 384, device=DEVICE).view(128, 384) % 512
    attempt("decode, gather of keys alone", lambda: flat[dense])


def main() -> None:
    """Print all of it."""
    print(
        f"python {sys.version.split()[0]} torch {torch.__version__} transformers {transformers.__version__}"
    )
    print(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    products()
    decoding()


if __name__ == "__main__":
    main()
