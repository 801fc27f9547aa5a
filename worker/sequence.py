"""A sequence: its tokens, where its sampler stands, and the pages that hold its keys and values.

`num_computed` chases `num_tokens`. There are no phases: a prefill, a prefix hit and a sequence that comes back after a
preemption differ only in how far apart the two are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from .page_pool import Content
from .protocol import SamplingParams

if TYPE_CHECKING:
    from .decisions import Record


class State(Enum):
    """Where the scheduler keeps a sequence."""

    WAITING = auto()
    RUNNING = auto()
    ARRIVING = auto()  # holds a place and pages, some of which are still on their way from host memory
    FOLLOWING = auto()  # waits for its leader's prompt, whose pages it will share
    FROZEN = auto()  # another replica may have taken it over, and has not said so yet: not computed, but kept
    FINISHED = auto()


class Kept(NamedTuple):
    """What a sequence that was swapped out has in host memory, or on disk."""

    pages: list[int]  # of the host, in order; the last may be partly filled; none when they lie in a file
    contents: list[Content | None]  # of the same pages; None where it is not full
    computed: int  # tokens in them
    file: str = ""


class Arrival(NamedTuple):
    """A block table that is not whole yet."""

    pages: list[int]
    coming: list[int]  # those of `pages` that are reserved until their content is there
    hashes: list[bytes]
    computed: int  # tokens in them, then

    def shared(self) -> list[int]:
        """The pages that are held already."""
        coming = set(self.coming)
        return [page for page in self.pages if page not in coming]


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence of a request. Only the scheduler changes it.

    Attributes:
        seq: number, unique for the life of the replica.
        choice: its index among the request's sequences.
        tokens: prompt, then output.
        root: where the hash chain of its tenant starts.
        max_tokens: output tokens at most.
        order: what scheduling goes by: (priority, arrival, choice); smaller runs first and is preempted last.
        resumed: output tokens that it came with, from a replica that lost it.
        num_computed: tokens whose K and V are in `pages`.
        hashes: of the full pages at the head of `pages`, as far as they have been indexed.
        known_pages: how many of `pages` the runner has been told of; 0 when it does not know the sequence.
        cached_tokens: prompt tokens found in the prefix cache when it was first admitted; None before.
        recompute_until: tokens below it were computed before a preemption, so computing them again is a cost.
        followers: sequences of the same prompt (`n > 1`) that start from its pages.
        kept: what it left in host memory or on disk when it was swapped out.
        arrival: its pages while it is ARRIVING.
        safe_until: tokens until which it counts as just come back from host memory.
        decision: the latest about it, which its costs are charged to.
        lost_tokens: that went with its pages when it gave way, as far as its turn has not come since.
    """

    seq: int
    request_id: str
    choice: int
    tokens: list[int]
    prompt_len: int
    params: SamplingParams
    max_tokens: int
    seed: int
    root: bytes
    order: tuple[int, int, int]
    resumed: int = 0
    state: State = State.WAITING
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    known_pages: int = 0
    cached_tokens: int | None = None
    recompute_until: int = 0
    leader: Sequence | None = None
    followers: list[Sequence] = field(default_factory=list)
    kept: Kept | None = None
    arrival: Arrival | None = None
    safe_until: int = 0
    decision: Record | None = None
    lost_tokens: int = 0

    @property
    def num_output(self) -> int:
        """Output tokens so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def table(self) -> list[int]:
        """Its block table, with the pages that are still on their way."""
        return self.pages if self.arrival is None else self.arrival.pages

    @property
    def priority(self) -> int:
        """Lower goes first."""
        return self.order[0]


@dataclass(slots=True, eq=False)
class Request:
    """What the sequences of one request have in common. Only the scheduler changes it.

    Attributes:
        tenant: who pays for it.
        prompt_tokens: of all its prompts.
        sequences: those that have not ended, by choice.
        deadline_s: on the engine's clock: the first of its sequences must have started by then, or all end. None once one has, or
            when there is none.
        ended_tokens: output tokens of the sequences that ended.
        resumed_tokens: those of all output tokens that it came with.
        trace: `GenerateRequest.trace`.
    """

    request_id: str
    tenant: str
    priority: int
    prompt_tokens: int
    sequences: dict[int, Sequence]
    deadline_s: float | None = None
    ended_tokens: int = 0
    resumed_tokens: int = 0
    trace: str = ""

    @property
    def output_tokens(self) -> int:
        """Output tokens of all its sequences so far, those that it came with included."""
        return self.ended_tokens + sum(s.num_output for s in self.sequences.values())


def sequence_seed(seed: int, k: int) -> int:
    """The random key of sequence `k` of a prompt, in [0, 2**64): the request's own seed for the first, a hash of both after it."""
    if k == 0:
        return seed % 2**64
    return int.from_bytes(blake2b(f"{seed}/{k}".encode(), digest_size=8).digest(), "little")
