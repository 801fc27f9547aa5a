"""Where the ranks of a replica meet: the leader's address, known before torch is imported. The ranks may come before the leader is
ready for them; they wait in the listening socket's queue."""

from __future__ import annotations

import socket

LOOPBACK = "127.0.0.1"


def listen(host: str) -> socket.socket:
    """A listening socket on a free port of `host` and on no other address of this machine."""
    listener = socket.socket(_family(host))
    listener.bind((host, 0))
    listener.listen(1024)
    return listener


def address_of(listener: socket.socket) -> str:
    """The listener's "host:port"."""
    host, port = listener.getsockname()[:2]
    return f"{host}:{port}"


def own_address(host: str, port: int) -> str:
    """The address of this machine from which `host` is reached; nothing is sent."""
    with socket.socket(_family(host), socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        address: str = probe.getsockname()[0]
    return address


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
