"""One pipeline stage of one model: embedding, layers, final norm, head, all cut over a tensor group.

The parameters are the storages of `plan.shards.local_params`, under the same names. The same modules
train, score and generate. Suffixes: T packed tokens, D hidden, H query heads, K key/value heads, h
head_dim, F ffn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from puzzle.errors import UserError
from puzzle.model.adapter import Adapter
from puzzle.model.attention import KVCache
from puzzle.model.linear import Later, Owed, Stream, Weight
from puzzle.model.logprobs import TokenStats
from puzzle.model.numerics import Fast, Invariant
from puzzle.model.packing import DecodeBatch, PackedBatch
from puzzle.model.parallel import TensorGroup, gather_outputs
from puzzle.model.peer_sums import Part
from puzzle.model.pointwise import Pointwise
from puzzle.model.rope import frequencies, rotation
from puzzle.plan.layout import Coord, Layout
from puzzle.plan.shards import LocalParam, adapted, local_params
from puzzle.spec.model import ModelSpec

Summand = Tensor | Part | Owed | None
"""What is to be added to hidden states: there already, or to be made where it is added, or nothing."""


@dataclass
class Pass:
    """What the layers of a stage share during one forward pass.

    A packed pass is `sharded`: hidden states are (T/tp, D). A decode pass keeps all B rows on every
    tensor rank. Where it `owes`, products wait for the norm behind them and do a part of its work.
    """

    spec: ModelSpec
    numerics: Fast
    batch: PackedBatch | DecodeBatch
    cache: KVCache | None
    cos: Tensor
    sin: Tensor
    pointwise: Pointwise
    owes: bool

    def __post_init__(self) -> None:
        self.sharded = isinstance(self.batch, PackedBatch)

    def add_norm(self, x: Tensor, y: Summand, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | Stream]:
        """x + y and its norm."""
        if isinstance(y, Part | Owed):
            return y.add_norm(x, weight, eps)
        return self.pointwise.add_norm(x, y, weight, eps)

    def column(
        self, x: Tensor | Stream, weight: Tensor, bias: Tensor | None, adapter: Adapter | None
    ) -> Tensor:
        """The own columns of x @ weight.T."""
        if isinstance(x, Stream):
            return x.product(weight)
        out = self.numerics.column(x, weight, bias, self.sharded)
        return out if adapter is None else adapter.add(out, x, self.numerics.group, self.sharded)

    def row(
        self, x: Tensor, weight_transposed: Tensor, bias: Tensor | None, adapter: Adapter | None
    ) -> Tensor | Part | Owed:
        """x @ weight, summed over the tensor group, or what is left to do of it where it is added."""
        if self.owes:
            return Owed(x, weight_transposed)
        if not self.sharded and adapter is None and bias is None:
            return self.numerics.row_later(x, weight_transposed)
        out = self.numerics.row(x, weight_transposed, self.sharded)
        if adapter is not None:
            out = adapter.add(out, x, self.numerics.group, self.sharded)
        return out if bias is None else self.numerics.plus(out, bias)

    def attend(self, layer: Layer, qkv: Tensor) -> Tensor:
        """Attention (T, H h) of a layer of the stage; keys and values go into the cache if there is one."""
        rotation, norms = (self.cos, self.sin), (layer.q_norm, layer.k_norm, layer.eps)
        slots, batch, window = None, self.batch, self.spec.sliding_window
        if self.cache is not None:
            slots = self.cache.slots(layer.index)
        if self.pointwise.decode is not None and isinstance(batch, DecodeBatch):
            return self.pointwise.decode(qkv, *rotation, *norms, slots, batch.positions_T, window)
        if self.pointwise.stores:
            q, k, v = self.pointwise.heads(qkv, layer.kv_groups, *rotation, *norms, slots)
        else:
            q, k, v = self.pointwise.heads(qkv, layer.kv_groups, *rotation, *norms)
            if slots is not None:
                slots.write(k, v)
        if isinstance(batch, PackedBatch):
            if slots is not None:
                k, v = slots.before(k, v)
            return self.numerics.packed_attention(q, k, v, batch, window).flatten(1)
        assert slots is not None
        return self.numerics.decode_attention(q, slots, batch, window).flatten(1)


class Layer(nn.Module):
    """Attention and gated feed-forward, each behind a norm and added to its input."""

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    attention_out: Tensor
    attention_out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    qkv_adapter: Adapter | None
    attention_out_adapter: Adapter | None
    gate_up_adapter: Adapter | None
    down_adapter: Adapter | None

    def __init__(self, spec: ModelSpec, tp: int, index: int) -> None:
        """`index` counts from the first layer of the stage."""
        super().__init__()
        self.index, self.eps = index, spec.norm_eps
        self.kv_groups = max(1, spec.num_kv_heads // tp)
        self.ffn_blocks = spec.ffn_blocks // tp
        for name in ("qkv_bias", "q_norm", "k_norm", "attention_out_bias", "gate_up_bias", "down_bias"):
            self.register_parameter(name, None)
        for name in ("qkv", "attention_out", "gate_up", "down"):
            self.register_module(f"{name}_adapter", None)

    def owes(self, rows: int, numerics: Fast) -> bool:
        """Whether products do the work of norms where there are so many rows: `Pass.owes`."""
        columns, inward = (self.qkv, self.gate_up), (self.attention_out, self.down)
        biases = (self.qkv_bias, self.attention_out_bias, self.gate_up_bias, self.down_bias)
        adapters = (self.qkv_adapter, self.attention_out_adapter, self.gate_up_adapter, self.down_adapter)
        bare = all(part is None for part in (*biases, *adapters))
        return bare and numerics.norms_in_products(rows, columns, inward)

    def forward(self, x: Tensor, y: Summand, run: Pass) -> tuple[Tensor, Summand]:
        """Hidden states in and out, (T/tp, D), or (B, D) in a decode pass: the sum of both.

        They are added where they are next normed, which is one pass over memory.
        """
        x, normed = run.add_norm(x, y, self.attention_norm, self.eps)
        x, normed = run.add_norm(x, self._attention(normed, run), self.mlp_norm, self.eps)
        return x, run.row(self._gated(normed, run), self.down, self.down_bias, self.down_adapter)

    def _attention(self, x: Tensor | Stream, run: Pass) -> Summand:
        qkv = run.column(x, self.qkv, self.qkv_bias, self.qkv_adapter)
        weights = (self.attention_out, self.attention_out_bias, self.attention_out_adapter)
        return run.row(run.attend(self, qkv), *weights)

    def _gated(self, x: Tensor | Stream, run: Pass) -> Tensor:
        if isinstance(x, Stream):
            return x.gates(self.gate_up, self.ffn_blocks)
        if not run.sharded and self.gate_up_bias is None and self.gate_up_adapter is None:
            found = run.numerics.gates(x, self.gate_up, self.ffn_blocks)
            if found is not None:
                return found
        both = run.column(x, self.gate_up, self.gate_up_bias, self.gate_up_adapter)
        return run.pointwise.gated(both, self.ffn_blocks)


class Decoder(nn.Module):
    """Stage `coord.p` of a model, tensor rank `coord.t`. Weights are zero until `model.hf` fills them.

    `recompute` keeps only the layers' inputs for the backward pass. With `parts`, numbers are those of every
    layout with these parts (`numerics.Invariant`). UserError if the layout does not fit the model.
    """

    embed: nn.Parameter
    head: nn.Parameter
    final_norm: Tensor
    freq: Tensor

    def __init__(
        self,
        spec: ModelSpec,
        layout: Layout,
        coord: Coord,
        group: TensorGroup,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        recompute: bool = False,
        parts: int | None = None,
    ) -> None:
        super().__init__()
        layout.check(spec)
        if spec.head == "value" and spec.num_labels != 1:
            raise UserError(
                f"config: a value head has 1 label, this model {spec.num_labels}; set num_labels to 1"
            )
        if (group.rank, group.size) != (coord.t, layout.tp):
            raise ValueError(f"rank {group.rank} of {group.size} cannot be {coord} of layout {layout}")
        self.spec, self.layout, self.coord, self.group = spec, layout, coord, group
        self.first, self.last = coord.p == 0, coord.p == layout.pp - 1
        self.recompute, self.pointwise, self.later = recompute, Pointwise.eager(), Later()
        self.numerics = Fast(group) if parts is None else Invariant(group, parts)
        # Tokens from this one on count as padding: they are in no distribution. Lower than the model's own
        # where other models, padded to fewer rows, must read what this one draws.
        self.vocabulary = spec.vocab_size
        self.storages: tuple[LocalParam, ...] = local_params(spec, layout, coord)
        self.layers = nn.ModuleDict()
        for index, layer in enumerate(layout.layers(coord.p)):
            self.layers[str(layer)] = Layer(spec, layout.tp, index)
        for matrix, b in adapted(self.storages):
            assert spec.lora is not None, "whose adapters these are"
            path, _, name = matrix.name.rpartition(".")
            self.get_submodule(path).add_module(f"{name}_adapter", Adapter(matrix, b, spec.lora.scale))
        for storage in self.storages:
            path, _, name = storage.name.rpartition(".")
            kind = Weight if len(storage.shape) > 1 else nn.Parameter
            weight = kind(torch.zeros(storage.shape, dtype=dtype, device=device))
            if isinstance(weight, Weight):
                weight.later, weight.accumulate = self.later, self.numerics.accumulate
            self.get_submodule(path).register_parameter(name, weight)
        self.register_buffer("freq", frequencies(spec.rope, spec.head_dim).to(device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and hidden states."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def adapted(self) -> Iterator[tuple[nn.Parameter, Adapter]]:
        """Every matrix that has an adapter, with it."""
        for matrix, _ in adapted(self.storages):
            adapter = self.get_submodule(f"{matrix.name}_adapter")
            assert isinstance(adapter, Adapter)
            yield self.get_parameter(matrix.name), adapter

    @property
    def head_weight(self) -> nn.Parameter:
        """What the last stage's head multiplies by: its own storage or, tied on the only stage, `embed`."""
        return self.head if "head" in self._parameters else self.embed

    def compile_layers(self) -> None:
        """Fuse what no kernel of ours computes between matrices and attention (`Pointwise.compiled`)."""
        self.pointwise = Pointwise.compiled()

    def new_cache(self, pages: int, page: int) -> KVCache:
        """An empty key/value cache for this stage: `pages` pages of `page` tokens each."""
        layers, kv_heads = len(self.layers), max(1, self.spec.num_kv_heads // self.layout.tp)
        shape = (layers, kv_heads, pages, page, self.spec.head_dim)
        return KVCache(*(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in "kv"))

    def forward(self, x: Tensor, batch: PackedBatch | DecodeBatch, cache: KVCache | None = None) -> Tensor:
        """Token ids (T,) on the first stage, else hidden states.

        Returns hidden states, normed on the last stage.

        Hidden states of a packed batch are this rank's (T/tp, D), of a decode batch all (B, D). A cache says
        where keys and values go (`KVCache.at`).
        """
        cos, sin = rotation(batch.positions_T, self.freq, self.dtype)
        pointwise = self.numerics.pointwise(x.device, self.pointwise)
        run = Pass(self.spec, self.numerics, batch, cache, cos, sin, pointwise, self._owes(batch))
        h: Tensor = self._embedded(x, run.sharded) if self.first else x
        more: Summand = None
        for layer in self.layers.values():
            if self.recompute and torch.is_grad_enabled():
                h = _sum(h, more)  # one tensor to keep
                h, more = checkpoint(layer, h, None, run, use_reentrant=False, preserve_rng_state=False)
            else:
                h, more = layer(h, more, run)
        if not self.last:
            return _sum(h, more)
        if isinstance(more, Owed):  # no product follows
            more = more.value()
        normed = run.add_norm(h, more, self.final_norm, self.spec.norm_eps)[1]
        assert isinstance(normed, Tensor)
        return normed

    def _owes(self, batch: PackedBatch | DecodeBatch) -> bool:
        layer = next(iter(self.layers.values()), None)  # all are alike
        rows = len(batch.positions_T)
        return isinstance(batch, DecodeBatch) and isinstance(layer, Layer) and layer.owes(rows, self.numerics)

    def token_stats(
        self,
        hidden: Tensor,
        rows_N: Tensor,
        targets_N: Tensor,
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> TokenStats:
        """float32 (N,) log-probabilities of `targets_N` after the tokens `rows_N` (of T), from (T/tp, D)."""
        return self.numerics.token_stats(
            hidden, rows_N, self.head_weight, targets_N, self.vocabulary, temperature, entropy
        )

    def values(self, hidden: Tensor) -> Tensor:
        """float32 (T,) outputs of the value head from (T/tp, D)."""
        return gather_outputs(self.numerics.values(hidden, self.head_weight), self.group)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 (N, V here) for hidden states (N, D) that are the same on every tensor rank.

        No padded rows.
        """
        weight = self.head_weight
        return self.numerics.logits(
            hidden, weight[: max(0, self.vocabulary - self.coord.t * weight.shape[0])]
        )

    def _embedded(self, tokens_T: Tensor, sharded: bool) -> Tensor:
        if self.group.size == 1:
            return F.embedding(tokens_T, self.embed)
        local = tokens_T - self.coord.t * self.embed.shape[0]
        inside = (local >= 0) & (local < self.embed.shape[0])
        partial = F.embedding(torch.where(inside, local, 0), self.embed) * inside[:, None]
        return self.group.combine(partial, sharded)


def _sum(x: Tensor, y: Summand) -> Tensor:
    if isinstance(y, Part | Owed):
        return y.add_to(x)
    return x if y is None else x + y
