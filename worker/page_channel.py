"""What carries the bytes of pages between a rank of one replica and a rank of another: one connection, or a process group beside it.

    HostChannel   the TCP connection itself, between host memories
    PairChannel   a standalone gloo pair, or NCCL between two GPUs; the connection has introduced it, and stays

Every wait has a time-out. Whoever dies or closes ends the other's wait on the connection at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

log = logging.getLogger(__name__)

dist: Any = torch.distributed  # its type stubs lack most of what is used here

GLOO, NCCL = "gloo", "nccl"
MEET_TIMEOUT = timedelta(seconds=4)  # of the two ends of a pair
TRANSFER_TIMEOUT_S = 20.0  # of one part, without a byte
BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"


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

    def _meet(self) -> None:
        self._connection.sendall(b"\1")
        read_into(self._connection, bytearray(1))


def open_pair(kind: str, meet: Callable[[], Any], rank: int, host: str, device: torch.device) -> Any:
    """A process group of two; None when it cannot be opened.

    Args:
        kind: GLOO or NCCL.
        meet: the store where the two find each other.
        rank: 1 at the end that sends.
        host: this end's address.
        device: where pages lie.
    """
    try:
        return _gloo(meet(), rank, host) if kind == GLOO else _nccl(meet(), rank, device)
    except RuntimeError as error:
        log.warning("a %s link could not be opened, pages go through host memory: %s", kind, str(error).partition("\n")[0])
        return None


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
    nothing = torch.zeros(1, device=f"cuda:{index}")
    (pair.send if rank else pair.recv)([nothing], 1 - rank, 0).wait()
    return pair


_environment = threading.Lock()


@contextlib.contextmanager
def _blocking_wait() -> Iterator[None]:
    """The setting is read when a group is made, and must not be in force for others."""
    with _environment:
        before = os.environ.get(BLOCKING_WAIT)
        os.environ[BLOCKING_WAIT] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[BLOCKING_WAIT]
            else:
                os.environ[BLOCKING_WAIT] = before


def _finish(part: Tensor) -> None:
    """`wait` on NCCL's work only orders the stream."""
    if part.device.type == "cuda":
        torch.cuda.current_stream(part.device).synchronize()


def _bytes(part: Tensor) -> memoryview:
    return part.view(-1).view(torch.uint8).numpy().data


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
