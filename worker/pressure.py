"""What gives way when places or pages run out: the one place where that is decided. Pure.

Today the only move is to recompute: the victim's pages are dropped (those that are indexed stay findable until their
memory is needed) and it waits at its old place in the queue.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from .sequence import Sequence


class Action(StrEnum):
    """What is done to the victim."""

    RECOMPUTE = "recompute"


class Decision(NamedTuple):
    """Who gives way, and how."""

    victim: Sequence
    action: Action


def relieve(running: list[Sequence]) -> Decision:
    """The sequence that gives way for one that runs and needs a page; `running` is in scheduling order and not empty.

    It is the last in that order, which may be the one in need itself. So the first in the order is never preempted
    for another, and since the engine admits only what fits the pool alone, some sequence always advances.
    """
    return Decision(running[-1], Action.RECOMPUTE)


def make_way(running: list[Sequence], newcomer: Sequence, enough: Callable[[Sequence], bool]) -> list[Decision]:
    """Who gives way for a sequence that waits: the fewest, from the end of `running`, all of a strictly lower priority.

    Nobody does when even all of these together would not be enough. Between equals nobody ever does, and who gave way is behind the
    newcomer in the order, so the two cannot drive each other out in turn.

    Args:
        running: in scheduling order.
        newcomer: the head of those that wait.
        enough: told of one victim after the other, says whether the newcomer can start without those told so far.
    """
    decisions: list[Decision] = []
    for victim in reversed(running):
        if victim.priority <= newcomer.priority:
            return []
        decisions.append(Decision(victim, Action.RECOMPUTE))
        if enough(victim):
            return decisions
    return []
