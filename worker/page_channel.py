"""What carries the bytes of pages between a rank of one replica and a rank of another: one connection, or a process group beside it.

    HostChannel   the TCP connection itself, between host memories
    PairChannel   a standalone gloo pair, or NCCL between two GPUs; the connection has introduced its ends, and stays

Every wait has a time-out. Whoever dies or closes ends the other's wait on the connection at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from .packing import packb, unpackb

log = logging.getLogger(__name__)

dist: Any = torch.distributed  # its type stubs lack most of what is used here

GLOO, NCCL = "gloo", "nccl"
MEET_TIMEOUT = timedelta(seconds=5)  # of the two ends of a pair
MESSAGE_BYTES = 1024
CONTENT = "content/"  # the last key that an end sets
_LENGTH = 4
TRANSFER_TIMEOUT_S = 20.0  # of one part, without a byte


class LinkBroken(RuntimeError):
    """The other end is gone, silent, or not who it should be."""


class Channel(Protocol):
    """One direction between two ranks. Parts are contiguous tensors of one device; both ends name parts of the same sizes, in order.

    Both calls raise LinkBroken when the other end is gone, closes, or is silent for TRANSFER_TIMEOUT_S.
    """

    def send(self, part: Tensor) -> None: ...

    def receive(self, part: Tensor) -> None: ...

    def stop(self) -> None:
        """From any thread: whoever waits in the channel, at either end, gets LinkBroken."""
        ...

    def close(self) -> None:
        """By the thread that uses it, when it is done."""
        ...


class HostChannel:
    """Bytes of host memory over a TCP connection. Parts on a GPU go through host memory."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.settimeout(TRANSFER_TIMEOUT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, part: Tensor) -> None:
        """As `Channel.send`."""
        with broken("sending"):
            self._connection.sendall(_bytes(part.cpu()))

    def receive(self, part: Tensor) -> None:
        """As `Channel.receive`."""
        landed = part if part.device.type == "cpu" else torch.empty_like(part, device="cpu")
        with broken("receiving"):
            read_into(self._connection, _bytes(landed))
        if landed is not part:
            part.copy_(landed)

    def stop(self) -> None:
        """As `Channel.stop`."""
        stop(self._connection)

    def close(self) -> None:
        """As `Channel.close`."""
        shut(self._connection)


class PairChannel:
    """A process group of two, gloo or NCCL, beside the connection that introduced it.

    Neither has a way to end a wait but its time-out. So both ends wait for each other on the connection, which an end that stops, or dies,
    ends at once, and a part is begun when both are there.

    Args:
        meeting: has to live as long as the pair.
        pair: the group.
        rank: in it; 1 sends.
        device: where its tensors have to lie; parts that lie elsewhere are copied.
    """

    def __init__(self, connection: socket.socket, meeting: Meeting, pair: Any, rank: int, device: torch.device) -> None:
        self._connection = connection
        self._meeting = meeting
        self._pair = pair
        self._rank = rank
        self._device = device
        connection.settimeout(TRANSFER_TIMEOUT_S)

    def send(self, part: Tensor) -> None:
        """As `Channel.send`."""
        with broken("sending"):
            self._meet()
            self._pair.send([part.to(self._device)], 1 - self._rank, 0).wait()
            _finish(part)

    def receive(self, part: Tensor) -> None:
        """As `Channel.receive`."""
        landed = part if part.device.type == self._device.type else torch.empty_like(part, device=self._device)
        with broken("receiving"):
            self._meet()
            self._pair.recv([landed], 1 - self._rank, 0).wait()
            _finish(landed)
        if landed is not part:
            part.copy_(landed)

    def stop(self) -> None:
        """As `Channel.stop`."""
        stop(self._connection)

    def close(self) -> None:
        """As `Channel.close`."""
        shut(self._connection)
        self._pair.abort()
        self._pair = None

    def _meet(self) -> None:
        self._connection.sendall(b"\1")
        read_into(self._connection, bytearray(1))


