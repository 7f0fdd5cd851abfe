"""Passes of generation through the stages of a pipeline, one after the other."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from puzzle.engine.generate import Drawn, OneStage, Relay
from puzzle.engine.runtime import ModelRuntime
from puzzle.model.attention import KVCache
from puzzle.model.decoder import Decoder
from puzzle.model.packing import DecodeBatch, PackedBatch
from puzzle.plan.schedule import Channel, Payload


class Pipeline:
    """Hidden states go from stage to stage; what the last stage draws goes to all."""

    def __init__(self, runtime: ModelRuntime) -> None:
        self.world = runtime.world
        self.stages = runtime.runner.ranks
        self.stage = runtime.runner.stage
        self.group = self.world.groups(runtime.placement.groups("pp"), "pp")
        hops = [Channel(s, s + 1, Payload.ACTIVATION) for s in range(len(self.stages) - 1)]
        ends = [(ranks[c.src], ranks[c.dst], c) for c in hops for ranks in runtime.runner.pipelines]
        self.channels = self.world.connect(ends)

    def new_cache(self, decoder: Decoder, rows: int, capacity: int) -> KVCache:
        """A cache of this stage's decoder."""
        return decoder.new_cache(rows, capacity)

    def run(self, decoder: Decoder, batch: PackedBatch | DecodeBatch, cache: KVCache) -> Tensor | None:
        """This stage's part of a pass; the final hidden states on the last stage, None elsewhere."""
        x = batch.tokens_T
        if not decoder.first:
            rows = len(x) // decoder.layout.tp if isinstance(batch, PackedBatch) else len(x)
            x = torch.empty((rows, decoder.spec.hidden_size), dtype=decoder.dtype, device=decoder.device)
            channel = Channel(self.stage - 1, self.stage, Payload.ACTIVATION)
            dist.recv(x, self.stages[self.stage - 1], group=self.channels[channel])
        out = decoder(x, batch, cache)
        if decoder.last:
            return out
        channel = Channel(self.stage, self.stage + 1, Payload.ACTIVATION)
        dist.send(out, self.stages[self.stage + 1], group=self.channels[channel])
        self.world.moved[str(Payload.ACTIVATION)] += out.nbytes
        return None

    def share(self, drawn: Drawn | None, rows: int) -> Drawn:
        """What the last stage drew for `rows` rows, on every stage."""
        device = self.world.device
        tokens, logprobs = drawn or (
            torch.empty(rows, dtype=torch.int64, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
        )
        for part in (tokens, logprobs):
            dist.broadcast(part, self.stages[-1], group=self.group)
            self.world.moved["broadcast"] += part.nbytes
        return tokens, logprobs


def relay_of(runtime: ModelRuntime) -> Relay:
    """How generation passes travel through the runtime's stages."""
    return OneStage() if len(runtime.runner.ranks) == 1 else Pipeline(runtime)
