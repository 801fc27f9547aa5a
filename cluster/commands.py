"""What a journal commands: whoever feeds it carries them out, and feeds back what came of them. Pure data."""

from __future__ import annotations

from typing import NamedTuple

from ..worker.protocol import GenerateRequest
from .messages import AdmitRequest
from .succession import Owner


class Ask(NamedTuple):
    """After `delay_s`, ask the controller for a route; answer with `routed`, `queued`, `refused` or `unanswered`."""

    request: AdmitRequest
    delay_s: float


class Withdraw(NamedTuple):
    """Tell the controller that nobody waits for this request any more."""

    request_id: str


class Submit(NamedTuple):
    """Give the request to this replica; answer with `taken` or `turned_away`."""

    owner: Owner
    request: GenerateRequest


class Abort(NamedTuple):
    """Tell this replica to end this attempt of the request, or one choice of it."""

    owner: Owner
    request_id: str
    attempt: int
    choice: int | None


class Lost(NamedTuple):
    """To be noted: the owner of a request is gone."""

    request_id: str
    owner: Owner
    reason: str


class Resumed(NamedTuple):
    """To be noted: a stream that was lost goes on; its client has seen a pause."""

    request_id: str
    owner: Owner
    pause_s: float
    replayed_tokens: int  # prompt and output tokens that the new owner was given


Command = Ask | Withdraw | Submit | Abort | Lost | Resumed
