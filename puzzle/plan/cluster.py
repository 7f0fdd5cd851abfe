"""What a switch plan needs to know about machines: which ranks share a node, and how fast links are."""

from __future__ import annotations

from dataclasses import dataclass

from puzzle.errors import UserError

GB = 1e9


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal size, filled with ranks in order. Rates in GB/s (1e9 bytes) per device and direction,
    `latency` in seconds per round of messages. Plans depend on the rates' ratio alone; the defaults are
    of an order that NVLink and one 400 Gb/s adapter per device have."""

    devices_per_node: int
    intra_gbs: float = 350.0
    inter_gbs: float = 50.0
    latency: float = 0.0

    def __post_init__(self) -> None:
        """Raise UserError for numbers that no machine has."""
        if self.devices_per_node < 1:
            raise UserError(f"cluster: {self.devices_per_node} devices per node; give at least 1")
        if not (self.intra_gbs > 0 and self.inter_gbs > 0 and self.latency >= 0):
            raise UserError("cluster: link rates must be positive and the latency not negative")

    def node_of(self, rank: int) -> int:
        """The node of a global rank."""
        return rank // self.devices_per_node

    def rate(self, a: int, b: int) -> float:
        """Bytes per second between two ranks."""
        return (self.intra_gbs if self.node_of(a) == self.node_of(b) else self.inter_gbs) * GB
