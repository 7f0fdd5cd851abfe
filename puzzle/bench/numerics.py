"""`puzzle bench numerics`: kernels of invariant numerics, tile by tile, beside what fast numerics run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from puzzle.bench import harness
from puzzle.bench.harness import Row
from puzzle.bench.pieces import timed
from puzzle.engine.runtime.world import World
from puzzle.engine.train import norms
from puzzle.errors import UserError
from puzzle.model import linear
from puzzle.model.attention import KVCache, packed_attention
from puzzle.model.packing import PackedBatch, pack
from puzzle.model.pointwise import has_kernels

if TYPE_CHECKING:
    from puzzle.model.kernels.invariant_attention_blocks import Tile
    from puzzle.model.kernels.invariant_gemm import Tile as ProductTile

FORWARD = ((64, 64, 4, 2), (64, 64, 4, 4), (128, 64, 8, 3))
BACKWARD = ((64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 4), (128, 64, 8, 3), (128, 32, 8, 3))
"""Beside the usual ones: queries, keys, warps, stages; for gradients of keys these come first."""
PRODUCTS = (
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (128, 256, 64, 8, 3, 1, True),
    (128, 256, 64, 8, 3, 1, False, True),
    (128, 256, 64, 8, 3, 1, True, True),
    (128, 256, 64, 8, 4, 1, False, True),
    (128, 256, 64, 8, 4, 1, True, True),
    (128, 256, 64, 8, 3, 1, False, False, 16),
    (128, 256, 64, 8, 4, 1, True, False, 4),
    (128, 256, 64, 8, 4, 1, True, False, 16),
    (128, 256, 64, 8, 4, 1, True, False, 32),
    (256, 128, 64, 8, 3, 1, True, True),
    (128, 128, 64, 4, 3, 2),
)
"""Tiles of products beside the usual one: what `invariant_gemm.Tile` takes."""
DECODE = ((64, 64, 4, 2), (64, 64, 4, 4), (64, 64, 8, 3))
FEW = (
    (64, 64, 128, 4, 3),
    (64, 64, 128, 8, 4),
    (64, 64, 64, 4, 4),
    (64, 64, 64, 4, 6),
    (64, 64, 64, 4, 8),
    (64, 64, 256, 4, 2),
    (64, 64, 256, 8, 2),
    (64, 128, 64, 4, 4),
)
"""Of decode passes: of attention, and of products."""
WHAT = ("attention", "forward", "inputs", "weights", "norm", "decode")
DECODED = 64
"""Rows of a decode pass."""
TOGETHER = 4
"""Calls that are timed together: to wait for one takes as long as a small one."""


@dataclass(frozen=True, kw_only=True)
class NumericsBench(harness.ModelBench):
    """Time kernels of invariant numerics by tile, beside fast ones."""

    rows: harness.Rows = 16
    length: harness.Length = 512
    what: Annotated[
        Sequence[str],
        harness.several(
            *WHAT,
            text="attention; a layer's products forward, for inputs' or weights' gradients; the norm; what a "
            "decode pass of 64 rows computes",
        ),
    ] = WHAT
    repeats: harness.Repeats = 3

    def measure(self, world: World) -> Iterator[Row]:
        """UserError where there is nothing to time."""
        if self.dtype != "bf16":
            raise UserError(f"--dtype {self.dtype}: tiles are chosen for bf16")
        if not has_kernels(world.device):
            raise UserError("puzzle bench numerics: it times kernels of a GPU; there is none, or no Triton")
        makers = {"attention": self._attention, "norm": self._norm, "decode": self._decode}
        for what in self.what:
            with torch.no_grad():
                yield from makers.get(what, partial(self._products, what))(world)

    def line(self, row: Row) -> str:
        rate = f"{row['flops_per_s'] / 1e12:8.0f} TFLOP/s" if "flops_per_s" in row else ""
        rate = f"{row['bytes_per_s'] / 1e9:8.0f} GB/s" if "bytes_per_s" in row else rate
        told = row.get("failed") or f"{row['seconds'] * 1e3:9.3f} ms{rate}"
        same = {True: "  the same bits", False: "  OTHER BITS", None: ""}[row.get("same")]
        return f"{row['kernel']:<34}{row['tile']:<26}{told}{same}"

    def _attention(self, world: World) -> Iterator[Row]:
        """Causal attention of a micro-batch, and its gradients."""
        from puzzle.model.kernels import invariant_attention as ours
        from puzzle.model.kernels import invariant_attention_grads as grads

        spec, batch = self.spec, pack([[1] * self.length] * self.rows, 1, world.device)
        q, k, v, grad = (
            self._random((batch.total, heads, spec.head_dim), world, seed)
            for seed, heads in enumerate((spec.num_heads, *[spec.num_kv_heads] * 2, spec.num_heads))
        )
        # Of one product of scores or values, for the keys that a query sees.
        flops = self.rows * spec.num_heads * self.length * (self.length + 1) * spec.head_dim
        yield from self._fast_attention(world, (q, k, v, grad), batch, flops)
        report = partial(self._tiles, world)
        attend = partial(ours.attend, q, k, v, batch, None)
        yield from report("attention, forward", attend, ours.TILES[0], FORWARD, flops=2 * flops)
        saved = grads.Saved(q, k, v, *attend(), batch, None)
        of_queries = partial(grads.of_queries, saved, grad)
        name, first = "attention, gradients of queries", grads.QUERY_TILES[0]
        yield from report(name, of_queries, first, BACKWARD, flops=3 * flops)
        of_keys = partial(grads.of_keys, saved, grad, of_queries()[1])
        name, first = "attention, gradients of keys", grads.KEY_TILES[0]
        yield from report(name, of_keys, first, [(k, q, *rest) for q, k, *rest in BACKWARD], flops=4 * flops)

    def _fast_attention(
        self, world: World, given: tuple[Tensor, ...], batch: PackedBatch, flops: int
    ) -> Iterator[Row]:
        leaves = [x.detach().requires_grad_() for x in given[:3]]
        seconds = self._seconds(world, lambda: packed_attention(*given[:3], batch, None))
        yield _row("attention, forward", "fast", seconds, flops=2 * flops)
        with torch.enable_grad():
            out = packed_attention(*leaves, batch, None)
        both = partial(torch.autograd.grad, out, leaves, given[3], retain_graph=True)
        yield _row("attention, gradients", "fast", self._seconds(world, both), flops=5 * flops)

    def _products(self, what: str, world: World) -> Iterator[Row]:
        """A layer's products: forward, for the gradients of their inputs, or for those of weights."""
        from puzzle.model.kernels import invariant_gemm as ours

        tokens = self.rows * self.length
        for name, (out, into, turned) in self._matrices().items():
            x, weight, grad = (
                self._random(shape, world, seed)
                for seed, shape in enumerate(((tokens, into), (out, into), (tokens, out)))
            )
            total = None
            if what == "weights":
                left, right = (x.t(), grad) if turned else (grad.t(), x)
                total = torch.zeros((len(left), right.shape[1]), device=world.device)
                fast = partial(linear.accumulate, total, left, right, False)
                product = partial(ours.product, left, right.t(), out=total, add=True)
            else:
                weight = weight.t().contiguous().t() if turned else weight
                one, other = (x, weight) if what == "forward" else (grad, weight.t())
                fast = partial(torch.mm, one, other.t())
                product = partial(ours.product, one, other)
            kernel, flops = f"{name}, {what}", 2 * tokens * out * into
            yield _row(kernel, "fast", self._seconds(world, fast), flops=flops)
            usual = ours.engine_tile(1, x if total is None else total)
            yield from self._tiles(world, kernel, product, usual, PRODUCTS, total, flops=flops)

    def _matrices(self) -> dict[str, tuple[int, int, bool]]:
        """Outputs, inputs, and whether it lies the other way round, as row-parallel ones do."""
        spec = self.spec
        wide, narrow = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        return {
            "qkv": (wide + 2 * narrow, spec.hidden_size, False),
            "attention_out": (spec.hidden_size, wide, True),
            "gate_up": (2 * spec.intermediate_size, spec.hidden_size, False),
            "down": (spec.hidden_size, spec.intermediate_size, True),
        }

    def _decode(self, world: World) -> Iterator[Row]:
        """A pass of some rows, each of which has cached `length` tokens: what it reads counts."""
        from puzzle.model.kernels import invariant_attention, invariant_gemm

        rows, spec = DECODED, self.spec
        for name, (out, into, turned) in self._matrices().items():
            x, weight = (self._random(shape, world, i) for i, shape in enumerate(((rows, into), (out, into))))
            weight = weight.t().contiguous().t() if turned else weight
            stored = weight.t() if turned else weight
            fast = partial(linear.product, x, stored, transposed=turned)
            kernel, size = f"{name}, decode", weight.nbytes
            yield _row(kernel, "fast", self._seconds(world, fast), bytes=size)
            usual = invariant_gemm.tile_for(rows, out, x.dtype)
            product = partial(invariant_gemm.product, x, weight)
            yield from self._tiles(world, kernel, product, usual, FEW, bytes=size)
        page = 128
        pages = -(-self.length // page)
        cache = self._random((2, 1, spec.num_kv_heads, rows * pages, page, spec.head_dim), world, 0)
        table = torch.randperm(rows * pages, device=world.device).view(rows, pages).int()
        last = torch.full((rows,), self.length - 1, device=world.device)
        slots = KVCache(cache[0], cache[1]).at(last, table).slots(0)
        query = self._random((rows, spec.num_heads, spec.head_dim), world, 1)
        read = 2 * rows * self.length * spec.num_kv_heads * spec.head_dim * query.itemsize
        attend = partial(invariant_attention.decode, query, slots, last, None)
        usual = invariant_attention.DECODE
        yield from self._tiles(world, "attention, decode", attend, usual, DECODE, bytes=read)

    def _norm(self, world: World) -> Iterator[Row]:
        """Of the gradients of some layers."""
        spec = self.spec
        matrices = 4 * spec.hidden_size**2 + 3 * spec.hidden_size * spec.intermediate_size
        parts = [torch.randn(matrices, device=world.device) for _ in range(4)]
        size = sum(part.nbytes for part in parts)
        for tile, start in (("fast", norms.start), ("one pass", norms.start_exact)):
            seconds = self._seconds(world, lambda start=start: start(parts, world.device, None)[1]())
            yield _row("norm of gradients, 4 layers", tile, seconds, bytes=size)

    def _random(self, shape: tuple[int, ...], world: World, seed: int) -> Tensor:
        generator = torch.Generator(world.device).manual_seed(seed)
        made = torch.randn(shape, device=world.device, generator=generator)
        return made.to(harness.DTYPES[self.dtype])

    def _tiles(
        self,
        world: World,
        kernel: str,
        work: Callable[..., Any],
        usual: Tile | ProductTile,
        others: Sequence[Sequence[Any]],
        fresh: Tensor | None = None,
        **amounts: float,
    ) -> Iterator[Row]:
        """Every tile, the `usual` first, and whether it gives the same. `fresh` is what it adds to."""
        wanted: list[Tensor] = []
        for tile in dict.fromkeys((usual, *(type(usual)(*each) for each in others))):
            name = _name(tile) + (" *" if tile == usual else "")
            try:
                if fresh is not None:
                    fresh.zero_()
                found = _tensors(work(tile=tile))
                if not wanted:
                    wanted = [each.clone() for each in found]
                same = all(map(torch.equal, found, wanted))
                seconds = self._seconds(world, partial(work, tile=tile))
            except Exception as error:  # noqa: BLE001 - of a compiler, of any kind: the others are of use
                yield {"kernel": kernel, "tile": name, "failed": f"{type(error).__name__}: {error}"[:60]}
                continue
            yield _row(kernel, name, seconds, **amounts) | {"same": same}

    def _seconds(self, world: World, work: Callable[[], object]) -> float:
        return timed(world, lambda: [work() for _ in range(TOGETHER)], self.repeats) / TOGETHER


def _row(kernel: str, tile: str, seconds: float, **amounts: float) -> Row:
    rates = {f"{name}_per_s": amount / seconds for name, amount in amounts.items()}
    return {"kernel": kernel, "tile": tile, "seconds": seconds, **rates}


def _tensors(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else found


def _name(tile: Tile | ProductTile) -> str:
    """Sizes, warps and stages, and what else differs from most."""
    values: Mapping[str, Any] = tile._asdict()
    sizes = "x".join(str(size) for name, size in values.items() if name in _SIZES)
    rest = f" w{values['warps']} s{values['stages']}"
    rest += f" x{values['programs']}" if values.get("programs", 1) > 1 else ""
    rest += f" b{values['band']}" if values.get("band", 8) != 8 else ""
    return sizes + rest + "".join(f" {name}" for name in ("flat", "halves") if values.get(name))


_SIZES = ("queries", "keys", "rows", "columns", "depth")
