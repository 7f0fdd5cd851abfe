"""AdamW with ZeRO-1: a replica keeps all gradients in fp32, but master weights and moments of its own rows.

A local parameter is cut along storage rows into dp intervals (`plan.shards.zero_rows`), so an optimizer shard
is a list of boxes like everything else. Parameters are grouped into buckets; a bucket's gradient buffer is
(dp, chunk) with every replica's rows side by side, so that one reduce-scatter leaves the own rows' sum, and
one all-gather spreads the stepped rows.
(Rajbhandari et al. 2020, "ZeRO", stage 1.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from puzzle.engine.runtime.tracing import Instant
from puzzle.engine.runtime.world import World
from puzzle.engine.train import norms
from puzzle.engine.train.adamw import AdamWSettings, clipped_step, make_adam
from puzzle.engine.train.grad_buckets import Bucket, Slot, fill_buckets
from puzzle.errors import UserError
from puzzle.model.decoder import Decoder
from puzzle.model.invariant.sums import across
from puzzle.model.linear import send_gradients
from puzzle.model.parallel import TensorGroup, reduce_scatter_flat
from puzzle.plan.layout import Coord, Placement
from puzzle.plan.memory import BUCKET, EXCHANGES
from puzzle.plan.pipeline.actions import Op
from puzzle.plan.shards import LocalParam, sharer_groups, sharers
from puzzle.spec.model import ModelSpec


class ZeroAdamW:
    """Optimizer of one model on one rank. The schedule's optimizer actions are its methods, in this order:

    `begin`, then backward passes (gradients are taken over by hooks), then `do(Op.REDUCE)`, `WAIT_REDUCE`,
    `NORM`, `WAIT_NORM`, `STEP`, `GATHER`, `WAIT_GATHER`.
    """

    def __init__(
        self,
        name: str,
        spec: ModelSpec,
        placement: Placement,
        coord: Coord,
        params: Sequence[tuple[LocalParam, nn.Parameter]],
        world: World,
        settings: AdamWSettings,
        bucket: int = BUCKET,
        exact: bool = False,
    ) -> None:
        """With `exact`, gradients of replicas and of ranks that hold the same boxes, and the squares of their
        norm, are added in an order that layouts of one dp share."""
        self.exact = exact
        self.name, self.spec, self.placement, self.coord = name, spec, placement, coord
        self.world, self.settings = world, settings
        self.dp = placement.layout.dp
        self.group = world.groups(placement.groups("dp"), "dp")
        self.everyone = world.groups([tuple(sorted(placement.ranks))], "model")
        self.steps = 0
        self.norms: list[Tensor] = []  # of gradients before clipping, on the device, until they are taken
        self.passes = 0
        self._exchanging: list[Bucket] = []
        self._norm: tuple[dist.Work | None, norms.Finish] | None = None
        self.unchanged_until: torch.cuda.Event | None = None  # till then a checkpoint reads masters, moments
        self.before_use: Callable[[], None] = lambda: None  # masters and moments may lie elsewhere
        self.defer_gather = False  # after the next step, weights are not gathered before `start_gather`
        self.gather_pending = False  # they are not yet
        self.buckets = fill_buckets(params, self.dp, coord.d, bucket)
        self.slots = [slot for b in self.buckets for slot in b.slots]
        self._home = {id(slot.param): (b, slot) for b in self.buckets for slot in b.slots}
        self.masters = [self._master(slot) for slot in self.slots]
        self.shared = self._shared_rows()
        self.owned = self._owned_rows()
        self.adam = make_adam(self.masters, settings)
        for slot in self.slots:
            send_gradients(slot.param, self._take, self._take_product)

    def _master(self, slot: Slot) -> Tensor:
        """fp32 values of the own rows; the parameter's own memory where that is fp32 already."""
        own = slot.param.detach()[slot.low : slot.high]
        return own if own.dtype == torch.float32 else own.float()

    def _shared_rows(self) -> list[tuple[TensorGroup, list[tuple[int, int, int]]]]:
        """Per set of ranks of the replica that hold the same boxes: (slot, first, last own row)."""
        tensors = {t.name: t for t in self.spec.tensors()}
        rows: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
        for i, slot in enumerate(self.slots):
            for piece in slot.local.clip(slot.low, slot.high):
                same = sharers(tensors[piece.tensor], self.placement.layout, self.coord)
                if len(same) > 1:
                    ranks = tuple(self.placement.rank_of(c) for c in same)
                    rows.setdefault(ranks, []).append((i, piece.start - slot.low, piece.stop - slot.low))
        shared = []
        for ranks in sharer_groups(self.spec, self.placement):
            group = self.world.groups([ranks], "sharers")
            if group is not None and ranks in rows:
                # A tied embedding and its head are different slots: order by what both stages agree on.
                ordered = sorted(rows[ranks], key=lambda r: _order(self.slots[r[0]], r))
                shared.append((TensorGroup(group, ranks), ordered))
        return shared

    def _owned_rows(self) -> list[tuple[int, int, int]]:
        """(slot, first, last row) of the own shard that this rank counts in norms, padding left out."""
        tensors = {t.name: t for t in self.spec.tensors()}
        owned: list[tuple[int, int, int]] = []
        for i, slot in enumerate(self.slots):
            for piece in slot.local.clip(slot.low, slot.high):
                if sharers(tensors[piece.tensor], self.placement.layout, self.coord)[0] != self.coord:
                    continue
                first, last = piece.start - slot.low, piece.stop - slot.low
                if owned and owned[-1][0] == i and owned[-1][2] == first:
                    first = owned.pop()[1]
                owned.append((i, first, last))
        return owned

    def begin(self, passes: int) -> None:
        """Prepare gradient buffers for `passes` backward passes, of which the first overwrites them."""
        self.passes = passes
        for bucket in self.buckets:
            bucket.hits = 0
            if bucket.grads is None:
                device = bucket.slots[0].param.device
                # What lies between slots is summed with the rest, but nobody reads it.
                bucket.grads = torch.zeros((self.dp, bucket.chunk), dtype=torch.float32, device=device)
            for slot in bucket.slots:
                slot.empty = True

    def _take(self, param: nn.Parameter) -> None:
        """Move a fresh gradient into its bucket."""
        if param.grad is None:
            return  # its sink has taken it
        bucket, slot = self._home[id(param)]
        grad, param.grad = param.grad, None
        bucket.add(slot, grad)
        self._reduce_if_full(bucket)

    def _take_product(self, param: nn.Parameter, left: Tensor, right: Tensor) -> None:
        """A matrix's gradient left @ right, added up by the product itself."""
        bucket, slot = self._home[id(param)]
        bucket.add_product(slot, left, right)
        self._reduce_if_full(bucket)

    def _reduce_if_full(self, bucket: Bucket) -> None:
        """The last gradient of the last pass starts the bucket's reduction."""
        if bucket.hits == self.passes * len(bucket.slots):
            self._start_reduce(bucket)

    def _start_reduce(self, bucket: Bucket) -> None:
        assert bucket.grads is not None
        if self.group is None:
            bucket.shard = bucket.grads[0]
            return
        if self.exact:
            self._settle(EXCHANGES - 1)
            bucket.exchange(self.group)
            self._exchanging.append(bucket)
        else:
            if bucket.grads.is_cuda:  # NCCL reduces in place
                bucket.shard = bucket.grads[dist.get_rank(self.group)]
            elif bucket.shard is None:
                bucket.shard = torch.empty_like(bucket.grads[0])
            bucket.work = reduce_scatter_flat(
                bucket.shard, bucket.grads.view(-1), group=self.group, async_op=True
            )
        bucket.began = self._now()
        self.world.moved["reduce_scatter"] += bucket.grads.nbytes

    def _settle(self, most: int) -> None:
        """Add up what the first exchanges brought until `most` are under way."""
        while len(self._exchanging) > most:
            bucket = self._exchanging.pop(0)
            self._reduced(bucket)
            assert self.group is not None
            bucket.add_exchanged(self.group, self.placement.dp_group(self.coord))

    def _reduced(self, bucket: Bucket) -> None:
        if bucket.work is not None:
            self._await(bucket.work, "reduce-scatter of gradients", self.group)
            bucket.work = None
            self._note(bucket, "reduce-scatter")

    def do(self, op: Op) -> None:
        """Run one optimizer action of a schedule; torch's profiler calls it "optimizer norm" or the like."""
        with record_function(f"optimizer {op}"):
            {
                Op.REDUCE: self._check_reduced,
                Op.WAIT_REDUCE: self._wait_reduce,
                Op.NORM: self._start_norm,
                Op.WAIT_NORM: self._wait_norm,
                Op.STEP: self._step,
                Op.GATHER: self._start_gather,
                Op.WAIT_GATHER: self._let_arrive,
            }[op]()

    def _check_reduced(self) -> None:
        """The hooks start every reduction with the last backward, unless a schedule lost one."""
        for bucket in self.buckets:
            wanted = self.passes * len(bucket.slots)
            assert bucket.hits == wanted, f"{self.name}: {bucket.hits} gradients of {wanted} arrived"

    def _wait_reduce(self) -> None:
        self._settle(0)
        for bucket in self.buckets:
            self._reduced(bucket)
        for group, rows in self.shared:
            parts = [self._grad(i)[first:last] for i, first, last in rows]
            flat = torch.cat([part.reshape(-1) for part in parts])
            # An all-reduce of three or more adds in an order of its own at each place of the message.
            flat = across(flat, group, sharded=False) if self.exact else group.all_reduce(flat)
            self.world.moved["all_reduce"] += flat.nbytes
            for part, summed in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
                part.copy_(summed.view_as(part))

    def _now(self) -> Instant | None:
        return None if self.world.clock is None else self.world.clock.now()

    def _note(self, bucket: Bucket, what: str) -> None:
        """Time a bucket's collective from its start to the end of the wait for it."""
        if self.world.clock is not None and bucket.began is not None:
            index = self.buckets.index(bucket)
            self.world.clock.note(f"bucket {index}", f"{what} {self.name} {index}", self.name, bucket.began)
        bucket.began = None

    def _grad(self, i: int) -> Tensor:
        """The reduced gradient of slot i's own rows, in the shape of those rows."""
        slot = self.slots[i]
        shard = self._home[id(slot.param)][0].shard
        assert shard is not None
        rows = slot.high - slot.low
        return shard[slot.offset : slot.offset + rows * slot.local.row_size].view(rows, *slot.local.shape[1:])

    def _start_norm(self) -> None:
        parts = [self._grad(i)[first:last] for i, first, last in self.owned]
        start = norms.start_exact if self.exact else norms.start
        self._norm = start(parts, self.world.device, self.everyone)

    def _wait_norm(self) -> None:
        assert self._norm is not None
        work, finish = self._norm
        if work is not None:
            self._await(work, "all-reduce of the gradients' norm", self.everyone)
        self._norm = None
        self.norms.append(finish().sqrt())

    def pop_grad_norms(self) -> list[float]:
        """The gradients' norms before clipping in all steps since the last call; waits for the device.

        UserError if one is not finite: that step has changed nothing (apex's has: it cannot leave out).
        """
        norms = torch.stack(self.norms).tolist() if self.norms else []
        self.norms.clear()
        for step, norm in enumerate(norms, self.steps - len(norms)):
            if not math.isfinite(norm):
                raise UserError(
                    f"{self.name}: the gradient norm is {norm} at optimizer step {step}; "
                    "look at the loss, lower the learning rate, or resume from an earlier checkpoint"
                )
        return norms

    def _step(self) -> None:
        self.before_use()
        if self.unchanged_until is not None:
            torch.cuda.current_stream(self.world.device).wait_event(self.unchanged_until)
            self.unchanged_until = None
        grads = [self._grad(i) for i in range(len(self.slots))]
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = grad
        for group in self.adam.param_groups:
            group["lr"] = self.settings.lr_at(self.steps)
        with torch.no_grad():
            clipped_step(self.adam, grads, self.norms[-1], self.settings)
        for master in self.masters:
            master.grad = None
        self.steps += 1

    def _start_gather(self) -> None:
        """Put the stepped rows in place and, unless that is to wait, spread them."""
        self.gather_pending = self.defer_gather and self.group is not None
        masters = dict(zip(map(id, self.slots), self.masters, strict=True))
        for bucket in reversed(self.buckets):  # the first layers are needed first
            with torch.no_grad():
                for slot in bucket.slots:
                    own = slot.param[slot.low : slot.high]
                    if own.dtype != torch.float32:
                        own.copy_(masters[id(slot)])
            if not self.gather_pending:
                self._gather(bucket)

    def start_gather(self) -> None:
        """Start to gather the replicas' stepped rows, if that waits; all ranks of the model together."""
        if self.gather_pending:
            self.gather_pending = False
            for bucket in reversed(self.buckets):
                self._gather(bucket)

    def _gather(self, bucket: Bucket) -> None:
        if self.group is not None:
            self.world.moved["all_gather"] += bucket.gather(self.group)
            bucket.began = self._now()

    def _let_arrive(self) -> None:
        """Weights are waited for where they are read next: by layer in a pass, together everywhere else."""

    def arrive_before(self, decoder: Decoder) -> None:
        """Have every pass of `decoder` wait for the weights of a layer when the layer comes.

        The embedding's are awaited before a pass, those of the last norm and the head behind the layers.
        """
        if self.group is None:
            return

        def needed(params: Iterable[nn.Parameter]) -> list[Bucket]:
            homes = {id(p) for p in params}
            return [b for b in self.buckets if any(id(slot.param) in homes for slot in b.slots)]

        layers = list(decoder.layers.values())
        first = needed([decoder.embed]) if decoder.first else []

        def begin(*_: object) -> None:
            assert not self.gather_pending, f"{self.name}: a pass before `start_gather`"
            self._arrive(first if layers else self.buckets)

        decoder.register_forward_pre_hook(begin)
        for layer in layers:
            own = needed(layer.parameters())
            layer.register_forward_pre_hook(lambda *_, own=own: self._arrive(own))
        if layers:
            layers[-1].register_forward_hook(lambda *_: self.wait_gather())

    def wait_gather(self) -> None:
        """Put the other replicas' rows in place; if they are, nothing."""
        self.start_gather()
        self._arrive(self.buckets)

    def _await(self, work: dist.Work, what: str, group: dist.ProcessGroup | None) -> None:
        assert group is not None
        ranks = ", ".join(map(str, dist.get_process_group_ranks(group)))
        with self.world.progress.waiting(f"{what} of {self.name} over ranks {ranks}"):
            work.wait()

    def _arrive(self, needed: Sequence[Bucket]) -> None:
        for bucket in reversed(needed):
            if bucket.gathered is None or bucket.work is None:
                continue
            self._await(bucket.work, "all-gather of weights", self.group)
            self._note(bucket, "all-gather")
            bucket.place(self.coord.d)

    def release(self) -> None:
        """Give the gradient buffers back; the next `begin` takes them again. Awaits a gather under way."""
        self._arrive(self.buckets)
        for bucket in self.buckets:
            bucket.grads = bucket.shard = None

    def moments(self, i: int) -> tuple[Tensor, Tensor]:
        """fp32 exp_avg and exp_avg_sq of slot i's own rows; zeros before the first step."""
        self.before_use()
        master = self.masters[i]
        if not master.numel():  # of few rows, not every replica has one
            return master, master
        state = self.adam.state[master]
        if "exp_avg" not in state:
            state |= {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        return state["exp_avg"], state["exp_avg_sq"]

    def state_tensors(self) -> list[Tensor]:
        """Masters that are not the weights' own memory, and the moments that exist."""
        masters = [m for m, slot in zip(self.masters, self.slots, strict=True) if m.dtype != slot.param.dtype]
        moments = [state[name] for state in self.adam.state.values() for name in ("exp_avg", "exp_avg_sq")]
        return masters + moments

    def set_steps(self, steps: int) -> None:
        """Go on as after `steps` steps; the moments are the caller's to fill."""
        self.steps = steps
        for i, master in enumerate(self.masters):
            self.moments(i)
            if master.numel():
                self.adam.state[master]["step"].fill_(steps)
        for group in self.adam.param_groups:
            if "step" in group:  # apex counts per group
                group["step"] = steps

    def gradients(self) -> Mapping[str, Tensor]:
        """Reduced fp32 gradients of the own rows by storage name."""
        return {slot.local.name: self._grad(i) for i, slot in enumerate(self.slots)}


def _order(slot: Slot, row: tuple[int, int, int]) -> tuple[str, int]:
    piece = slot.local.clip(slot.low + row[1], slot.low + row[2])[0]
    return piece.tensor, row[1]
