"""What the torch of a GPU host can do, and how long the building blocks take there; printed, for planning."""

from __future__ import annotations

import sys
import time
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


def host_copies() -> None:
    """Bytes to and from pinned host memory: in one piece and in pieces, when it is new and again."""
    here = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    for size in (1 << 30, 1 << 26):
        start = time.perf_counter()
        there = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range((1 << 30) // size)]
        print(f"pinning 1 GiB in pieces of {size >> 20} MiB: {1e3 * (time.perf_counter() - start):.1f} ms")
        pairs = list(zip(here.split(size), there, strict=True))

        def copy(out: bool, pairs: list[tuple[torch.Tensor, torch.Tensor]] = pairs) -> None:
            for device, host in pairs:
                (host if out else device).copy_(device if out else host, non_blocking=True)

        attempt("1 GiB to the host", lambda copy=copy: copy(True))
        attempt("1 GiB from the host", lambda copy=copy: copy(False))


def main() -> None:
    """Print all of it."""
    print(
        f"python {sys.version.split()[0]} torch {torch.__version__} transformers {transformers.__version__}"
    )
    print(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    products()
    decoding()
    host_copies()


if __name__ == "__main__":
    main()
