"""Whole logical tensors out of a model that lies in pieces on many ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from puzzle.engine.pipeline.model import ModelRuntime
from puzzle.model.weights import boxes
from puzzle.plan.shards import Box, sharers


def whole_tensors(runtime: ModelRuntime) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor on the CPU) in the order of the spec; every rank iterates to the end.

    The owner of a box in the first replica gives it; all others add zeros.
    """
    decoder, coord, layout = runtime.decoder, runtime.coord, runtime.placement.layout
    specs = {tensor.name: tensor for tensor in runtime.spec.tensors()}
    owned: dict[str, list[tuple[Box, Tensor]]] = {}
    for name, box, values in boxes(decoder, decoder.get_parameter):
        if coord.d == 0 and sharers(specs[name], layout, coord)[0] == coord:
            owned.setdefault(name, []).append((box, values))
    for tensor in runtime.spec.tensors():
        whole = torch.zeros(tensor.shape, dtype=decoder.dtype, device=decoder.device)
        for box, values in owned.get(tensor.name, []):
            whole[box.slices] = values
        yield tensor.name, runtime.world.sum(whole).cpu()
