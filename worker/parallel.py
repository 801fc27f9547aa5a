"""The ranks of one replica: how they find each other, what they say to each other, and how they notice that one is gone.

The leader (rank 0) listens; the others join at its address. From then on nothing goes over Ray:

    control   gloo, CPU    the leader's messages (plans) and what the ranks report of themselves
    tensors   NCCL, or gloo on a CPU    sums, gathered logits, and on GPUs the tokens drawn
    pulse     gloo, CPU    one number a second from everybody to everybody, on a thread of its own

A process that dies closes its connections, and one that stops answers no pulse: either way every other rank's `on_broken` is
called, within about a second of a death, within `step_timeout_s` of a stop, whether a step runs or not. So a follower may wait
for the next plan as long as it takes. The groups are standalone ones over a store, so several live side by side in a process.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from .rendezvous import own_address

dist: Any = torch.distributed  # its type stubs lack most of what is used here

LEADER = 0
JOIN_TIMEOUT_S = 300.0  # from the leader's start until all its ranks are there
PLAN_TIMEOUT = timedelta(days=365)  # the pulse ends a wait for a leader that is gone
PACKET_BYTES = 4096  # of a message, in its first broadcast, which holds the plan of most steps
PULSE_S = 1.0
_LENGTH_BYTES = 8


class GroupBroken(RuntimeError):
    """A rank is gone, or silent; nothing can be computed any more."""


@dataclass(frozen=True, slots=True)
class Membership:
    """One rank's place.

    Attributes:
        rank, size: in [0, size); the leader is 0.
        step_timeout_s: how long another rank may be silent.
        on_broken: called once, from another thread, when a rank is gone or silent; a process that has others behind it ends here.
    """

    rank: int
    size: int
    step_timeout_s: float
    on_broken: Callable[[str], None]


class RankGroup:
    """This process's end of the group. Every rank calls the same methods in the same order, from one thread at a time.

    All of them raise `GroupBroken` when a rank is gone or did not answer in time.
    """

    def __init__(self, store: Any, host: str, me: Membership, device: torch.device) -> None:
        """Connects to every other rank. `store` is the same for all; `host` is this process's own address."""
        self.rank, self.size, self.host = me.rank, me.size, host
        with _broken(f"rank {me.rank}: the {me.size} ranks did not come together"):
            self._control = _gloo("control", store, host, me, PLAN_TIMEOUT)
            limit = timedelta(seconds=me.step_timeout_s)
            self._tensors: Any = _gloo("tensors", store, host, me, limit) if device.type == "cpu" else _nccl(store, me, limit, device)
            self._pulse = _Pulse(_gloo("pulse", store, host, me, limit), me)
        self._packet = torch.zeros(PACKET_BYTES, dtype=torch.uint8)
        self._store = store  # the leader's serves the others: it has to live as long as the group

    def reports(self) -> Any:
        """A store that all ranks reach, for what they tell each other outside of steps. From any thread."""
        return dist.PrefixStore("reports", self._store)

    @property
    def leads(self) -> bool:
        """Whether this is the rank that plans and samples."""
        return self.rank == LEADER

    def sum(self, x: Tensor) -> Tensor:
        """The ranks' x [T, ...] added up; on every rank. May overwrite `x`.

        On a CPU they are added in the order of the ranks, so that a token's sum is the same bits in every batch; a ring's order
        depends on where a number lies in the batch. (Two numbers have one order, so two ranks take the quicker way.)
        """
        x = x.contiguous()
        with _broken(f"rank {self.rank}: a sum over the ranks failed"):
            if x.device.type != "cpu" or self.size == 2:
                self._tensors.allreduce([x]).wait()
                return x
            gathered = x.new_empty(self.size * x.shape[0], *x.shape[1:])
            self._tensors._allgather_base(gathered, x).wait()
        parts = gathered.view(self.size, *x.shape)
        total = parts[0]
        for other in parts[1:]:
            total += other  # one after the other: `Tensor.sum` takes its own order at a row's end
        return total

    def gather(self, x: Tensor) -> list[Tensor] | None:
        """Every rank's x, of one shape, in the order of the ranks, at the leader; None elsewhere."""
        x = x.contiguous()
        found = [torch.empty_like(x) for _ in range(self.size)] if self.leads else None
        options = dist.GatherOptions()
        options.rootRank = LEADER
        with _broken(f"rank {self.rank}: gathering from the ranks failed"):
            self._tensors.gather([found] if found else [], [x], options).wait()
        return found

    def share(self, x: Tensor) -> None:
        """The leader's x, written over every other rank's, which has its shape and type."""
        with _broken(f"rank {self.rank}: sharing the leader's tensor failed"):
            self._tensors.broadcast([x]).wait()

    def send(self, message: bytes) -> None:
        """The leader's message, to every other rank."""
        head, rest = message[: PACKET_BYTES - _LENGTH_BYTES], message[PACKET_BYTES - _LENGTH_BYTES :]
        packet = len(message).to_bytes(_LENGTH_BYTES, "little") + head
        self._packet[: len(packet)] = torch.frombuffer(bytearray(packet), dtype=torch.uint8)
        self._broadcast(self._packet)
        if rest:
            self._broadcast(torch.frombuffer(bytearray(rest), dtype=torch.uint8))

    def receive(self) -> bytes:
        """The leader's next message; waits for it as long as the leader lives."""
        self._broadcast(self._packet)
        packet = self._packet.numpy().tobytes()
        length = int.from_bytes(packet[:_LENGTH_BYTES], "little")
        head = packet[_LENGTH_BYTES : _LENGTH_BYTES + length]
        if len(head) == length:
            return head
        rest = torch.empty(length - len(head), dtype=torch.uint8)
        self._broadcast(rest)
        return head + rest.numpy().tobytes()

    def exchange(self, message: bytes) -> list[bytes]:
        """Every rank's message, in the order of the ranks, on every rank. Waits for the slowest as long as all live."""
        with _broken(f"rank {self.rank}: an exchange between the ranks failed"):
            lengths = torch.empty(self.size, dtype=torch.int64)
            self._control._allgather_base(lengths, torch.tensor([len(message)])).wait()
            widest = int(lengths.max())
            mine = torch.frombuffer(bytearray(message.ljust(max(widest, 1), b"\0")), dtype=torch.uint8)
            found = torch.empty(self.size * len(mine), dtype=torch.uint8)
            self._control._allgather_base(found, mine).wait()
        rows = found.view(self.size, -1).numpy()
        return [row.tobytes()[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]

    def close(self) -> None:
        """Leave in good order: the others' pulse ends too, and their `on_broken` is not called for it. NCCL's communicator goes with the
        process: to be destroyed it would wait for the graphs that hold its sums."""
        self._pulse.stop()

    def _broadcast(self, x: Tensor) -> None:
        with _broken(f"rank {self.rank}: a broadcast from the leader failed"):
            self._control.broadcast([x]).wait()


def lead(listener: socket.socket, size: int, step_timeout_s: float, on_broken: Callable[[str], None], device: torch.device) -> RankGroup:
    """Be rank 0 at `listener` (from `rendezvous.listen`), which belongs to the group from now on; waits for the other ranks.

    Raises:
        GroupBroken: they did not all come within JOIN_TIMEOUT_S.
    """
    host, port = listener.getsockname()[:2]
    with _broken("rank 0: the ranks' store did not start"):
        store = dist.TCPStore(host, port, None, True, _JOIN_TIMEOUT, wait_for_workers=False, master_listen_fd=listener.detach())
    return RankGroup(store, host, Membership(LEADER, size, step_timeout_s, on_broken), device)


def join(address: str, me: Membership, device: torch.device) -> RankGroup:
    """Be a follower of the leader at `address` ("host:port").

    Raises:
        GroupBroken: it is not there, or the ranks did not all come within JOIN_TIMEOUT_S.
    """
    host, port = address.rsplit(":", 1)
    with _broken(f"rank {me.rank}: no leader at {address}"):
        store = dist.TCPStore(host, int(port), None, False, _JOIN_TIMEOUT, wait_for_workers=False)
        return RankGroup(store, own_address(host, int(port)), me, device)


_JOIN_TIMEOUT = timedelta(seconds=JOIN_TIMEOUT_S)


class _Pulse:
    """One number a second from every rank to every rank."""

    def __init__(self, group: Any, me: Membership) -> None:
        self._group = group
        self._me = me
        self._leaving = threading.Event()
        threading.Thread(target=self._run, name=f"pulse-{me.rank}", daemon=True).start()

    def stop(self) -> None:
        self._leaving.set()

    def _run(self) -> None:
        while True:
            leaving = torch.tensor([float(self._leaving.is_set())])
            try:
                self._group.allreduce([leaving]).wait()
            except RuntimeError as error:
                if not self._leaving.is_set():
                    self._me.on_broken(f"rank {self._me.rank}: a rank is gone, or has been silent too long: {_first_line(error)}")
                return
            if leaving.item():  # somebody leaves: nobody waits for the others' pulse any more
                return
            self._leaving.wait(PULSE_S)


def _gloo(name: str, store: Any, host: str, me: Membership, timeout: timedelta) -> Any:
    """A group on the CPU that listens on `host` alone."""
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = _JOIN_TIMEOUT
    group = dist.ProcessGroupGloo(dist.PrefixStore(name, store), me.rank, me.size, options)
    group._set_default_timeout(timeout)
    return group


def _nccl(store: Any, me: Membership, timeout: timedelta, device: torch.device) -> Any:
    """A group of this rank's GPU and the others'. Ray lets every rank see one GPU alone, so that is number 0 everywhere."""
    torch.cuda.set_device(device.index or 0)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(dist.PrefixStore("tensors", store), me.rank, me.size, options)


@contextmanager
def _broken(what: str) -> Iterator[None]:
    """The library's errors as `GroupBroken`."""
    try:
        yield
    except GroupBroken:
        raise
    except RuntimeError as error:
        raise GroupBroken(f"{what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    """What it says, without the place in the library's source and its advice."""
    line = re.sub(r"\[\S+\.(?:cc|cpp|h):\d+\] ", "", str(error).partition("\n")[0])
    return line.partition(" This is typically caused")[0][:300]
