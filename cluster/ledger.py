"""What has been sent to replicas and stands in none of their reports yet. Pure; times are passed in.

A replica's load is as old as its last report. Without the ledger, all requests of a burst would see the same idle replica and
pile up on it. An entry goes when the replica reports the request, when another attempt replaces it, when its client leaves, or
after `ttl_s`, so that nothing stays for ever.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

LEDGER_TTL_S = 30.0


class Sent(NamedTuple):
    """One request on its way. `tokens` are those of its prompts that the replica has to compute, `pages` those it will take."""

    request_id: str
    attempt: int
    replica_id: str
    sequences: int
    tokens: int
    pages: int
    sent_s: float


class Totals(NamedTuple):
    """All that is on its way to one replica."""

    sequences: int = 0
    tokens: int = 0
    pages: int = 0


NOTHING = Totals()


class Ledger:
    """At most one entry for each request: its latest attempt."""

    def __init__(self, ttl_s: float = LEDGER_TTL_S) -> None:
        self._ttl_s = ttl_s
        self._sent: OrderedDict[str, Sent] = OrderedDict()  # oldest first
        self._totals: dict[str, Totals] = {}

    def __len__(self) -> int:
        return len(self._sent)

    def enter(self, sent: Sent) -> None:
        """It is on its way. An earlier attempt is replaced; an attempt older than the known one changes nothing."""
        before = self._sent.get(sent.request_id)
        if before is not None and before.attempt > sent.attempt:
            return
        self.drop(sent.request_id)
        self._sent[sent.request_id] = sent
        self._count(sent, 1)

    def settle(self, replica_id: str, request_id: str) -> None:
        """`replica_id` has reported the request. What is on its way elsewhere (a later attempt) stays."""
        sent = self._sent.get(request_id)
        if sent is not None and sent.replica_id == replica_id:
            self.drop(request_id)

    def drop(self, request_id: str) -> None:
        """It will not arrive."""
        sent = self._sent.pop(request_id, None)
        if sent is not None:
            self._count(sent, -1)

    def forget(self, replica_id: str) -> None:
        """Nothing is on its way to `replica_id` any more: it is gone."""
        if replica_id in self._totals:
            self._sent = OrderedDict((key, sent) for key, sent in self._sent.items() if sent.replica_id != replica_id)
            del self._totals[replica_id]

    def expire(self, now_s: float) -> None:
        """Drop what was sent `ttl_s` ago or earlier."""
        while self._sent:
            oldest = next(iter(self._sent.values()))
            if oldest.sent_s + self._ttl_s > now_s:
                return
            self.drop(oldest.request_id)

    def of(self, replica_id: str) -> Totals:
        """What is on its way to `replica_id`."""
        return self._totals.get(replica_id, NOTHING)

    def _count(self, sent: Sent, sign: int) -> None:
        known = self._totals.get(sent.replica_id, NOTHING)
        totals = Totals(known.sequences + sign * sent.sequences, known.tokens + sign * sent.tokens, known.pages + sign * sent.pages)
        if totals == NOTHING:
            self._totals.pop(sent.replica_id, None)
        else:
            self._totals[sent.replica_id] = totals
