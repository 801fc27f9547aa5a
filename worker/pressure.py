"""What gives way when pages run out: the one place where that is decided. Pure.

Today the only move is to recompute: the victim's pages are dropped (those that are indexed stay findable until their
memory is needed) and it waits at its old place in the queue.
"""

from __future__ import annotations

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
    """The sequence that gives way for one that needs a page; `running` is in scheduling order and not empty.

    It is the last in that order, which may be the one in need itself. So the first in the order is never preempted
    for another, and since the engine admits only what fits the pool alone, some sequence always advances.
    """
    return Decision(running[-1], Action.RECOMPUTE)
