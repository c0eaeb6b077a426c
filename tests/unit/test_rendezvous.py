"""Where ranks meet and where gloo listens."""

import socket
from types import SimpleNamespace

import pytest

from pilaf_ray.engines import rendezvous


def test_a_known_address_is_given_on_with_a_free_port() -> None:
    host, port = rendezvous.free_address("198.51.100.7")
    assert host == "198.51.100.7"
    with socket.socket() as probe:
        probe.bind(("", port))


def test_gloo_listens_on_the_interface_of_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = {"lo": ["127.0.0.1"], "eth1": ["fe80::1", "198.51.100.7"]}
    found = {name: [SimpleNamespace(address=a) for a in given] for name, given in addresses.items()}
    monkeypatch.setattr(rendezvous.psutil, "net_if_addrs", lambda: found)
    environment: dict[str, str] = {}
    monkeypatch.setattr(rendezvous.os, "environ", environment)
    rendezvous.listen_at("203.0.113.9")
    assert environment == {}
    rendezvous.listen_at("198.51.100.7")
    assert environment == {rendezvous.GLOO_INTERFACE: "eth1"}
    rendezvous.listen_at("127.0.0.1")
    assert environment == {rendezvous.GLOO_INTERFACE: "eth1"}, "a choice that is made stays"
