"""Addresses: where the processes of a run meet, and which interface of this host leads there.

On one host that is loopback and nothing listens elsewhere. IPv4, as the nodes of clusters have.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from puzzle.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

LOOPBACK = "127.0.0.1"
GLOO = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915  # <linux/sockios.h>: the address of an interface


def listen(address: str) -> TCPStore:
    """The store in which a run's processes meet, on a free port of this host's `address` and of no other."""
    from torch.distributed import TCPStore

    with socket.socket() as server:
        server.bind((address, 0))
        server.listen(socket.SOMAXCONN)
        port = server.getsockname()[1]
        return TCPStore(
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach()
        )


def address_towards(hosts: Sequence[str]) -> str:
    """This host's address as all `hosts` (names or addresses) reach it; loopback if all are this one."""
    for host in hosts:
        address = _resolved(host)
        if not _is_ours(address):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((address, 9))  # chooses a route, sends nothing
                return probe.getsockname()[0]
    return LOOPBACK


def interface_towards(address: str) -> str:
    """The name of this host's network interface that leads to `address`."""
    ours = address if _is_ours(address) else address_towards([address])
    if ours.startswith("127."):
        return "lo"
    for _, name in socket.if_nameindex():
        if _address_of(name) == ours:
            return name
    raise UserError(f"no network interface of {socket.gethostname()} has the address {ours}")


def choose_interfaces(address: str) -> None:
    """Have gloo and NCCL use the interface that leads to `address`, where their variables name none.

    Raises UserError for one that this host does not have; NCCL, which reads patterns, checks its own.
    """
    for variable in (GLOO, "NCCL_SOCKET_IFNAME"):
        if not os.environ.get(variable):
            os.environ[variable] = interface_towards(address)
    there = [name for _, name in socket.if_nameindex()]
    if absent := [name for name in os.environ[GLOO].split(",") if name not in there]:
        raise UserError(
            f"{GLOO}={os.environ[GLOO]}: {socket.gethostname()} has no network interface {absent[0]!r};"
            f" unset it, or name one of {', '.join(there)}"
        )


def _resolved(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise UserError(f"the address of host {host} is unknown here: {error}") from None


def _is_ours(address: str) -> bool:
    with socket.socket() as trial:
        try:
            trial.bind((address, 0))
        except OSError:
            return False
    return True


def _address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None  # it has no IPv4 address
    return socket.inet_ntoa(answer[20:24])
