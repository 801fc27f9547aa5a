"""Lanes: threads beside the steps that carry out page moves, one after the other. Local copies have one, and every link has one.

What a plan starts may read what all earlier steps have written: on a CPU these are over, on a GPU the lane's stream waits for them. A move
has ended when its bytes are there, so whoever hears of the end may use them without further ado.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor

from .kv_store import KVStore
from .page_channel import Channel, LinkBroken
from .page_link import Hello, Listener, dial
from .plan import Move, Moved, MoveKind
from .reslice import Share

log = logging.getLogger(__name__)

Ready = Callable[[], AbstractContextManager[None]]  # `KVStore.after`

DIGEST_BYTES = 16


class Work(Protocol):
    """What a lane does. All of it may raise whatever it likes: then the moves that needed it have failed."""

    def open(self) -> None:
        """Called once, first."""
        ...

    def carry(self, move: Move) -> int:
        """Carry out a move; how many pages have travelled."""
        ...

    def stop(self) -> None:
        """From any thread: what waits ends, and nothing can be carried any more."""
        ...

    def close(self) -> None:
        """Called once, last."""
        ...


class Lane:
    """A thread that does `work`. After a failure on a link nothing goes over it any more, and the other end is not left waiting."""

    def __init__(self, name: str, ended: Callable[[Moved], None], work: Work) -> None:
        self._ended = ended
        self._work = work
        self._failure: str | None = None
        self._given_up: set[int] = set()
        self._over = threading.Condition()
        self._last = -1  # the latest move that is over here
        self._queue: queue.SimpleQueue[tuple[Move, Ready] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def put(self, move: Move, ready: Ready) -> None:
        """Carry out `move` inside `ready`, when what stands before it is done."""
        self._queue.put((move, ready))

    def give_up(self, move: int, timeout_s: float) -> bool:
        """End a move that was put in, and on a link all others; whether it is over within that time, also if it was before."""
        self._given_up.add(move)
        self._work.stop()
        with self._over:
            return self._over.wait_for(lambda: self._last >= move, timeout_s)

    def close(self) -> None:
        """Nothing is begun any more; what is under way on a link ends with an error."""
        self._failure = self._failure or "the link was closed"
        self._work.stop()
        self._queue.put(None)

    def _run(self) -> None:
        try:
            self._work.open()
        except Exception as error:
            log.debug("opening failed", exc_info=True)
            self._failure = self._failure or _said(error)
            self._work.stop()
        while (job := self._queue.get()) is not None:
            self._carry(*job)
        self._work.close()

    def _carry(self, move: Move, ready: Ready) -> None:
        started_s = time.monotonic()
        pages, error = 0, self._failure
        if move.move in self._given_up:
            error = error or "it was given up"
        if error is None:
            try:
                with ready():
                    started_s = time.monotonic()  # what it had to wait for is no part of its price
                    pages = self._work.carry(move)
            except Exception as failure:
                error = _said(failure)
                log.info("move %d (%s) failed: %s", move.move, move.kind, error)
                log.debug("move %d failed", move.move, exc_info=True)
                if move.link:
                    self._failure = self._failure or error
                    self._work.stop()
        with self._over:  # what this rank does of it; the leader goes on to ask the others
            self._last = move.move
            self._over.notify_all()
        self._ended(Moved(move.move, 0 if error else pages, time.monotonic() - started_s, error))


class LocalCopies:
    """Between device pool and host pool. With `digests`, every page is compared on its way."""

    def __init__(self, kv: KVStore, digests: dict[int, bytes] | None) -> None:
        self._kv = kv
        self._digests = digests

    def open(self) -> None:
        """As `Work.open`."""

    def carry(self, move: Move) -> int:
        """As `Work.carry`."""
        if move.kind is MoveKind.OUT:
            self._kv.copy_out(move.pages, move.host_pages)
        else:
            self._kv.copy_in(move.host_pages, move.pages)
        if self._digests is not None:
            self._verify(move, self._digests)
        return len(move.pages)

    def _verify(self, move: Move, digests: dict[int, bytes]) -> None:
        for page, host_page in zip(move.pages, move.host_pages, strict=True):
            if move.kind is MoveKind.OUT:
                digests[host_page] = digest(self._kv.pool[page])
            arrived = self._kv.host[host_page] if move.kind is MoveKind.OUT else self._kv.pool[page]
            if digest(arrived) != digests.get(host_page):
                raise RuntimeError(f"page {page} and host page {host_page} differ after a move {move.kind}")

    def stop(self) -> None:
        """As `Work.stop`: a copy is not waited for by anybody."""

    def close(self) -> None:
        """As `Work.close`."""


class Ends:
    """This rank's pairs of one link: a channel for each rank at the other end that it shares heads with.

    Args:
        kv: the pool.
        find: what travels between this rank and which others.
        open_one: dials, or waits for, the rank at the other end of such a share.
        verify: send a digest after each page, and compare it.
    """

    def __init__(self, kv: KVStore, find: Callable[[], list[Share]], open_one: Callable[[Share], Channel], verify: bool) -> None:
        self._kv = kv
        self._find = find
        self._open_one = open_one
        self._verify = verify
        self._pairs: list[tuple[Share, Channel]] = []
        self._stopped = False

    def open(self) -> None:
        """As `Work.open`."""
        for share in self._find():
            self._pairs.append((share, self._open_one(share)))
            if self._stopped:
                self.stop()
                return

    def carry(self, move: Move) -> int:
        """As `Work.carry`."""
        if move.kind is MoveKind.SEND:
            for share, channel in self._pairs:
                self._send(share, channel, move.pages)
            return len(move.pages)
        counts = {self._receive(share, channel, move.pages) for share, channel in self._pairs}
        if len(counts) != 1:
            raise LinkBroken(f"the other end's ranks have sent different numbers of pages: {sorted(counts)}")
        return counts.pop()

    def stop(self) -> None:
        """As `Work.stop`."""
        self._stopped = True
        for _, channel in self._pairs:
            channel.stop()

    def close(self) -> None:
        """As `Work.close`."""
        for _, channel in self._pairs:
            channel.close()

    def _send(self, share: Share, channel: Channel, pages: tuple[int, ...]) -> None:
        channel.send(self._number(len(pages)))
        for part in self._kv.parts(pages, slice(share.source_start, share.source_start + share.heads), self._verify):
            channel.send(part)
            if self._verify:
                channel.send(self._raw(digest(part)))

    def _receive(self, share: Share, channel: Channel, pages: tuple[int, ...]) -> int:
        number = self._number(0)
        channel.receive(number)
        count = int(number.item())
        if not 0 <= count <= len(pages):
            raise LinkBroken(f"{count} pages come where there is room for {len(pages)}")
        for part in self._kv.landings(pages[:count], slice(share.target_start, share.target_start + share.heads), self._verify):
            channel.receive(part)
            if self._verify:
                there = self._raw(bytes(DIGEST_BYTES))
                channel.receive(there)
                if bytes(there.cpu().numpy()) != digest(part):
                    raise LinkBroken("a page is not what was sent")
        return count

    def _number(self, value: int) -> Tensor:
        return torch.tensor([value], dtype=torch.int64, device=self._kv.pool.device)

    def _raw(self, data: bytes) -> Tensor:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._kv.pool.device)


def dialled(link: str, addresses: tuple[str, ...], kind: str, device: torch.device) -> Callable[[Share], Channel]:
    """Opens the pairs of the end that sends."""
    return lambda share: dial(addresses[share.target], Hello(link, share.source, share.target, kind), device)


def awaited(link: str, listener: Listener | None) -> Callable[[Share], Channel]:
    """Opens the pairs of the end that receives; without a listener it does not."""

    def accept(share: Share) -> Channel:
        if listener is None:
            raise LinkBroken("this replica takes no pages from others")
        return listener.accept(link, share.source, share.target)

    return accept


def digest(part: Tensor) -> bytes:
    """Of the bytes of a page, or of some of its heads."""
    return blake2b(part.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes(), digest_size=DIGEST_BYTES).digest()


def _said(error: Exception) -> str:
    return str(error) or repr(error)
