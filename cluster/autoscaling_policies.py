"""The policies that come with Quire, and how one is named. Pure.

queue     prompt tokens that come and that wait, against the measured speed of prefill
slo       predicted times to first token and per output token, against targets (`cluster.autoscaling_slo`)
pages     free pages for each running request: Llumnix's freeness
schedule  floors by the time of day
ongoing   requests for each replica: Ray Serve's default rule, to compare with
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from .autoscaling import AutoscalingPolicy, seen
from .autoscaling_slo import SloPolicy

QUEUE_UTILISATION = 0.8  # of its prefill speed that a replica may be asked for: beyond it a queue grows with every gust


class QueuePolicy:
    """replicas = (tokens that come each second + tokens that wait / `target_wait_s`) / speed of one

    At least so many that what runs has its pages. A speed that nobody has measured asks for one replica, so that it gets measured.
    """

    def __init__(self, target_wait_s: float = 2.0, utilisation: float = QUEUE_UTILISATION) -> None:
        self._target_wait_s = target_wait_s
        self._utilisation = utilisation

    def __call__(self, ctx: Any, /) -> tuple[float, dict[str, Any]]:
        """As the formula says."""
        ctx = seen(ctx)
        held, waiting = ctx.least_to_hold(), ctx.waiting_tokens
        if not ctx.speed:
            return max(float(ctx.target_num_replicas), 1.0) if ctx.total_num_requests else 0.0, {}
        come, drain = ctx.arrivals.tokens_per_s / (self._utilisation * ctx.speed), waiting / (self._target_wait_s * ctx.speed)
        state = {"for_arrivals": round(come, 3), "for_backlog": round(drain, 3), "to_hold": round(held, 3)}
        return max(come + drain, held, 1.0 if ctx.total_num_requests else 0.0), state


class PagesPolicy:
    """Keeps the freeness between `low` and `high`.

    freeness = (pages of all replicas - pages in use - pages that what waits will take) / requests. Source: Llumnix (OSDI 2024), whose
    code scales up when the mean is below 10 and down when it is above 60.
    """

    def __init__(self, low: float = 10.0, high: float = 60.0) -> None:
        if not 0 <= low < high:
            raise ValueError(f"pages policy: low {low:g} must be at least 0 and below high {high:g}")
        self._low = low
        self._high = high

    def __call__(self, ctx: Any, /) -> tuple[float, dict[str, Any]]:
        """The present number while the freeness is within the band, else the nearest that brings it there."""
        ctx = seen(ctx)
        target, requests = ctx.target_num_replicas, ctx.total_num_requests
        if not ctx.pages_per_replica:
            return max(target, 1) if requests else 0, {}
        spoken_for = ctx.pages_used + ctx.waiting_tokens / ctx.page_size
        least = (spoken_for + self._low * requests) / ctx.pages_per_replica
        most = (spoken_for + self._high * requests) / ctx.pages_per_replica
        free = ctx.pages_per_replica * ctx.current_num_replicas - spoken_for
        wanted = min(max(float(target), least), max(float(ceil(most)), least))
        return wanted, {"freeness": round(free / requests, 2) if requests else None}


class OngoingPolicy:
    """replicas = requests / `target_ongoing_requests`: Ray Serve's default. With no replica one request asks for one."""

    def __init__(self, target_ongoing_requests: float = 2.0) -> None:
        self._each = target_ongoing_requests

    def __call__(self, ctx: Any, /) -> tuple[float, dict[str, Any]]:
        """As the formula says."""
        if ctx.current_num_replicas == 0:
            return max(ctx.target_num_replicas, 1 if ctx.total_num_requests else 0), {}
        return ctx.total_num_requests / self._each, {}


class SchedulePolicy:
    """At least so many replicas at such times, and what another policy wants, if that is more.

    Args:
        floors: `MINUTE HOUR DAY MONTH WEEKDAY REPLICAS` each: cron's five fields, and the floor that holds in every minute that they match.
            Where several match, the highest holds.
        timezone: an IANA name.
        beside: the other policy.

    Raises:
        ValueError: naming the line at fault.
    """

    def __init__(self, floors: Iterable[str] = (), timezone: str = "UTC", beside: AutoscalingPolicy | None = None) -> None:
        self._floors = [Floor.parse(line) for line in floors]
        try:
            self._zone = UTC if timezone == "UTC" else ZoneInfo(timezone)
        except (ZoneInfoNotFoundError, ValueError):
            raise ValueError(f"schedule: there is no time zone {timezone!r}") from None
        self._beside = beside

    def __call__(self, ctx: Any, /) -> tuple[float, dict[str, Any]]:
        """The highest floor of this minute, or more."""
        at = datetime.fromtimestamp(ctx.current_time, self._zone)
        floor = max((f.replicas for f in self._floors if f.holds(at)), default=0)
        wanted, state = self._beside(ctx) if self._beside is not None else (1.0 if ctx.total_num_requests else 0.0, {})
        return max(float(floor), wanted), {**state, "floor": floor}


