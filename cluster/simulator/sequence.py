"""A request at a simulated replica."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Sequence:
    """One request; it has one sequence.

    While it decodes, `known`, `computed` and `pages` stand as they were when it joined its batch (`DecodeBatch.sync`).

    Attributes:
        priority, arrival: scheduling order, lower first.
        hashes: of the full pages of its prompt.
        known: tokens of its prompt and its output.
        computed: of those, the ones whose keys and values are in pages.
        pages: that it holds.
        shared: hashes of the pages among them that are findable by others.
        indexed: how many of `hashes` belong to pages that it has found or computed.
        cached_tokens: of its prompt, found when it first ran; None before.
        came_with: output tokens that it had when it came to its replica.
        joined: step of the batch at which it stands.
        first_s, last_s: when its first and its last output token were known.
    """

    request_id: str
    tenant: str
    prompt_tokens: int
    output_tokens: int
    hashes: tuple[bytes, ...] = ()
    priority: int = 0
    arrival: int = 0
    known: int = 0
    computed: int = 0
    pages: int = 0
    shared: list[bytes] = field(default_factory=list)
    indexed: int = 0
    cached_tokens: int | None = None
    came_with: int = 0
    joined: int = 0
    first_s: float | None = None
    last_s: float | None = None
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.known = self.prompt_tokens

    @property
    def order(self) -> tuple[int, int]:
        """Scheduling order."""
        return self.priority, self.arrival

    @property
    def generated(self) -> int:
        """Output tokens."""
        return self.known - self.prompt_tokens
