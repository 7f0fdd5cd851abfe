import os
import socket

import pytest
from torch.distributed import TCPStore

from puzzle.errors import UserError
from puzzle.launch import network
from tests.launch.running import listening


def test_the_store_listens_on_its_address_alone():
    with socket.socket() as elsewhere:
        elsewhere.bind(("0.0.0.0", 0))
        elsewhere.listen()
        assert "0.0.0.0" in listening([os.getpid()])
    before = listening([os.getpid()])
    store = network.listen("127.0.0.1")
    assert listening([os.getpid()]) == before | {"127.0.0.1"}
    TCPStore("127.0.0.1", store.port, is_master=False).set("key", "value")
    assert store.get("key") == b"value"


def test_one_host_is_loopback():
    assert network.address_towards(["127.0.0.1", "localhost", "127.0.0.3"]) == "127.0.0.1"
    assert network.address_towards([]) == "127.0.0.1"
    assert network.interface_towards("127.0.0.1") == "lo"


def test_another_host_is_reached_from_the_address_of_an_interface_of_ours():
    # 198.51.100.0/24 is for documentation (RFC 5737): nobody's, but routed like any other.
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("198.51.100.1", 9))
            ours = probe.getsockname()[0]
    except OSError:
        pytest.skip("this host has no route to others")
    assert network.address_towards(["127.0.0.1", "198.51.100.1"]) == ours
    name = network.interface_towards("198.51.100.1")
    assert name in {name for _, name in socket.if_nameindex()} - {"lo"}
    assert network.interface_towards(ours) == name


def test_an_unknown_host_is_named():
    with pytest.raises(UserError, match=r"host nowhere\.invalid is unknown here"):
        network.address_towards(["nowhere.invalid"])


def test_interfaces_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch):
    for given, used in (("", "lo"), ("lo", "lo")):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", given)
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker")
        network.choose_interfaces("127.0.0.1")
        assert os.environ["GLOO_SOCKET_IFNAME"] == used
        assert os.environ["NCCL_SOCKET_IFNAME"] == "^docker"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,nosuch0")
    with pytest.raises(UserError, match=r"^GLOO_SOCKET_IFNAME=lo,nosuch0: .* no network interface 'nosuch0'"):
        network.choose_interfaces("127.0.0.1")
