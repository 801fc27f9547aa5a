"""The decisions that were taken when pages ran out: what each was predicted to cost, and what it came to. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from .pressure import Action, Decision
from .sequence import Sequence

RECENT = 256  # decisions that are remembered one by one
DECAY = 0.9  # of what earlier sequences weigh in `again`, with each that comes back


@dataclass(slots=True)
class Record:
    """One decision. Costs are seconds of this replica's time; `actual_s` grows as they fall due.

    Attributes:
        step: the step that was being planned.
        request_id, choice: the sequence that gave way, or waits.
        pages: that it held then.
    """

    step: int
    request_id: str
    choice: int
    action: str
    reason: str
    pages: int
    predicted_s: float
    actual_s: float = 0.0


class Decisions:
    """The latest `RECENT` decisions, and sums over all by action."""

    def __init__(self) -> None:
        self.recent: deque[Record] = deque(maxlen=RECENT)
        self.counts = {action.value: 0 for action in Action}
        self.predicted_s = dict.fromkeys(self.counts, 0.0)
        self.actual_s = dict.fromkeys(self.counts, 0.0)
        self._lost = self._again = 0.0  # tokens, decayed sums

    @property
    def again(self) -> float:
        """The share of the tokens of dropped pages that has to be computed again; 1.0 until it has been seen once."""
        return self._again / self._lost if self._lost else 1.0

    def came_back(self, lost: int, again: int) -> None:
        """Of a sequence that gave way, `lost` tokens were dropped, or would have been, and `again` of them were not found any more."""
        self._lost = DECAY * self._lost + lost
        self._again = DECAY * self._again + min(again, lost)

    def add(self, step: int, s: Sequence, decision: Decision) -> Record:
        """`decision` is carried out on `s`."""
        action = decision.action.value
        record = Record(step, s.request_id, s.choice, action, decision.reason.value, len(s.pages), decision.predicted_s)
        self.recent.append(record)
        self.counts[action] += 1
        self.predicted_s[action] += decision.predicted_s
        return record

    def rows(self) -> list[dict[str, Any]]:
        """The latest decisions, oldest first, with the fields of `Record`."""
        return [asdict(record) for record in self.recent]

    def charge(self, record: Record, seconds: float) -> None:
        """A decision has cost so much more."""
        record.actual_s += seconds
        self.actual_s[record.action] += seconds
