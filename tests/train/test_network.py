from __future__ import annotations

import os

import psutil
import pytest

from vlscale.train import network
from vlscale.train.network import GLOO, choose_interface, interface_of, source_address


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (GLOO, "MASTER_ADDR"):
        monkeypatch.setenv(name, "")  # restored afterwards, whatever the function sets
        monkeypatch.delenv(name)


def test_the_interface_that_holds_an_address() -> None:
    addresses = {"lo": ["127.0.0.1", "::1"], "ib0": ["10.1.0.5"], "eth0": ["192.168.0.5", "fe80::1"]}
    assert interface_of("10.1.0.5", addresses) == "ib0"
    assert interface_of("fe80:0::1", addresses) == "eth0"
    assert interface_of("10.1.0.6", addresses) is None


def test_without_a_master_nothing_is_chosen() -> None:
    assert choose_interface() is None
    assert GLOO not in os.environ


def test_one_host_uses_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert choose_interface() == "lo"
    assert os.environ[GLOO] == "lo"


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv(GLOO, "ib7")
    assert choose_interface() == "ib7"


def test_the_route_decides_and_nccl_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    own = source_address("192.0.2.1")
    if own is None:
        pytest.skip("no default route")
    monkeypatch.setenv("MASTER_ADDR", own)
    name = choose_interface()
    assert name is not None
    assert own in [held.address for held in psutil.net_if_addrs()[name]]
    assert os.environ[GLOO] == name
    assert "NCCL_SOCKET_IFNAME" not in os.environ


def test_an_own_name_that_means_loopback_is_taken_for_the_default_route(monkeypatch: pytest.MonkeyPatch) -> None:
    routes = {"node-a": "127.0.1.1", "192.0.2.1": "10.1.0.5", "localhost": "127.0.0.1", "127.0.1.1": "127.0.1.1"}
    monkeypatch.setattr(network, "_routed", routes.get)
    assert source_address("node-a") == "10.1.0.5"
    assert source_address("localhost") == "127.0.0.1"
    assert source_address("127.0.1.1") == "127.0.1.1"
    assert source_address("nowhere") is None
