"""Which process of a run this is, as torchrun's variables say; whoever started it, they are checked here."""

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

from puzzle.errors import UserError

RESOLVE_SECONDS = 5.0
"""How long a rank asks again for an address: its name may appear when the first rank's host does."""
_REMEDY = "unset them, or start by torchrun"


@dataclass(frozen=True)
class Identity:
    """Rank among `world` processes, `local_rank` among the `per_node` of this host."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    per_node: int = 1


def launched(environment: Mapping[str, str] = os.environ) -> Identity | None:
    """What a launcher said of this process; None when none did. Empty variables count as unset.

    Variables beside RANK and WORLD_SIZE mean nothing without them: profiles and schedulers leave some behind.
    Raises UserError for what no launcher of several processes would set.
    """
    rank, world = (_count(environment, name) for name in ("RANK", "WORLD_SIZE"))
    if rank is None and world is None:
        return None
    if rank is None or world is None:
        there, absent = ("RANK", "WORLD_SIZE") if world is None else ("WORLD_SIZE", "RANK")
        raise UserError(f"{there}={environment[there]} is set but {absent} is not: {_REMEDY}")
    if not rank < world:
        raise UserError(f"RANK={rank} and WORLD_SIZE={world} do not fit each other: {_REMEDY}")
    local, per_node = _count(environment, "LOCAL_RANK"), _count(environment, "LOCAL_WORLD_SIZE")
    if world > 1:
        _check_meeting(environment)
    per_node = world if per_node is None else per_node
    local = rank % max(1, per_node) if local is None else local
    if world > 1 and not local < per_node <= world:
        raise UserError(
            f"LOCAL_RANK={local}, LOCAL_WORLD_SIZE={per_node} and WORLD_SIZE={world} do not fit: {_REMEDY}"
        )
    return Identity(rank, world, local, per_node) if world > 1 else Identity()


def check_address(rank: int, environment: Mapping[str, str] = os.environ) -> None:
    """UserError unless MASTER_ADDR is an address or the name of one; torch would ask for minutes."""
    address, until = environment["MASTER_ADDR"].strip(), time.monotonic() + RESOLVE_SECONDS
    while True:
        try:
            socket.getaddrinfo(address, None)
        except (OSError, UnicodeError) as error:
            if rank == 0 or isinstance(error, UnicodeError) or time.monotonic() > until:
                why = "is no name of a host" if isinstance(error, UnicodeError) else f"{error.strerror}"
                raise UserError(
                    f"MASTER_ADDR={address}: {why}; give the first rank's host, or {_REMEDY}"
                ) from None
            time.sleep(0.2)
        else:
            return


def _check_meeting(environment: Mapping[str, str]) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name, "").strip():
            raise UserError(f"RANK and WORLD_SIZE are set but {name} is not: {_REMEDY}")
    port = _count(environment, "MASTER_PORT")
    if port is None or not 0 < port < 1 << 16:
        raise UserError(f"MASTER_PORT={environment['MASTER_PORT']}: expected a port, 1 to 65535: {_REMEDY}")


def _count(environment: Mapping[str, str], name: str) -> int | None:
    """A whole number >= 0, small enough for a rank; None where the variable is unset or empty."""
    text = environment.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        shown = text if len(text) <= 40 else text[:37] + "..."
        raise UserError(f"{name}={shown}: expected a whole number, 0 or more: {_REMEDY}")
    return int(text)