_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day", 1, 31), ("month", 1, 12), ("weekday", 0, 7))
_WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")


@dataclass(frozen=True, slots=True)
class Floor:
    """One line of a schedule: the values of each field that match; None: any."""

    fields: tuple[frozenset[int] | None, ...]
    replicas: int

    @staticmethod
    def parse(line: str) -> Floor:
        """A line of `*`, `5`, `8-17`, `1,3`, `*/15`, `mon-fri`; as in cron 0 and 7 are Sunday.

        Raises:
            ValueError: naming the line, and what is wrong with it.
        """
        words = line.split()
        if len(words) != 6 or not words[5].isdigit():
            raise ValueError(f"schedule {line!r}: MINUTE HOUR DAY MONTH WEEKDAY REPLICAS are due")
        try:
            return Floor(tuple(_matches(word, *of) for word, of in zip(words, _FIELDS, strict=False)), int(words[5]))
        except ValueError as error:
            raise ValueError(f"schedule {line!r}: {error}") from None

    def holds(self, at: datetime) -> bool:
        """Whether the minute matches. As in cron, of day and weekday one is enough when both are given."""
        minute, hour, day, month, weekday = self.fields
        if not all(f is None or v in f for f, v in ((minute, at.minute), (hour, at.hour), (month, at.month))):
            return False
        days = [(day, at.day), (weekday, at.isoweekday() % 7)]
        given = [v in f for f, v in days if f is not None]
        return any(given) or not given


def _matches(word: str, name: str, low: int, high: int) -> frozenset[int] | None:
    if word == "*":
        return None
    found: set[int] = set()
    for part in word.lower().split(","):
        span, _, step = part.partition("/")
        first, to, last = span.partition("-")
        begin, end = (low, high) if span == "*" else (_number(first, name), _number(last if to else first, name))
        if not low <= begin <= end <= high or (step and not 0 < _number(step, name) <= high):
            raise ValueError(f"{part!r} is no {name} from {low} to {high}")
        found.update(range(begin, end + 1, int(step or 1)))
    return frozenset(value % 7 for value in found) if name == "weekday" else frozenset(found)


def _number(text: str, name: str) -> int:
    if name == "weekday" and text in _WEEKDAYS:
        return _WEEKDAYS.index(text)
    if not text.isdigit():
        raise ValueError(f"{text!r} is no {name}")
    return int(text)


# --- by name ---

POLICIES: dict[str, Callable[..., AutoscalingPolicy]] = {
    "queue": QueuePolicy,
    "slo": SloPolicy,
    "pages": PagesPolicy,
    "schedule": SchedulePolicy,
    "ongoing": OngoingPolicy,
}


def policy_named(name: str, arguments: Mapping[str, Any]) -> AutoscalingPolicy:
    """One of `POLICIES`, or a user's own, `module:Class`, made with these arguments; a function is taken as it is.

    Raises:
        ValueError: there is none of that name, or it does not take the arguments; says which.
    """
    found: Any = POLICIES.get(name)
    if found is None:
        module, colon, attribute = name.partition(":")
        if not colon or not module or not attribute:
            raise ValueError(f"autoscaler {name!r}: must be one of {', '.join(POLICIES)}, or module:Class")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"autoscaler {name!r}: {error}") from None
        if not callable(found):
            raise ValueError(f"autoscaler {name!r}: is not callable")
        if not isinstance(found, type):
            if arguments:
                raise ValueError(f"autoscaler {name!r}: is a function, which takes no arguments but the context")
            function: AutoscalingPolicy = found
            return function
    try:
        policy: AutoscalingPolicy = found(**arguments)
    except TypeError as error:
        raise ValueError(f"autoscaler {name!r}: {error}") from None
    return policy
