"""The questions that ingresses ask the controller: which are open, which are answered, which nobody asks any more. Pure.

An ingress asks again and again until it has an answer, and an answer may get lost on its way; so a question is known by its
(request id, attempt), and its answer is kept for a while.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .messages import AdmitRequest

ADMIT_POLL_S = 5.0  # a question is held open for so long; then it is asked again
KEPT_S = 3 * ADMIT_POLL_S

Answer = tuple[Any, ...]


@dataclass(slots=True)
class _Question:
    request: AdmitRequest
    asked_s: float
    answer: Answer | None = None
    fetched: bool = False


class Admissions:
    """The open and the recent questions, by request id. Bounded by whoever bounds the queue, and by `KEPT_S`."""

    def __init__(self) -> None:
        self._questions: dict[str, _Question] = {}

    def ask(self, request: AdmitRequest, now_s: float) -> bool:
        """Whether the question is new. A later attempt takes the place of an earlier one; an earlier one is not new."""
        known = self._questions.get(request.request_id)
        if known is not None and request.attempt <= known.request.attempt:
            if request.attempt == known.request.attempt:
                known.asked_s = now_s
            return False
        self._questions[request.request_id] = _Question(request, now_s)
        return True

    def decide(self, request_id: str, attempt: int, answer: Answer) -> None:
        """The answer to a question. Nothing happens when it is not asked any more."""
        question = self._questions.get(request_id)
        if question is not None and question.request.attempt == attempt:
            question.answer = answer

    def fetch(self, request_id: str, attempt: int) -> Answer | None:
        """The answer, for who asks; None while there is none."""
        question = self._questions.get(request_id)
        if question is None or question.request.attempt != attempt or question.answer is None:
            return None
        question.fetched = True
        return question.answer

    def superseded(self, request_id: str, attempt: int) -> bool:
        """Whether this question is not open any more, for a later attempt has been asked or it was withdrawn."""
        question = self._questions.get(request_id)
        return question is None or question.request.attempt > attempt

    def tenant(self, request_id: str) -> str:
        """Who asks; empty when nobody does any more."""
        question = self._questions.get(request_id)
        return question.request.tenant if question else ""

    def withdraw(self, request_id: str) -> None:
        """It is not asked any more."""
        self._questions.pop(request_id, None)

    def expire(self, now_s: float) -> list[str]:
        """Forgets what nobody has asked for `KEPT_S`; the request ids among it whose answer nobody has fetched."""
        old = [q for q in self._questions.values() if now_s - q.asked_s > KEPT_S]
        for question in old:
            del self._questions[question.request.request_id]
        return [q.request.request_id for q in old if not q.fetched]
