"""What a machine and an engine do per second: the constants of the cost model."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Rates:
    """Constants, all positive. Rates are per device; seconds of the host are what issuing work takes it."""

    products: float
    """FLOP/s of matrix products, as reached in micro-batches."""
    memory: float
    """Bytes/s of device memory in elementwise passes, and where a decode pass reads weights and caches."""
    layer_host: float
    """Host seconds to issue one layer of a pass."""
    pass_host: float
    """Host seconds of a pass beside its layers: messages, bookkeeping, in a decode pass sampling."""
    collective_host: float
    """Host seconds of both tensor-parallel collectives of a layer."""
    train_host: float
    """Host seconds for which the last stage works on a micro-batch's loss, the device idle."""
    bus: float
    """Bytes/s of an all-reduce, as NCCL counts bus bandwidth."""
    small: float
    """Seconds of an all-reduce of next to nothing."""
    message: float
    """Bytes/s of a message between stages."""
    hop: float
    """Seconds of a message of a decode pass beside its bytes, both hosts taken in."""
    floor: float
    """Device seconds of a decode layer beside what it reads: its kernels, each of some microseconds."""
    kv_reads: float
    """How often a decode pass goes over its KV cache."""
    step_bytes: float
    """Bytes that an optimizer step moves per parameter of a rank."""

    def __post_init__(self) -> None:
        """Raise ValueError for numbers that are not positive."""
        for name, value in self.values().items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")

    def values(self) -> dict[str, float]:
        """By name."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def all_reduce(self, ranks: int, nbytes: float) -> float:
        """Seconds; a ring moves 2 (n - 1) / n of the bytes per rank."""
        return 0.0 if ranks == 1 else self.small + 2 * (ranks - 1) / ranks * nbytes / self.bus


NAMES = tuple(one.name for one in fields(Rates))
