"""Links: how the ranks of one replica reach those of another. Pairs of ranks, one connection each, for one migration.

    the rank that sends                             the rank that receives
    dial(address, hello) ------ TCP --------------> Listener, at the address that its leader tells
                          <---- accepted, as what -
    Channel.send ========== gloo, NCCL or TCP =====> Channel.receive

The dialling end says what is to carry the bytes; where that cannot be opened, it is the connection itself. A link's name holds a nonce
that only the two leaders know; a stranger's connection is closed. Every wait has a time-out.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .packing import packb, unpackb
from .page_channel import GLOO, NCCL, Channel, HostChannel, LinkBroken, broken, pair_over, read_message, shut, write_message
from .rendezvous import address_of
from .strict_wire import pack, unpack

HOST = "host"
DIAL_TIMEOUT_S = 5.0
ARRIVAL_TIMEOUT_S = 10.0  # until the other end has opened its side
MOST_STRANGERS = 64  # connections that have not said yet what they want, and as many whose link nobody has opened here yet
ACCEPT_AGAIN_S = 0.1


class Hello(NamedTuple):
    """What the dialling end says: which link, which pair of ranks, and what is to carry the bytes."""

    link: str
    source: int
    target: int
    kind: str


class Listener:
    """The one place where other replicas reach this rank. Its thread says nothing to a connection until somebody expects it.

    Args:
        listener: from `rendezvous.listen`; belongs to this object from now on.
        device: where pages lie.
    """

    def __init__(self, listener: socket.socket, device: torch.device) -> None:
        self.address = address_of(listener)
        self._listener = listener
        self._device = device
        self._arrived: dict[tuple[str, int, int], tuple[socket.socket, Hello, float]] = {}
        self._changed = threading.Condition()
        self._greetings = threading.Semaphore(MOST_STRANGERS)
        self._closed = False
        threading.Thread(target=self._run, name="page-links", daemon=True).start()

    def accept(self, link: str, source: int, target: int) -> Channel:
        """The channel of this pair of ranks, as soon as the other end has dialled.

        Raises:
            LinkBroken: it did not, within ARRIVAL_TIMEOUT_S.
        """
        key = (link, source, target)
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._arrived, ARRIVAL_TIMEOUT_S):
                raise LinkBroken(f"rank {source} of the other end did not come within {ARRIVAL_TIMEOUT_S:g} s")
            connection, hello, _ = self._arrived.pop(key)
        with broken("opening a link"):
            return _answer(connection, hello, self._device)

    def close(self) -> None:
        """Nobody comes any more."""
        self._closed = True
        shut(self._listener)
        with self._changed:
            self._turn_away(float("inf"))

    def _run(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # it was closed; or nothing is wrong but that connection, or the process has no file descriptor left
                time.sleep(ACCEPT_AGAIN_S)
                continue
            if self._greetings.acquire(blocking=False):
                threading.Thread(target=self._greet, args=(connection,), name="page-link-hello", daemon=True).start()
            else:
                shut(connection)

    def _greet(self, connection: socket.socket) -> None:
        try:
            hello = unpack(Hello, read_message(connection, DIAL_TIMEOUT_S))
        except (LinkBroken, OSError, ValueError):
            shut(connection)
            return
        finally:
            self._greetings.release()
        key = (hello.link, hello.source, hello.target)
        with self._changed:
            now_s = time.monotonic()
            self._turn_away(now_s - ARRIVAL_TIMEOUT_S)
            if self._closed or len(self._arrived) >= MOST_STRANGERS or key in self._arrived:
                shut(connection)
                return
            self._arrived[key] = connection, hello, now_s
            self._changed.notify_all()

    def _turn_away(self, before_s: float) -> None:
        """Whoever has come before that and is still not expected."""
        for key, (stranger, _, since_s) in list(self._arrived.items()):
            if since_s < before_s:
                shut(stranger)
                del self._arrived[key]


def dial(address: str, hello: Hello, device: torch.device) -> Channel:
    """The sending end of a channel to the listener at `address` ("host:port").

    Raises:
        LinkBroken: nobody is there, or nobody expects this link.
    """
    host, port = address.rsplit(":", 1)
    with broken(f"dialling {address}"):
        connection = socket.create_connection((host, int(port)), DIAL_TIMEOUT_S)
        with _shut_unless_opened(connection):
            write_message(connection, pack(hello))
            if _read_answer(connection):
                return pair_over(connection, hello.kind, 1, device)
            return HostChannel(connection)


def kind_of(wanted: str, device: torch.device) -> str:
    """What carries the bytes: as told, else NCCL between GPUs and the connection itself between host memories.

    On a CPU `auto` is the connection itself: it is open as soon as both ends are there, and no slower than a gloo pair over it would be.
    """
    if wanted == "auto":
        return NCCL if device.type == "cuda" else HOST
    return wanted


def _answer(connection: socket.socket, hello: Hello, device: torch.device) -> Channel:
    """The receiving end: opens what the other end wants, or says that it will be the connection itself."""
    with _shut_unless_opened(connection):
        possible = hello.kind == GLOO or (hello.kind == NCCL and device.type == "cuda")
        write_message(connection, packb(possible))
        return pair_over(connection, hello.kind, 0, device) if possible else HostChannel(connection)


def _read_answer(connection: socket.socket) -> bool:
    answer = unpackb(read_message(connection, ARRIVAL_TIMEOUT_S))
    if type(answer) is not bool:
        raise LinkBroken(f"{answer!r:.40} is no answer")
    return answer


@contextlib.contextmanager
def _shut_unless_opened(connection: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shut(connection)
        raise
