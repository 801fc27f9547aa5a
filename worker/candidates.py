"""What `pressure` is told: who might give way, what that would free, and what it would lose. Pure."""

from __future__ import annotations

from .pressure import WAIT_STEPS, Candidate, Shortage
from .sequence import Sequence, State
from .swapping import Swapping

CANDIDATES = 8  # so many from the end of the order, that a decision stays cheap; those before them are as safe as ever


def candidates(roster: Swapping) -> list[Candidate]:
    """Those of the running ones that may give way, in scheduling order: the last few, and never the first of all."""
    first = min((some[0] for some in (roster.running, roster.arriving) if some), key=lambda s: s.order)
    return [candidate(roster, s) for s in roster.running[-CANDIDATES:] if s is not first and s.request_id not in roster.emigrants]


def candidate(roster: Swapping, s: Sequence) -> Candidate:
    """What is known of `s` as a victim."""
    pool, size = roster.pool, roster.pool.page_size
    contents = roster.contents(s)
    own = [pool.references[page] == 1 for page in s.pages]
    gone = [mine and (content is None or roster.host.pages.holder(content) is None) for mine, content in zip(own, contents, strict=False)]
    scored = s.params.prompt_logprobs is not None and not s.num_output  # the runner would lose the scores
    leaves = any(own) and bool(contents) and not scored
    out_pages = roster.host.lacks(contents) if leaves else None
    return Candidate(
        victim=s,
        frees=sum(own),
        pages=len(contents),
        lost_tokens=min(sum(gone) * size, s.num_computed),
        out_pages=out_pages,
        remaining=s.max_tokens - s.num_output,
        returned=len(s.tokens) < s.safe_until,
        disk_pages=len(contents) if leaves and out_pages is None and roster.disk.holds(len(contents)) else None,
    )


def shortage(roster: Swapping, s: Sequence, pages: int) -> Shortage:
    """`s` lacks `pages` pages."""
    return Shortage(pages, roster.leaving(), len(roster.running), _ends_in(roster, s, pages))


def _ends_in(roster: Swapping, needy: Sequence, pages: int) -> int | None:
    """Steps until neighbours have ended that need no page for it, and give back enough."""
    pool, freed = roster.pool, 0
    ending = [s for s in roster.running if s is not needy and s.max_tokens - s.num_output <= WAIT_STEPS and _ends_within_pages(roster, s)]
    for s in sorted(ending, key=lambda s: s.max_tokens - s.num_output):
        freed += sum(pool.references[page] == 1 for page in s.pages)
        if freed >= pages:
            return s.max_tokens - s.num_output
    return None


def _ends_within_pages(roster: Swapping, s: Sequence) -> bool:
    if s.state is not State.RUNNING or len(s.tokens) - s.num_computed != 1:
        return False
    first = s.num_computed // roster.pool.page_size
    has_room = roster.pool.pages_for(s.prompt_len + s.max_tokens - 1) <= len(s.pages)
    return has_room and (first >= len(s.pages) or roster.pool.writable(s.pages[first]))
