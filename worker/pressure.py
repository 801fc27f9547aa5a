"""What gives way when places or pages run out: the one place where that is decided. Pure.

Pages that nobody holds (free, then the oldest cached prefixes) are always taken first, by the pool itself; they cost nobody who lives
anything. Beyond them somebody gives way, in one of five ways, each with a price in seconds from speeds that were measured here:

    wait       the one in need misses steps, until pages come back that are leaving already, or a neighbour ends: steps / running
    recompute  the victim's pages are dropped: tokens that are dropped x share that is not found again / prefill tokens/s
    swap       they go to host memory and come back: (queue out + pages out) / pages/s + (queue in + pages in) / pages/s
    suspend    they go to disk, if host memory has no room: as swap, by the disk's speeds
    migrate    it goes on elsewhere: pages / link pages/s + hand-shake

What a victim is worth are the pages that it alone owns, discounted by how near its end it is: one that ends soon gives them back anyway.
The victim with the lowest price for its worth gives way, among the last of the lowest priority; one that has only just come back, only
when there is no other. A deadline does not count: it holds for what has not begun, and what runs has.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Some
from enum import StrEnum
from typing import NamedTuple

from .sequence import Sequence

WAIT_STEPS = 8  # that a sequence may miss for a neighbour's end
HALF_WORTH_TOKENS = 32  # before its end, the pages of a victim are worth half


class Action(StrEnum):
    """What is done about a lack of pages."""

    WAIT = "wait"
    RECOMPUTE = "recompute"
    SWAP = "swap"
    SUSPEND = "suspend"
    MIGRATE = "migrate"


DECIDE = "decide"  # the mode that chooses; the others always do the action of their name


class Reason(StrEnum):
    """Why an action was chosen."""

    LEAVING = "pages are leaving already"
    ENDING = "a neighbour is about to end"
    CHEAPEST = "cheapest"
    ONLY = "nothing else was possible"
    MODE = "the mode says so"
    FAILED = "a step raised"


class Costs(NamedTuple):
    """How fast things are here. What has not been measured (0.0) counts as free, so that it is tried and measured."""

    prefill_tokens_per_s: float = 0.0
    step_s: float = 0.0
    out_pages_per_s: float = 0.0
    in_pages_per_s: float = 0.0
    out_queue: int = 0  # pages that are on their way out
    in_queue: int = 0
    link_pages_per_s: float = 0.0
    handshake_s: float = 0.0  # of a migration, beside its pages
    save_pages_per_s: float = 0.0
    load_pages_per_s: float = 0.0
    save_queue: int = 0
    load_queue: int = 0
    again: float = 1.0  # share of what is dropped that has to be computed again: the prefix cache finds the rest when its turn comes


class Relief(NamedTuple):
    """Another replica that has room for a victim."""

    destination: str
    pages: int


class Candidate(NamedTuple):
    """A sequence that might give way."""

    victim: Sequence
    frees: int  # pages that it alone owns
    pages: int  # that hold something
    lost_tokens: int  # that would be dropped: in pages that nobody else holds, and host memory has not
    out_pages: int | None  # that host memory lacks; None: it has no room, or it would not help
    remaining: int  # tokens until its end, at most
    returned: bool  # only just
    disk_pages: int | None = None  # that would be written to disk; None: host memory has room, or the disk has none, or it would not help


class Shortage(NamedTuple):
    """Who is in need, and of what."""

    pages: int
    leaving: int  # pages that will be free when moves under way have ended
    running: int  # sequences
    ends_in: int | None = None  # steps until neighbours have ended that need no page for it, and give back enough


class Decision(NamedTuple):
    """How somebody gives way, and why."""

    action: Action
    reason: Reason
    predicted_s: float = 0.0
    lost_tokens: int = 0  # as in `Candidate`


def relieve(
    shortage: Shortage, candidates: Some[Candidate], costs: Costs, mode: str = DECIDE, relief: Relief | None = None
) -> tuple[Sequence | None, Decision]:
    """Who gives way for a running sequence that needs pages, and how; None: it waits itself.

    Args:
        candidates: in scheduling order, without the first of all that run: it never gives way, so some sequence always advances. The one
            in need may be among them.
    """
    if shortage.leaving >= shortage.pages or not candidates:
        return None, Decision(Action.WAIT, Reason.LEAVING)
    if mode != DECIDE:
        return candidates[-1].victim, give_way(candidates[-1], costs, mode, relief)
    lowest = max(c.victim.priority for c in candidates)
    victims = [c for c in candidates if c.victim.priority == lowest]
    for better in (lambda c: not c.returned, lambda c: c.frees > 0):
        victims = [c for c in victims if better(c)] or victims
    decisions = [(c, give_way(c, costs, mode, relief)) for c in reversed(victims)]
    victim, best = min(decisions, key=lambda some: some[1].predicted_s / worth(some[0]))
    if shortage.ends_in is not None:
        wait_s = shortage.ends_in * costs.step_s / shortage.running
        if wait_s <= best.predicted_s:
            return None, Decision(Action.WAIT, Reason.ENDING, wait_s)
    return victim.victim, best


def worth(candidate: Candidate) -> float:
    """The pages that the victim alone owns, discounted by how near its end it is; never 0."""
    return max(candidate.frees, 0.1) * candidate.remaining / (candidate.remaining + HALF_WORTH_TOKENS)


def give_way(candidate: Candidate, costs: Costs, mode: str = DECIDE, relief: Relief | None = None) -> Decision:
    """How one victim gives way: the cheapest, or what the mode says; if that is not possible, by recompute."""
    found = prices(candidate, costs, relief)
    if mode != DECIDE:
        action = Action(mode)
        if action is Action.SWAP and action not in found and Action.SUSPEND in found:
            action = Action.SUSPEND
        reason = Reason.MODE if action in found else Reason.ONLY
        action = action if action in found else Action.RECOMPUTE
    else:
        action = min(found, key=lambda a: found[a])
        reason = Reason.CHEAPEST if len(found) > 1 else Reason.ONLY
    return Decision(action, reason, found[action], candidate.lost_tokens)


def prices(candidate: Candidate, costs: Costs, relief: Relief | None) -> dict[Action, float]:
    """What each action that is possible costs, in seconds; what is preferred at the same price comes first."""
    found: dict[Action, float] = {}
    if candidate.out_pages is not None:
        found[Action.SWAP] = _seconds(costs.out_queue + candidate.out_pages, costs.out_pages_per_s) + _seconds(
            costs.in_queue + candidate.frees, costs.in_pages_per_s
        )
    if candidate.disk_pages is not None:
        found[Action.SUSPEND] = _seconds(costs.save_queue + candidate.disk_pages, costs.save_pages_per_s) + _seconds(
            costs.load_queue + candidate.frees, costs.load_pages_per_s
        )
    if relief is not None and relief.pages >= candidate.pages:
        found[Action.MIGRATE] = _seconds(candidate.pages, costs.link_pages_per_s) + costs.handshake_s
    found[Action.RECOMPUTE] = _seconds(candidate.lost_tokens * costs.again, costs.prefill_tokens_per_s)
    return found


def worth_bringing(pages: int, tokens: int, costs: Costs) -> bool:
    """Whether a prefix of `tokens` that lies in `pages` of host memory is copied in, rather than computed again."""
    compute_s = _seconds(tokens, costs.prefill_tokens_per_s)
    return not compute_s or _seconds(costs.in_queue + pages, costs.in_pages_per_s) <= compute_s


def make_way(running: Some[Sequence], newcomer: Sequence, enough: Callable[[Sequence], bool]) -> list[Sequence]:
    """Who gives way for a sequence that waits: the fewest, from the end of `running`, all of a strictly lower priority.

    Nobody does when even all of these together would not be enough. Between equals nobody ever does, and who gave way is behind the
    newcomer in the order, so the two cannot drive each other out in turn.

    Args:
        running: in scheduling order.
        newcomer: the head of those that wait.
        enough: told of one victim after the other, says whether the newcomer can start without those told so far.
    """
    victims: list[Sequence] = []
    for victim in reversed(running):
        if victim.priority <= newcomer.priority:
            return []
        victims.append(victim)
        if enough(victim):
            return victims
    return []


def _seconds(amount: float, per_s: float) -> float:
    return amount / per_s if per_s else 0.0
