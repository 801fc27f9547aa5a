"""Links: how pages get from a rank of one replica to a rank of another. Pairs of ranks, one connection each, for one migration.

    the rank that sends                             the rank that receives
    dial(address, hello) ------ TCP --------------> Listener, at the address that its leader tells
                          <---- accepted, as what -
    send(parts) =========== gloo, NCCL or TCP =====> receive(parts)

What carries the bytes is an interface, `Channel`: the TCP connection itself between host memories (`host`), a standalone gloo pair that
the connection has introduced (`gloo`), or NCCL between two GPUs (`nccl`). Whoever cannot open the one that is asked for falls back on
`host`. The connection stays open beside a pair, so that a process that dies, or an end that closes, is noticed at once.

A link's name holds a nonce that only the two leaders know; a stranger's connection is closed. Every wait has a time-out.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed
from torch import Tensor

from .packing import packb, unpackb
from .rendezvous import address_of, own_address
from .strict_wire import pack, unpack

log = logging.getLogger(__name__)

dist: Any = torch.distributed  # its type stubs lack most of what is used here

HOST, GLOO, NCCL = "host", "gloo", "nccl"
DIAL_TIMEOUT_S = 5.0
ARRIVAL_TIMEOUT_S = 10.0  # until the other end has opened its side
TRANSFER_TIMEOUT_S = 20.0  # of one part, without a byte
HELLO_BYTES = 1024
MOST_STRANGERS = 64  # connections whose link nobody has opened here yet
_LENGTH = 4


class LinkBroken(RuntimeError):
    """The other end is gone, silent, or not who it should be."""


class Hello(NamedTuple):
    """What the dialling end says: which link, which pair of ranks, and what is to carry the bytes."""

    link: str
    source: int
    target: int
    kind: str


class Channel(Protocol):
    """One direction between two ranks. Parts are contiguous tensors of one device; both ends name parts of the same sizes, in order.

    Both calls raise LinkBroken when the other end is gone, closes, or is silent for TRANSFER_TIMEOUT_S.
    """

    def send(self, part: Tensor) -> None: ...

    def receive(self, part: Tensor) -> None: ...

    def close(self) -> None:
        """From any thread; whoever waits in the channel gets LinkBroken."""
        ...


class HostChannel:
    """Bytes of host memory over a TCP connection. Parts on a GPU go through host memory."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.settimeout(TRANSFER_TIMEOUT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, part: Tensor) -> None:
        """As `Channel.send`."""
        with _broken("sending"):
            self._connection.sendall(_bytes(part.cpu()))

    def receive(self, part: Tensor) -> None:
        """As `Channel.receive`."""
        landed = part if part.device.type == "cpu" else torch.empty_like(part, device="cpu")
        with _broken("receiving"):
            _read_into(self._connection, _bytes(landed))
        if landed is not part:
            part.copy_(landed)

    def close(self) -> None:
        """As `Channel.close`."""
        _shut(self._connection)


class PairChannel:
    """A process group of two, gloo or NCCL, beside the connection that introduced it.

    Neither has a way to end a wait but its time-out. So both ends wait for each other on the connection, which an end that closes, or dies,
    ends at once, and a part is begun when both are there.

    Args:
        pair: the group.
        rank: in it; 1 sends.
        device: where its tensors have to lie; parts that lie elsewhere are copied.
    """

    def __init__(self, connection: socket.socket, pair: Any, rank: int, device: torch.device) -> None:
        self._connection = connection
        self._pair = pair
        self._rank = rank
        self._device = device
        connection.settimeout(TRANSFER_TIMEOUT_S)

    def send(self, part: Tensor) -> None:
        """As `Channel.send`."""
        with _broken("sending"):
            self._meet()
            self._pair.send([part.to(self._device)], 1 - self._rank, 0).wait()
            _finish(part)

    def receive(self, part: Tensor) -> None:
        """As `Channel.receive`."""
        landed = part if part.device.type == self._device.type else torch.empty_like(part, device=self._device)
        with _broken("receiving"):
            self._meet()
            self._pair.recv([landed], 1 - self._rank, 0).wait()
            _finish(landed)
        if landed is not part:
            part.copy_(landed)

    def close(self) -> None:
        """As `Channel.close`."""
        _shut(self._connection)

    def _meet(self) -> None:
        self._connection.sendall(b"\1")
        _read_into(self._connection, bytearray(1))


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
        with _broken("opening a link"):
            return _answer(connection, hello, self._device)

    def close(self) -> None:
        """Nobody comes any more."""
        _shut(self._listener)

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._greet, args=(connection,), name="page-link-hello", daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        connection.settimeout(DIAL_TIMEOUT_S)
        try:
            hello = unpack(Hello, _read_message(connection))
        except (LinkBroken, OSError, ValueError):
            _shut(connection)
            return
        with self._changed:
            now_s = time.monotonic()
            for key, (stranger, _, since_s) in list(self._arrived.items()):
                if now_s - since_s > ARRIVAL_TIMEOUT_S:
                    _shut(stranger)
                    del self._arrived[key]
            key = (hello.link, hello.source, hello.target)
            if len(self._arrived) >= MOST_STRANGERS or key in self._arrived:
                _shut(connection)
                return
            self._arrived[key] = connection, hello, now_s
            self._changed.notify_all()


