"""The step after the one that is being computed, planned before that has ended, so that the device need not wait for the host. Pure.

    step k on the device    |  plan k + 1, begin it behind k  |  k's tokens come: apply k  |  plan k + 2 ...

A plan holds counts and pages, no token values, so this is possible wherever a step's outcome does not decide who runs next: everybody
who runs is in the step under way, nobody could be admitted, pages suffice. A sequence that reaches its `max_tokens` is known to end and
left out. One that turns out to have ended by a token, to be aborted, or to have left, has a row in the next step already: what comes of
that row is dropped. It wrote only behind the sequence's last token, into a page that was the sequence's own when the step was issued,
and whoever is given that page next writes in a later step.

Where the outcome does decide there is no such plan, and the next one waits for the present step: a sequence with a grammar (what it allows
depends on the token's value) or prompt logprobs, a newcomer that has a place, a copy on write, a lack of pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .protocol import SamplingParams

if TYPE_CHECKING:
    from .scheduler import Scheduler
    from .sequence import Sequence

Planned = dict["Sequence", tuple[int, int]]


def rows_ahead(scheduler: Scheduler, under_way: Planned) -> Planned | None:
    """(start, count) of each sequence in the step after `under_way`, whose pages they then hold; None when that cannot be told yet."""
    if scheduler.arriving or any(s not in under_way for s in scheduler.running):
        return None
    left = scheduler.max_batch_tokens
    rows: Planned = {}
    chunks: Planned = {}
    for s in scheduler.running:
        start, count = under_way[s]
        end = start + count
        if _waits_for_outcome(s, end):
            return None
        if end < len(s.tokens):
            chunks[s] = (end, len(s.tokens) - end)
        elif s.num_output + 1 < s.max_tokens:
            rows[s] = (end, 1)
            left -= 1
    if chunks and scheduler.waiting:
        return None
    for s, (start, count) in chunks.items():
        if left > 0:
            rows[s] = (start, min(count, left))
            left -= rows[s][1]
    return rows if rows and _hold(scheduler, rows) else None


def _waits_for_outcome(s: Sequence, end: int) -> bool:
    """Whether what is computed up to `end` decides what `s`, or one that follows it, computes next."""
    return bool(s.followers and end >= s.prompt_len) or (end == len(s.tokens) and _needs_values(s.params))


def _needs_values(p: SamplingParams) -> bool:
    return bool(p.grammar) or p.prompt_logprobs is not None


def _hold(scheduler: Scheduler, rows: Planned) -> bool:
    pool = scheduler.pool
    missing = {s: max(pool.pages_for(start + count) - len(s.pages), 0) for s, (start, count) in rows.items()}
    firsts = ((s, start // pool.page_size) for s, (start, _) in rows.items())
    if any(first < len(s.pages) and not pool.writable(s.pages[first]) for s, first in firsts):
        return False
    pages = pool.allocate(sum(missing.values()))
    if pages is None:
        return False
    for s, count in missing.items():
        s.pages += [pages.pop() for _ in range(count)]
    return True
