"""What an ingress asks of the controller, and what it hears. Pure data; only primitives travel."""

from __future__ import annotations

from typing import NamedTuple


class AdmitRequest(NamedTuple):
    """One client request on its way to a replica. Asking again with the same id and attempt is the same question.

    Attributes:
        request_id: unique among live requests.
        attempt: 0 at first, one more each time that a route turned out stale or a replica was lost. A later attempt replaces an
            earlier one, also in what has been sent to replicas.
        tenant: who pays.
        priority: lower goes first.
        waited_s: seconds since the ingress got it, so that arrival order survives a controller's restart.
        deadline_s: seconds that it may still wait; None for ever.
        sequences: that it starts.
        prompt_tokens: of all prompts; of a resumed request with the output tokens that must be computed again.
        max_tokens: output tokens of all its sequences at most.
        longest_tokens: prompt and output tokens of its longest sequence at most.
        hashes: of the full pages of its first prompt, head first.
        resumed: a replica has lost it: it goes first, and pays nothing again.
        avoid: replicas that refused it or died under it: taken when there is no other.
    """

    request_id: str
    attempt: int
    tenant: str
    priority: int
    waited_s: float
    deadline_s: float | None
    sequences: int
    prompt_tokens: int
    max_tokens: int
    longest_tokens: int
    hashes: tuple[bytes, ...] = ()
    resumed: bool = False
    avoid: tuple[str, ...] = ()


class Route(NamedTuple):
    """Where a request goes: one replica, in one life of it."""

    replica_id: str
    epoch: int
