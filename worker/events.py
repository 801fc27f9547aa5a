"""What has changed on a replica, for whoever asks later: page hashes, requests, tokens served by tenant, measured speeds. Pure.

Events are numbered from 0 in each life of a replica. The log keeps the latest `capacity` of them; who is further behind, or new,
takes a dump of what there is instead. Appending costs nothing to speak of, asking costs what has changed.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from enum import Enum, auto
from itertools import islice
from typing import NamedTuple

CAPACITY = 2**16
IDLE_TENANTS = 1024  # tenants without a live request whose count is remembered

PREFILL_TOKENS = 16  # a step with fewer says nothing about the speed of prefill
DECAY = 0.9  # of what earlier steps weigh, with each step
LARGEST_CHANGE = 4.0  # a step that took more times as long as the mean counts as so much, so that one hiccup is not believed


class _Kind(Enum):
    STORED = auto()
    REMOVED = auto()
    STARTED = auto()
    ENDED = auto()
    MOVED = auto()


class Changes(NamedTuple):
    """The net difference between two numbers of the log. A request id in both `ended` and `started` ended first, and lives again."""

    stored: tuple[bytes, ...]
    removed: tuple[bytes, ...]
    started: tuple[str, ...]  # ids of requests that live
    ended: tuple[tuple[str, int], ...]
    moved: tuple[str, ...] = ()  # ids whose latest end was a move to another replica


@dataclass(slots=True)
class _Tenant:
    """A tenant with live requests: how many, and the output tokens of those that ended."""

    live: int = 0
    tokens: int = 0


class _Idle(NamedTuple):
    tokens: int
    number: int  # of its latest event


class EventLog:
    """The latest `capacity` events, and each tenant's share of the output.

    `next` is the number that the next event gets.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.next = 0
        self._entries: deque[tuple[_Kind, bytes | str, int]] = deque(maxlen=capacity)
        self._tenants: dict[str, _Tenant] = {}
        self._idle: OrderedDict[str, _Idle] = OrderedDict()  # longest idle first

    # --- what happens ---

    def stored(self, page_hash: bytes) -> None:
        """A page became findable."""
        self._append(_Kind.STORED, page_hash)

    def removed(self, page_hash: bytes) -> None:
        """A page is findable no longer."""
        self._append(_Kind.REMOVED, page_hash)

    def started(self, request_id: str, tenant: str) -> None:
        """A request was taken."""
        if tenant not in self._tenants:
            idle = self._idle.pop(tenant, None)
            self._tenants[tenant] = _Tenant(tokens=idle.tokens if idle else 0)
        self._tenants[tenant].live += 1
        self._append(_Kind.STARTED, request_id)

    def ended(self, request_id: str, tenant: str, output_tokens: int, served_tokens: int, moved: bool = False) -> None:
        """A request ended with `output_tokens` in all, `served_tokens` of them generated here; when it has `moved`, here only."""
        entry = self._tenants[tenant]
        entry.live -= 1
        entry.tokens += served_tokens
        if entry.live == 0:
            del self._tenants[tenant]
            self._idle[tenant] = _Idle(entry.tokens, self.next)
            if len(self._idle) > IDLE_TENANTS:
                self._idle.popitem(last=False)
        self._append(_Kind.MOVED if moved else _Kind.ENDED, request_id, output_tokens)

    def _append(self, kind: _Kind, key: bytes | str, tokens: int = 0) -> None:
        self._entries.append((kind, key, tokens))
        self.next += 1

    # --- what is asked ---

    def since(self, after: int | None) -> Changes | None:
        """What events `after` to `next - 1` come to; None when the log cannot tell, so that a dump is due."""
        if after is None or not self.next - len(self._entries) <= after <= self.next:
            return None
        pages: dict[bytes, _Kind] = {}
        started: dict[str, None] = {}
        ended: list[tuple[str, int]] = []
        moved: dict[str, bool] = {}
        for kind, key, tokens in reversed(list(islice(reversed(self._entries), self.next - after))):
            if isinstance(key, bytes):
                if pages.pop(key, None) is None:  # storing and removing alternate: two of them leave what was there before
                    pages[key] = kind
            elif kind is _Kind.STARTED:
                started[key] = None
            else:
                started.pop(key, None)
                ended.append((key, tokens))
                moved[key] = kind is _Kind.MOVED
        stored = tuple(h for h, kind in pages.items() if kind is _Kind.STORED)
        removed = tuple(h for h, kind in pages.items() if kind is _Kind.REMOVED)
        return Changes(stored, removed, tuple(started), tuple(ended), tuple(key for key, away in moved.items() if away))

    def served(self, after: int | None, live_tokens: dict[str, int]) -> dict[str, int]:
        """Output tokens of each tenant that has a live request, or had one since `after` (None: that is remembered at all).

        A tenant's count only grows, until it has been idle for longer than `IDLE_TENANTS` others: then it starts from 0 again.

        Args:
            live_tokens: what requests that have not ended have generated here, by tenant.
        """
        served = {tenant: entry.tokens + live_tokens.get(tenant, 0) for tenant, entry in self._tenants.items()}
        for tenant, idle in reversed(self._idle.items()):
            if after is not None and idle.number < after:
                break
            served[tenant] = idle.tokens
        return served


class Speeds:
    """How fast steps are, from steps as they are measured.

    `prefill_tokens_per_s` is what steps that prefill get done beside the decodes that share them, as a ratio of decayed sums, so that
    a large step counts for more than a small one. `decode_step_s` is a decayed mean over steps that only decode. Both are 0.0 until
    there was such a step.
    """

    def __init__(self) -> None:
        self.decode_step_s = 0.0
        self._decode_steps = 0
        self._prefill_tokens = 0.0
        self._prefill_s = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens (or recomputed ones) in a second of steps that prefill."""
        return self._prefill_tokens / self._prefill_s if self._prefill_s else 0.0

    def count(self, prefill_tokens: int, seconds: float) -> None:
        """A step took `seconds` and computed `prefill_tokens` beside its decodes."""
        if prefill_tokens >= PREFILL_TOKENS:
            self._prefill_tokens = DECAY * self._prefill_tokens + prefill_tokens
            self._prefill_s = DECAY * self._prefill_s + seconds
        elif prefill_tokens == 0:
            self._decode_steps += 1
            if self._decode_steps > 1:
                seconds = min(max(seconds, self.decode_step_s / LARGEST_CHANGE), self.decode_step_s * LARGEST_CHANGE)
            weight = max(1.0 - DECAY, 1.0 / self._decode_steps)  # a plain mean at first: the first step is often a slow one
            self.decode_step_s += weight * (seconds - self.decode_step_s)
