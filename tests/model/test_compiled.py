"""Triton kernels of decoding compile for a GPU: the interpreter takes more than the compiler does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

SMALLEST = 99 << 10
"""Shared memory of a program on GPUs with the least of it (compute capability 8.6, 8.9)."""
HALF, WORD, FLOAT = "*bf16", "*i32", "*fp32"
HEADS = {"DIM": 128, "WIDTH": 128, "BLOCK": 128, "PAGE": 128, "NORM": True}
READ = {
    **dict.fromkeys(("qkv_ptr", "cos_ptr", "sin_ptr", "q_norm_ptr", "k_norm_ptr", "k_ptr", "v_ptr"), HALF),
    **dict.fromkeys(("table_ptr", "members_ptr", "shared_ptr"), WORD),
    "position_ptr": "*i64",
    "place_ptr": "*i64",
    "before_ptr": FLOAT,
    "rows": "i32",
    "group_stride": "i64",
    "table_stride": "i32",
    "eps": "fp32",
    "scale": "fp32",
}


def attention(queries: int, parts: int, shared: int, window: int) -> tuple[dict[str, str], dict[str, Any]]:
    """Types and constants of `_attend`."""
    padded = max(16, queries)
    shape = {"GROUPS": 8, "QUERIES": queries, "PADDED": padded, "PARTS": parts, "SHARED": shared}
    return READ | {"to_ptr": FLOAT if parts > 1 else HALF}, HEADS | shape | {"WINDOW": window}


def build() -> None:
    """Compile all of them for sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from puzzle.model.kernels import flash_decode, peer_sum, skinny_gemm

    product = {
        **dict.fromkeys(("x_ptr", "w_ptr", "out_ptr", "before_ptr", "norm_ptr", "weighted_ptr"), HALF),
        **dict.fromkeys(("partial_ptr", "normed_ptr", "squares_ptr"), FLOAT),
        "locks_ptr": WORD,
        "eps": "fp32",
        **dict.fromkeys(("rows", "width", "depth", "share"), "i32"),
    }
    rows = {
        **dict.fromkeys(("x_ptr", "part_ptr", "weight_ptr", "total_ptr", "normed_ptr"), HALF),
        **dict.fromkeys(("addresses_ptr", "calls_ptr"), "*i64"),
        **dict.fromkeys(("count", "programs", "room", "width"), "i32"),
        "eps": "fp32",
    }
    ranks = {"RANK": 2, "SIZE": 3, "PEERS": 4, "BLOCK": 4096}
    plain = {"SIZE": 0, "TILES": 0, "ADD": False}
    tile = {"HEIGHT": 16, "STEP": 128} | plain
    family = {"GROUPS": 8, "SOME": 8, "MOST": 8, "PARTS": 2}
    jobs: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
        (flash_decode._attend, *attention(1, 1, 0, 0)),
        (flash_decode._attend, *attention(4, 4, 2, 0)),
        (flash_decode._prefix, READ | {"to_ptr": FLOAT}, HEADS | family | {"QUERIES": 7, "PADDED": 64}),
        (skinny_gemm._product, product, tile | {"TRANSPOSED": True, "PARTS": 2}),
        (skinny_gemm._product, product, tile | {"TRANSPOSED": True, "PARTS": 2, "ADD": True}),
        (skinny_gemm._product, product, tile | {"TRANSPOSED": False, "PARTS": 1, "TILES": 64}),
        (skinny_gemm._product, product, tile | {"TRANSPOSED": False, "SIZE": 1376, "PARTS": 1}),
        (skinny_gemm._product, product, tile | {"TRANSPOSED": False, "SIZE": 1376, "PARTS": 2, "TILES": 64}),
        (peer_sum._peer_sum, rows, ranks | {"NORM": True}),
        (peer_sum._peer_sum, rows, ranks | {"NORM": False}),
    ]

    def compiled(capability: int, kernel: Any, types: dict[str, str], constants: dict[str, Any], **more: int):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types[name] for name in names}
        held = {(names.index(name),): value for name, value in constants.items() if name in names}
        target = GPUTarget("cuda", capability, 32)
        return triton.compile(ASTSource(kernel, signature, held), target=target, options=more)

    for job in jobs:
        found = compiled(90, *job)
        print(job[0].__name__)
    # Counts of other devices: their orders hold for the whole system.
    orders = re.findall(r"\.sys\.(\w+)\.", found.asm["ptx"])
    assert orders == ["release", "acquire"], orders
    high = tile | {"HEIGHT": 64, "TRANSPOSED": False, "PARTS": 2}
    stages = skinny_gemm._stages((64 + 64) * 128 * 2, 1, SMALLEST)
    for more in ({}, {"TILES": 128}, {"ADD": True}):
        found = compiled(89, skinny_gemm._product, product, high | more, num_warps=4, num_stages=stages)
        assert found.metadata.shared <= SMALLEST, found.metadata.shared


def test_kernels_compile() -> None:
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=given, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["_attend", "_attend", "_prefix", *["_product"] * 5, *["_peer_sum"] * 2]


if __name__ == "__main__":
    build()
