"""What is played: requests with lengths and times, and what became of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..messages import AdmitRequest


@dataclass(slots=True, eq=False)
class Job:
    """One request of a client, and what became of it. Times are seconds of the simulation, as the client sees them.

    Attributes:
        arrival_s: when it is sent.
        blocks: of its prompt, `block_tokens` tokens each; a block stands for all tokens up to its end, so that requests whose first
            blocks are the same share that prefix. Without any, nothing is shared.
        deadline_s: that it may wait for its turn.
        sent_s: when its route was decided.
        first_s, last_s: its first and its last output token.
        error: the name of the error that it got instead, at `error_s`.
    """

    request_id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    block_tokens: int = 0
    tenant: str = ""
    priority: int = 0
    deadline_s: float | None = None
    sent_s: float | None = None
    first_s: float | None = None
    last_s: float | None = None
    cached_tokens: int = 0
    error: str | None = None
    error_s: float = 0.0
    retry_after_s: float | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.first_s is None else self.first_s - self.arrival_s

    @property
    def over(self) -> bool:
        """It has had its answer."""
        return self.last_s is not None or self.error is not None

    def admission(self, hashes: tuple[bytes, ...], waited_s: float) -> AdmitRequest:
        """As its ingress asks for a route."""
        longest = self.prompt_tokens + self.output_tokens
        deadline_s = None if self.deadline_s is None else self.deadline_s - waited_s
        who, lengths = (self.request_id, 0, self.tenant, self.priority), (1, self.prompt_tokens, self.output_tokens, longest)
        return AdmitRequest(*who, waited_s, deadline_s, *lengths, hashes)


@dataclass(slots=True)
class PageNames:
    """Hashes of pages that hold the same prefix are the same object, since a trace names some millions of them.

    Args:
        page_size: tokens in a page.
    """

    page_size: int
    _of: dict[tuple[int, int], tuple[bytes, ...]] = field(default_factory=dict)

    def hashes(self, job: Job) -> tuple[bytes, ...]:
        """Of the full pages of its prompt: a page belongs to the block in which it ends."""
        names: list[bytes] = []
        for place, block in enumerate(job.blocks):
            key = (block, place)
            if key not in self._of:
                first, last = (at * job.block_tokens // self.page_size for at in (place, place + 1))
                self._of[key] = tuple(f"{block}.{i}".encode() for i in range(first, last))
            names += self._of[key]
        return tuple(names[: job.prompt_tokens // self.page_size])


def sorted_jobs(jobs: Iterable[Job]) -> list[Job]:
    """In the order of their arrival.

    Raises:
        ValueError: two have the same id, or a length is not positive.
    """
    found = sorted(jobs, key=lambda job: job.arrival_s)
    if len({job.request_id for job in found}) != len(found):
        raise ValueError("jobs: two have the same request_id")
    for job in found:
        if job.prompt_tokens < 1 or job.output_tokens < 1 or job.arrival_s < 0:
            raise ValueError(f"job {job.request_id}: lengths must be at least 1 and its arrival_s at least 0")
    return found
