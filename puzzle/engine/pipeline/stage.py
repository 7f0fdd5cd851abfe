"""One model's share of a schedule on this rank: micro-batches through the decoder's stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from puzzle.model.decoder import Decoder
from puzzle.model.packing import PackedBatch
from puzzle.plan.pipeline.actions import Action, Op

OutputFn = Callable[[int, Tensor], Tensor]
"""(micro-batch, final hidden states (T/tp, D)) -> 0-d loss when training, any output otherwise."""


class Gradients(Protocol):
    """Takes the gradients of backward passes over; `ZeroAdamW` is one."""

    def begin(self, passes: int) -> None:
        """Be ready for `passes` backward passes."""
        ...

    def do(self, op: Op) -> None:
        """Start, or wait for, a part of the optimizer step."""
        ...


class StageRun:
    """Forwards, and if `optimizer` is given backwards, of `batches` through one stage.

    On the last stage `output_fn` turns final hidden states into a loss or an output, kept in `results`.
    """

    def __init__(
        self,
        decoder: Decoder,
        batches: Sequence[PackedBatch],
        output_fn: OutputFn,
        optimizer: Gradients | None = None,
    ) -> None:
        self.decoder, self.batches, self.output_fn, self.optimizer = decoder, batches, output_fn, optimizer
        self.results: list[Tensor | None] = [None] * len(batches)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._products: dict[int, list[Callable[[], None]]] = {}
        if optimizer is not None:
            optimizer.begin(len(batches))

    def buffer(self, action: Action) -> Tensor:
        """Hidden states or their gradients: (T/tp, D) in the decoder's dtype."""
        rows = self.batches[action.microbatch].total // self.decoder.layout.tp
        shape = (rows, self.decoder.spec.hidden_size)
        return torch.empty(shape, dtype=self.decoder.dtype, device=self.decoder.device)

    def compute(self, action: Action, received: Tensor | None) -> Sequence[Tensor]:
        """One pass of one micro-batch; what the neighbouring stage needs of it."""
        index, out = action.microbatch, None
        if action.op is Op.FORWARD:
            out = self._forward(index, received)
        elif action.op is Op.BACKWARD:
            out = self._backward(index, received)
        elif action.op is Op.BACKWARD_INPUT:
            with self.decoder.later.deferring() as self._products[index]:
                out = self._backward(index, received)
        else:
            with torch.no_grad():
                for add in self._products.pop(index):
                    add()
        return () if out is None else (out,)

    def _forward(self, index: int, received: Tensor | None) -> Tensor | None:
        batch = self.batches[index]
        train = self.optimizer is not None
        x = batch.tokens_T if received is None else received.requires_grad_(train)
        with torch.set_grad_enabled(train):
            out = self.decoder(x, batch)
            if self.decoder.last:
                out = self.output_fn(index, out)
                self.results[index] = out.detach()
        if train:
            self._kept[index] = (x, out)
        return None if self.decoder.last else out.detach()

    def _backward(self, index: int, received: Tensor | None) -> Tensor | None:
        x, out = self._kept.pop(index)
        torch.autograd.backward(out, received)
        return None if self.decoder.first else x.grad

    def optimize(self, op: Op) -> None:
        """Hand an optimizer action on."""
        assert self.optimizer is not None, "an optimizer action for a model that is not trained"
        self.optimizer.do(op)