def dial(address: str, hello: Hello, device: torch.device) -> Channel:
    """The sending end of a channel to the listener at `address` ("host:port").

    Raises:
        LinkBroken: nobody is there, or nobody expects this link.
    """
    host, port = address.rsplit(":", 1)
    with _broken(f"dialling {address}"):
        connection = socket.create_connection((host, int(port)), DIAL_TIMEOUT_S)
        connection.settimeout(ARRIVAL_TIMEOUT_S)
        _write_message(connection, pack(hello))
        said = unpackb(_read_message(connection))
        if said == HOST:
            return HostChannel(connection)
        if said != hello.kind:
            raise LinkBroken(f"the other end wants {said!r}")
        store_port = unpackb(_read_message(connection))
        pair = _pair(said, host, int(store_port), 1, hello, device)
        _write_message(connection, packb(pair is not None))
        ready = unpackb(_read_message(connection))
        return PairChannel(connection, pair, 1, _home(said, device)) if pair is not None and ready is True else HostChannel(connection)


def kind_of(wanted: str, device: torch.device) -> str:
    """What carries the bytes: as told, else NCCL between GPUs and the connection itself between host memories.

    On a CPU `auto` is the connection itself: it is open as soon as both ends are there, and no slower than a gloo pair over it would be.
    """
    if wanted == "auto":
        return NCCL if device.type == "cuda" else HOST
    return wanted


def _answer(connection: socket.socket, hello: Hello, device: torch.device) -> Channel:
    """The receiving end: opens what the other end wants, or says that it will be the connection itself."""
    connection.settimeout(ARRIVAL_TIMEOUT_S)
    possible = hello.kind == GLOO or (hello.kind == NCCL and device.type == "cuda")
    if not possible:
        _write_message(connection, packb(HOST))
        return HostChannel(connection)
    host = connection.getsockname()[0]
    store = dist.TCPStore(host, 0, None, True, timedelta(seconds=ARRIVAL_TIMEOUT_S), wait_for_workers=False)
    _write_message(connection, packb(hello.kind))
    _write_message(connection, packb(store.port))
    pair = _pair(hello.kind, host, store.port, 0, hello, device, store)
    there = unpackb(_read_message(connection))
    both = pair is not None and there is True
    _write_message(connection, packb(both))
    return PairChannel(connection, pair, 0, _home(hello.kind, device)) if both else HostChannel(connection)


def _pair(kind: str, host: str, port: int, rank: int, hello: Hello, device: torch.device, store: Any = None) -> Any:
    """A process group of the two; None when it cannot be opened."""
    timeout = timedelta(seconds=TRANSFER_TIMEOUT_S)
    try:
        if store is None:
            store = dist.TCPStore(host, port, None, False, timedelta(seconds=ARRIVAL_TIMEOUT_S), wait_for_workers=False)
        named = dist.PrefixStore(hello.link, store)
        if kind == NCCL:
            torch.cuda.set_device(device)
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            return dist.ProcessGroupNCCL(named, rank, 2, options)
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host if rank == 0 else own_address(host, port))]
        options._timeout = timeout
        return dist.ProcessGroupGloo(named, rank, 2, options)
    except RuntimeError as error:
        log.warning("a %s link could not be opened, pages go through host memory: %s", kind, str(error).partition("\n")[0])
        return None


def _home(kind: str, device: torch.device) -> torch.device:
    return device if kind == NCCL else torch.device("cpu")


def _finish(part: Tensor) -> None:
    """`wait` on NCCL's work only orders the stream."""
    if part.device.type == "cuda":
        torch.cuda.current_stream(part.device).synchronize()


def _bytes(part: Tensor) -> memoryview:
    return part.view(-1).view(torch.uint8).numpy().data


def _write_message(connection: socket.socket, message: bytes) -> None:
    connection.sendall(len(message).to_bytes(_LENGTH, "little") + message)


def _read_message(connection: socket.socket) -> bytes:
    head = bytearray(_LENGTH)
    _read_into(connection, head)
    length = int.from_bytes(head, "little")
    if length > HELLO_BYTES:
        raise LinkBroken(f"a message of {length} bytes where at most {HELLO_BYTES} are due")
    message = bytearray(length)
    _read_into(connection, message)
    return bytes(message)


def _read_into(connection: socket.socket, buffer: bytearray | memoryview) -> None:
    view = memoryview(buffer)
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise LinkBroken("the other end has closed")
        view = view[count:]


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


class _Broken(contextlib.AbstractContextManager[None]):
    """Errors of sockets, of messages and of process groups as LinkBroken."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, LinkBroken) and isinstance(error, OSError | RuntimeError | ValueError):
            raise LinkBroken(f"{self._what}: {str(error).partition(chr(10))[0] or repr(error)}") from error


def _broken(what: str) -> _Broken:
    return _Broken(what)
