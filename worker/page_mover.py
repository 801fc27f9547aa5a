"""Copies pages between the device pool and host memory, beside the steps. One mover per rank.

A thread carries the moves out in their order: on a CPU by copying whole pages, on a GPU by one DMA for each page on a stream of its own,
which starts when the compute stream has got as far as it was when the move was asked for. A move has ended when its bytes are there.
Every rank copies its part of each page; the leader goes by its own end, and a follower that is late waits when it is told that the
move is settled, which is before anything uses the pages.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import NamedTuple

import torch

from .kv_store import KVStore
from .plan import Move, Moved, MoveKind

SETTLE_S = 60.0  # that a copy may take beyond that of the leader

log = logging.getLogger(__name__)


class _Asked(NamedTuple):
    move: Move
    ready: torch.cuda.Event | None  # on the compute stream: what the copy may not overtake
    ended: threading.Event


class PageMover:
    """Moves between `kv.pool` and `kv.host`."""

    def __init__(self, kv: KVStore) -> None:
        self._kv = kv
        self._stream = torch.cuda.Stream(kv.pool.device) if kv.pool.is_cuda else None  # type: ignore[no-untyped-call]
        self._asked: SimpleQueue[_Asked] = SimpleQueue()
        self._under_way: dict[int, threading.Event] = {}
        self._ended: deque[Moved] = deque()
        self._wake: Callable[[], None] | None = None
        self._thread: threading.Thread | None = None

    def watch(self, wake: Callable[[], None]) -> None:
        """Call `wake`, on the mover's thread, whenever a move has ended."""
        self._wake = wake

    def settle(self, moves: Iterable[int]) -> None:
        """Wait for moves that have ended elsewhere.

        Raises:
            TimeoutError: one has not ended here within `SETTLE_S`.
        """
        for move in moves:
            if not self._under_way.pop(move).wait(SETTLE_S):
                raise TimeoutError(f"move {move} has not ended within {SETTLE_S:g} s on this rank")

    def start(self, moves: Iterable[Move]) -> None:
        """Start copies, after what has been asked of the device until now."""
        for move in moves:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="page-mover", daemon=True)
                self._thread.start()
            ready = torch.cuda.current_stream(self._kv.pool.device).record_event() if self._stream is not None else None
            asked = _Asked(move, ready, threading.Event())
            self._under_way[move.move] = asked.ended
            self._asked.put(asked)

    def poll(self) -> tuple[Moved, ...]:
        """The moves that have ended since it was asked last."""
        return tuple(self._ended.popleft() for _ in range(len(self._ended)))

    def _run(self) -> None:
        while True:
            asked = self._asked.get()
            self._ended.append(self._carry_out(asked))
            asked.ended.set()
            if self._wake is not None:
                self._wake()

    def _carry_out(self, asked: _Asked) -> Moved:
        move = asked.move
        try:
            if asked.ready is not None:
                asked.ready.synchronize()
            began_s = time.perf_counter()
            if self._stream is None:
                self._copy(move)
            else:
                with torch.cuda.stream(self._stream):
                    self._copy(move)
                self._stream.synchronize()
        except Exception as error:
            log.exception("move %d failed", move.move)
            return Moved(move.move, error=str(error) or repr(error))
        return Moved(move.move, len(move.pages), time.perf_counter() - began_s)

    def _copy(self, move: Move) -> None:
        pool, host = self._kv.pool, self._kv.host
        for page, host_page in zip(move.pages, move.host_pages, strict=True):
            match move.kind:
                case MoveKind.OUT:
                    host[host_page].copy_(pool[page], non_blocking=True)
                case MoveKind.IN:
                    pool[page].copy_(host[host_page], non_blocking=True)
                case _:
                    raise ValueError(f"pages cannot be moved by {move.kind} here")
