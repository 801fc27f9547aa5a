"""The HTTP servers of one command: all on one port, and each is started again when it dies."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from ..cluster.backoff import Backoff
from ..worker.config import QuireOptions
from .ingress_actor import Ingress, IngressDied

log = logging.getLogger(__name__)

T = TypeVar("T")


class _Slot:
    """One of them, through all its lives."""

    def __init__(self, ingress_id: str, options: QuireOptions) -> None:
        self.ingress_id = ingress_id
        self._options = options
        self._backoff = Backoff()
        self.ingress: Ingress | None = None
        self.phases: dict[str, float] | None = None  # of its latest start; None until it serves
        self.served_s = 0.0  # since when
        self.start_at_s = 0.0
        self.start()

    def start(self) -> None:
        self.phases = None
        self.ingress = Ingress(self.ingress_id, self._options)

    def died(self, error: IngressDied) -> None:
        """It is gone; the next life is due after the backoff."""
        now_s = time.monotonic()
        delay_s = self._backoff.delay_s(now_s - self.served_s if self.phases is not None else 0.0)
        log.error("%s: %s; it is started again in %g s", self.ingress_id, error, delay_s)
        self.ingress = self.phases = None
        self.start_at_s = now_s + delay_s

    def tick(self) -> None:
        """Looks at it once, without waiting."""
        if self.ingress is None:
            if time.monotonic() >= self.start_at_s:
                self.start()
        elif self.phases is not None:
            self.ingress.check(0.0)
        elif (phases := self.ingress.started(0.0)) is not None:
            self.phases, self.served_s = phases, time.monotonic()
            log.info("%s serves", self.ingress_id)


class Ingresses:
    """`options.server.ingresses` of them. Blocking calls, each with a time-out."""

    def __init__(self, options: QuireOptions) -> None:
        """Starts them; `options` name the port."""
        self._slots = [_Slot(f"ingress-{i}", options) for i in range(options.server.ingresses)]

    def start(self, wait_s: float) -> dict[str, float] | None:
        """The longest phases of their first start; None when it is not over after `wait_s`.

        Raises:
            IngressDied: one cannot serve.
        """
        time.sleep(wait_s)
        phases: dict[str, float] = {}
        for slot in self._slots:
            if slot.phases is None:
                slot.tick()
            for name, seconds in (slot.phases or {}).items():
                phases[name] = max(seconds, phases.get(name, 0.0))
        return None if any(slot.phases is None for slot in self._slots) else phases

    def watch(self, wait_s: float) -> None:
        """Waits, and starts again whichever has died."""
        time.sleep(wait_s)
        for slot in self._slots:
            try:
                slot.tick()
            except IngressDied as error:
                slot.died(error)

    def running(self) -> int:
        """Generation requests that run."""
        return sum(self._each(Ingress.running).values())

    def drain(self, grace_s: float) -> Drain:
        """Refuses new requests and gives the running ones `grace_s`."""
        return Drain(self._each(lambda ingress: ingress.drain(grace_s)))

    def cut_off(self) -> None:
        """Ends what runs during a drain."""
        self._each(lambda ingress: ingress.drain(0.0))

    def stop(self) -> None:
        """Closes the servers; what does not close in time is killed."""
        self._each(Ingress.stop)

    def _each(self, do: Callable[[Ingress], T]) -> dict[Ingress, T]:
        """What each of those that live says; the dead have nothing to say."""
        answers = {}
        for slot in self._slots:
            if slot.ingress is not None:
                try:
                    answers[slot.ingress] = do(slot.ingress)
                except IngressDied as error:
                    log.warning("%s: %s", slot.ingress_id, error)
        return answers


class Drain:
    """A drain that goes on."""

    def __init__(self, tokens: dict[Ingress, object]) -> None:
        self._tokens = tokens

    def over(self, wait_s: float) -> bool:
        """Whether nothing runs any more, after at most `wait_s` for each ingress that has not finished. A dead one has."""
        for ingress, token in list(self._tokens.items()):
            try:
                if ingress.drained(token, wait_s) is not None:
                    del self._tokens[ingress]
            except IngressDied:
                del self._tokens[ingress]
        return not self._tokens
