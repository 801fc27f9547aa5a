"""Messages to other replicas, handed over on a thread of their own: finding an actor and calling it takes a while, and a step must not.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from .protocol import ReplicaLost

log = logging.getLogger(__name__)

MAX_QUEUED = 4096  # messages; more are lost, as any message may be
MAX_KNOWN = 256  # actors that are remembered

Call = Callable[[bytes], "Future[None]"]


class Post:
    """Calls the actors of other replicas by name.

    Args:
        find: the call of the actor of that name; it, and the call, raise ReplicaLost when the actor is dead for good.
        lost: told of such an actor, on any thread.
    """

    def __init__(self, find: Callable[[str], Call], lost: Callable[[str], None]) -> None:
        self._find = find
        self._lost = lost
        self._known: dict[str, Call] = {}
        self._queue: queue.Queue[tuple[str, bytes]] = queue.Queue(MAX_QUEUED)
        threading.Thread(target=self._run, name="post", daemon=True).start()

    def send(self, actor: str, data: bytes) -> None:
        """Does not wait, and does not say whether it arrives."""
        try:
            self._queue.put_nowait((actor, data))
        except queue.Full:
            log.warning("too many messages to other replicas wait; one to %s is lost", actor)

    def _run(self) -> None:
        while True:
            actor, data = self._queue.get()
            try:
                self._call(actor)(data).add_done_callback(partial(self._called, actor))
            except ReplicaLost:
                self._forget(actor)
            except Exception:
                log.warning("a message to %s is lost", actor, exc_info=True)

    def _call(self, actor: str) -> Call:
        if actor not in self._known:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[actor] = self._find(actor)
        return self._known[actor]

    def _called(self, actor: str, answer: Future[None]) -> None:
        if isinstance(answer.exception(), ReplicaLost):
            self._forget(actor)

    def _forget(self, actor: str) -> None:
        self._known.pop(actor, None)
        self._lost(actor)
