"""Storages of a stage filled from, and read back as, boxes of logical tensors; random weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from puzzle.model.decoder import Decoder
from puzzle.plan.shards import Box
from puzzle.spec.tensors import TensorSpec

INIT_STD = 0.02
"""Standard deviation of random matrices, as Hugging Face models have it (`initializer_range`)."""


class Sliceable(Protocol):
    """A logical tensor, or something that reads boxes of one."""

    def __getitem__(self, slices: tuple[slice, ...], /) -> Tensor:
        """The box cut out by one slice per dimension."""
        ...


@torch.no_grad()
def fill(
    decoder: Decoder,
    source: Callable[[str], Sliceable],
    tick: Callable[[], None] = lambda: None,
    *,
    frozen: bool = True,
) -> None:
    """Copy every box of the stage from the logical tensors that `source` opens by name, converting the dtype.

    `source` is called once per name and storage, `tick` after every storage. Without `frozen`, only what is
    trained is read.
    """
    for storage in decoder.storages:
        if not (storage.trained or frozen):
            continue
        weight = decoder.get_parameter(storage.name)
        opened = {name: source(name) for name in dict.fromkeys(piece.tensor for piece in storage.pieces)}
        for piece in storage.pieces:
            box = opened[piece.tensor][piece.box.slices]
            weight[piece.start : piece.stop].copy_(box.t() if storage.transposed else box)
        tick()


def boxes(decoder: Decoder, values: Callable[[str], Tensor]) -> Iterator[tuple[str, Box, Tensor]]:
    """(logical name, box, view of its values) of every piece.

    `values` gives a storage-shaped tensor by name.
    """
    for storage in decoder.storages:
        rows = values(storage.name).detach()
        for piece in storage.pieces:
            box = rows[piece.start : piece.stop]
            yield piece.tensor, piece.box, box.t() if storage.transposed else box


def random_tensor(tensor: TensorSpec, seed: int, device: torch.device) -> Tensor:
    """float32 initial weights, a function of (seed, name) and the device's type: norms one, biases zero.

    Of adapters, B is zero and A as Kaiming et al.'s uniform numbers with a = sqrt(5), as the package peft
    draws it: within 1 / sqrt(inputs).
    """
    if len(tensor.shape) == 1 or tensor.adapter == "B":
        value = 0.0 if tensor.adapter == "B" or tensor.name.endswith(".bias") else 1.0
        return torch.full(tensor.shape, value, device=device)
    digest = hashlib.sha256(f"{seed}/{tensor.name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    made = torch.empty(tensor.shape, device=device)
    if tensor.adapter == "A":
        bound = tensor.shape[1] ** -0.5
        return made.uniform_(-bound, bound, generator=generator)
    return made.normal_(0.0, INIT_STD, generator=generator)


def initialise(decoder: Decoder, seed: int, tick: Callable[[], None] = lambda: None) -> None:
    """Random weights, equal in every layout on one type of device; `tick` as in `fill`."""
    tensors = {tensor.name: tensor for tensor in decoder.spec.tensors()}
    fill(decoder, lambda name: random_tensor(tensors[name], seed, decoder.device), tick)
