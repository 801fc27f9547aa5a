"""How urgent a request is: `priority` and `deadline_ms`, as fields of the body or as headers. The body wins."""

from __future__ import annotations

from typing import Any, NamedTuple

from starlette.datastructures import Headers

from ...worker.protocol import BadRequest
from .schemas import SamplingBody

PRIORITY_HEADER = "X-Quire-Priority"
DEADLINE_HEADER = "X-Quire-Deadline-Ms"
NAMED = {"high": -1, "normal": 0, "low": 1}
PRIORITIES = (-(2**31), 2**31 - 1)
DEADLINES_MS = (1, 2**31 - 1)


class Urgency(NamedTuple):
    """`priority`: lower goes first. `deadline_ms`: how long it may wait for its first step; None for ever."""

    priority: int = 0
    deadline_ms: int | None = None


def read_urgency(body: SamplingBody, headers: Headers) -> Urgency:
    """What the request says of itself.

    Raises:
        BadRequest: naming the field or the header at fault.
    """
    field, given = _either("priority", body.priority, PRIORITY_HEADER, headers)
    priority = NAMED[given] if isinstance(given, str) and given in NAMED else given
    if priority is not None:
        priority = _integer(field, priority, PRIORITIES, " or one of high, normal, low")
    field, deadline_ms = _either("deadline_ms", body.deadline_ms, DEADLINE_HEADER, headers)
    if deadline_ms is not None:
        deadline_ms = _integer(field, deadline_ms, DEADLINES_MS, "")
    return Urgency(priority or 0, deadline_ms)


def _either(field: str, in_body: Any, header: str, headers: Headers) -> tuple[str, Any]:
    """The name that the client used, and the value; numbers in headers are text."""
    if in_body is not None:
        return field, in_body
    texts = headers.getlist(header)
    if len(texts) > 1:
        raise BadRequest(header, "is given more than once")
    text = texts[0].strip() if texts else None
    digits = text.removeprefix("-") if text else ""
    return header, int(digits) * (-1 if text != digits else 1) if digits.isascii() and digits.isdigit() and len(digits) < 19 else text


def _integer(field: str, value: Any, span: tuple[int, int], else_what: str) -> int:
    if type(value) is not int or not span[0] <= value <= span[1]:
        raise BadRequest(field, f"must be a whole number from {span[0]} to {span[1]}{else_what}")
    return value