class Meeting(dist.Store):  # type: ignore[misc]
    """Where the two ends of a pair find each other: what one of them sets, both have. It lives on their connection, so that nobody else
    listens or can join in, and no names are looked up, as torch's own stores do."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self._connection = connection
        self._known: dict[str, bytes] = {}
        self._over = False

    def set(self, key: str, value: bytes | str) -> None:
        """Tell the other end. Nothing is told when the meeting is over."""
        self._known[key] = value.encode() if isinstance(value, str) else value
        if not self._over:
            write_message(self._connection, packb((key, self._known[key])))

    def get(self, key: str) -> bytes:
        """What either has set."""
        self.wait([key])
        return self._known[key]

    def wait(self, keys: list[str], timeout: timedelta = MEET_TIMEOUT) -> None:
        """Until all of them have been set. Raises: LinkBroken, OSError."""
        until_s = time.monotonic() + timeout.total_seconds()
        while not self.check(keys):
            said = unpackb(read_message(self._connection, until_s - time.monotonic()))
            if type(said) is not tuple or list(map(type, said)) != [str, bytes] or self._over:
                raise LinkBroken(f"{said!r:.40} is nothing that a pair is opened with")
            self._known[said[0]] = said[1]
            if said[0].startswith(CONTENT) and not self.check(keys):
                raise LinkBroken("the other end has not opened its side")

    def check(self, keys: list[str]) -> bool:
        """Whether all of them have been set."""
        return all(key in self._known for key in keys)

    def agree(self, rank: int, mine: bool) -> bool:
        """Whether both ends are content. After this the connection carries other things."""
        self.set(f"{CONTENT}{rank}", b"\1" if mine else b"")
        both = bool(self.get(f"{CONTENT}{1 - rank}")) and mine
        self._over = True
        return both


def pair_over(connection: socket.socket, kind: str, rank: int, device: torch.device) -> Channel:
    """A process group of the two ends of `connection`, or the connection itself, where they cannot open one.

    Args:
        kind: GLOO or NCCL.
        rank: 1 at the end that sends.
        device: where pages lie.
    """
    meeting, pair = Meeting(connection), None
    try:
        pair = _gloo(meeting, rank, connection.getsockname()[0]) if kind == GLOO else _nccl(meeting, rank, device)
    except RuntimeError as error:
        log.warning("a %s link could not be opened, pages go through host memory: %s", kind, str(error).partition("\n")[0])
    if meeting.agree(rank, pair is not None):
        return PairChannel(connection, meeting, pair, rank, device if kind == NCCL else torch.device("cpu"))
    return HostChannel(connection)


def _gloo(store: Any, rank: int, host: str) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = MEET_TIMEOUT
    pair = dist.ProcessGroupGloo(store, rank, 2, options)
    pair._set_default_timeout(timedelta(seconds=TRANSFER_TIMEOUT_S))
    return pair


def _nccl(store: Any, rank: int, device: torch.device) -> Any:
    """`wait` on this group's work blocks, and raises when it fails or takes too long. Otherwise a thread of torch's would end the process
    then, which a dead peer is no reason for. The communicator is made by the first send: so it is tried here whether it can be."""
    index = device.index or 0
    torch.cuda.set_device(index)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=TRANSFER_TIMEOUT_S)
    with _blocking_wait():
        pair = dist.ProcessGroupNCCL(store, rank, 2, options)
    with torch.cuda.stream(torch.cuda.Stream(index)):  # type: ignore[no-untyped-call]
        nothing = torch.zeros(1, device=f"cuda:{index}")
        (pair.send if rank else pair.recv)([nothing], 1 - rank, 0).wait()  # makes its stream wait, too, which must not be that of the steps
    return pair


_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def _blocking_wait() -> Iterator[None]:
    """Groups that are made inside of it have waits that block. It has to be told to torch in this way, and must not hold for others."""
    with _one_at_a_time:
        os.putenv("TORCH_NCCL_BLOCKING_WAIT", "1")
        try:
            yield
        finally:
            os.unsetenv("TORCH_NCCL_BLOCKING_WAIT")


def _finish(part: Tensor) -> None:
    """`wait` on NCCL's work only orders the stream."""
    if part.device.type == "cuda":
        torch.cuda.current_stream(part.device).synchronize()


def _bytes(part: Tensor) -> memoryview:
    return part.view(-1).view(torch.uint8).numpy().data


def write_message(connection: socket.socket, message: bytes) -> None:
    """A short one, as `read_message` reads it."""
    connection.sendall(len(message).to_bytes(_LENGTH, "little") + message)


def read_message(connection: socket.socket, timeout_s: float) -> bytes:
    """A message, all of which has come within that time."""
    until_s = time.monotonic() + timeout_s
    head = bytearray(_LENGTH)
    read_into(connection, head, until_s)
    length = int.from_bytes(head, "little")
    if length > MESSAGE_BYTES:
        raise LinkBroken(f"a message of {length} bytes where at most {MESSAGE_BYTES} are due")
    message = bytearray(length)
    read_into(connection, message, until_s)
    return bytes(message)


def read_into(connection: socket.socket, buffer: bytearray | memoryview, until_s: float | None = None) -> None:
    view = memoryview(buffer)
    while view:
        if until_s is not None:
            connection.settimeout(max(until_s - time.monotonic(), 0.001))
        count = connection.recv_into(view)
        if count == 0:
            raise LinkBroken("the other end has closed")
        view = view[count:]


def stop(connection: socket.socket) -> None:
    """Ends whatever anybody waits for on it. Its number stays taken, so that nobody can mistake another connection for it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def shut(connection: socket.socket) -> None:
    stop(connection)
    connection.close()


@contextlib.contextmanager
def broken(what: str) -> Iterator[None]:
    """Errors of sockets, of messages and of process groups as LinkBroken."""
    try:
        yield
    except LinkBroken:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise LinkBroken(f"{what}: {str(error).partition(chr(10))[0] or repr(error)}") from error
