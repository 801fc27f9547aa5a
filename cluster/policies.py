"""Which of the replicas that could take a request now gets it: filter, then policy, both pure functions over value snapshots.

The waiting line stays in the controller, where fairness, priorities and deadlines act. So a replica has room only for what it can
start soon: seats and pages that are free, and no more prompt tokens ahead than keep it busy until its next report.

`cost`, the default, predicts the time to first token, and adds what the request does to those that are there already:

    ttft_s     = (tokens ahead of it + its own that are not cached) / prefill tokens per second + one decode step, if any run
    pressure_s = pages that are missing, computed again  +  DECODE_TOKENS steps for each sequence, as slow as they are there

A session therefore goes where its pages are, unless the line there costs more than computing them elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..worker.protocol import ModelInfo, ReplicaLoad
from .ledger import Totals
from .messages import Route

LOOKAHEAD_S = 0.2  # prompt tokens that a replica may have ahead, in seconds of its speed
LOOKAHEAD_TOKENS = 512  # and at least so many: a step that is not full wastes the rest of it
URGENT_AHEAD = 4  # sequences of urgent requests on their way to a full replica at once
DECODE_TOKENS = 16  # decode steps by which `cost` weighs how slow a replica's decodes are


class ReplicaSnapshot(NamedTuple):
    """One replica as routing knows it at one moment, by `snapshot`. What follows from the rest stands here because it is asked often.

    Attributes:
        load: as last reported.
        sent: on its way and in no report yet.
        indexed_pages: pages of it that are known.
        last_choice: ordinal of the latest choice that fell on it; 0 before the first.
        longest_tokens: of one sequence, by the model's limit and by the pool.
        line: sequences that wait there, or may.
        ahead_tokens: that are to be computed before the first output of what comes next.
        pages_left: free or cached, and not spoken for; negative when there are too few. As the replica's own admission does, it
            leaves a quarter of a page for each running sequence to grow into.
    """

    replica_id: str
    epoch: int
    info: ModelInfo
    load: ReplicaLoad
    sent: Totals
    indexed_pages: int
    last_choice: int
    longest_tokens: int
    line: int
    ahead_tokens: int
    pages_left: int


def snapshot(
    route: Route, info: ModelInfo, load: ReplicaLoad, sent: Totals, indexed_pages: int = 0, last_choice: int = 0
) -> ReplicaSnapshot:
    """The replica that `route` names, with what follows from the rest."""
    spoken_for = -(-load.pending_tokens // info.page_size) + sent.pages + load.running // 4
    return ReplicaSnapshot(
        *route,
        info,
        load,
        sent,
        indexed_pages,
        last_choice,
        longest_tokens=min(info.max_model_len, info.pool_tokens),
        line=load.waiting + sent.sequences,
        ahead_tokens=load.pending_tokens + sent.tokens,
        pages_left=load.pages_free + load.pages_cached - spoken_for,
    )


class Demand(NamedTuple):
    """What a request asks of a replica. `usual_tokens_per_s` stands in for the speed of a replica that has measured none."""

    sequences: int
    prompt_tokens: int
    longest_tokens: int
    priority: int
    usual_tokens_per_s: float


class Candidate(NamedTuple):
    """A replica that could take the request, and how many tokens of its prompt it has cached."""

    replica: ReplicaSnapshot
    cached_tokens: int


# --- filter ---


def can_ever(replica: ReplicaSnapshot, demand: Demand) -> bool:
    """Whether the replica could hold the request if it were idle."""
    return demand.longest_tokens <= replica.longest_tokens and demand.sequences <= replica.info.max_sequences


def has_seats(replica: ReplicaSnapshot, demand: Demand, slack_tokens: int = 0) -> bool:
    """Whether the replica could start all sequences soon, as far as seats and the work ahead go.

    `slack_tokens` more may be ahead: those that the request saves there.
    """
    line = replica.line
    held = replica.load.running + line
    if held == 0:
        return True
    ahead_tokens = replica.ahead_tokens - slack_tokens
    if ahead_tokens > LOOKAHEAD_TOKENS and ahead_tokens > LOOKAHEAD_S * _speed(replica, demand):
        return False
    held += demand.sequences
    if held > replica.info.max_sequences:
        return False
    # A few more than run, so that a seat that becomes free is taken in the next step. What finds nobody before it may be larger.
    return line == 0 or held <= replica.info.max_running + max(1, replica.info.max_running // 16)


def has_pages(candidate: Candidate, demand: Demand) -> bool:
    """Whether its pages are free, or nobody waits: then it is the one that takes the next that become free."""
    return candidate.replica.line == 0 or missing_pages(candidate, demand) <= 0


def may_displace(replica: ReplicaSnapshot, demand: Demand) -> bool:
    """Whether it goes before something that runs there, so that a full replica makes room; a few at a time."""
    load, info = replica.load, replica.info
    return (
        demand.priority < load.lowest_priority
        and replica.sent.sequences < URGENT_AHEAD
        and load.waiting < info.max_running
        and load.running + replica.line + demand.sequences <= info.max_sequences
    )


def request_pages(candidate: Candidate, demand: Demand) -> int:
    """Pages that its prompts take beside the cached ones, and one for each sequence to write into."""
    return -((candidate.cached_tokens - demand.prompt_tokens) // candidate.replica.info.page_size) + demand.sequences


def missing_pages(candidate: Candidate, demand: Demand) -> int:
    """Pages that it needs beyond those that are left there; negative when some would still be left."""
    return request_pages(candidate, demand) - candidate.replica.pages_left


# --- predictions ---


class Prediction(NamedTuple):
    """What comes of sending the request there now: seconds until its first token, and seconds that it costs those that are there."""

    ttft_s: float
    pressure_s: float


def predict(candidate: Candidate, demand: Demand) -> Prediction:
    """By the formulas at the head of this file."""
    replica, cached_tokens = candidate
    load, speed = replica.load, _speed(replica, demand)
    ttft_s = (replica.ahead_tokens + demand.prompt_tokens - cached_tokens) / speed
    missing = missing_pages(candidate, demand)
    pressure_s = missing * replica.info.page_size / speed if missing > 0 else 0.0
    if load.running:
        ttft_s += load.decode_step_s
        pressure_s += DECODE_TOKENS * demand.sequences * load.decode_step_s
    return Prediction(ttft_s, pressure_s)


def _speed(replica: ReplicaSnapshot, demand: Demand) -> float:
    return replica.load.prefill_tokens_per_s or demand.usual_tokens_per_s


# --- policies ---


class Policy(NamedTuple):
    """How the one that gets the request is chosen.

    Attributes:
        choose: (candidates, never empty; the request; 64 random bits) -> one of them.
        waits: a replica that has pages of the prompt is a candidate even when more is ahead there, as much as those pages save.
    """

    choose: Callable[[Sequence[Candidate], Demand, int], Candidate]
    waits: bool = False


def round_robin(candidates: Sequence[Candidate], demand: Demand, draw: int) -> Candidate:
    """The one that has been passed over for longest."""
    return min(candidates, key=_turn)


def least_loaded(candidates: Sequence[Candidate], demand: Demand, draw: int) -> Candidate:
    """The one whose pool is taken up least, by pages in use and by tokens that have yet to be computed."""
    return min(candidates, key=_fullness)


def power_of_two(candidates: Sequence[Candidate], demand: Demand, draw: int) -> Candidate:
    """The less loaded of two that are drawn at random."""
    first = draw % len(candidates)
    second = (first + 1 + (draw >> 32) % (len(candidates) - 1)) % len(candidates) if len(candidates) > 1 else first
    return min(candidates[first], candidates[second], key=_fullness)


def cost(candidates: Sequence[Candidate], demand: Demand, draw: int) -> Candidate:
    """The one where time to first token and pressure are least together."""
    return min(candidates, key=lambda c: (sum(predict(c, demand)), c.replica.last_choice, c.replica.replica_id))


POLICIES: dict[str, Policy] = {
    "cost": Policy(cost, waits=True),
    "least_loaded": Policy(least_loaded),
    "power_of_two": Policy(power_of_two),
    "round_robin": Policy(round_robin),
}


def _turn(candidate: Candidate) -> tuple[int, str]:
    return candidate.replica.last_choice, candidate.replica.replica_id


def _fullness(candidate: Candidate) -> tuple[float, int, str]:
    replica = candidate.replica
    tokens = replica.load.pages_active * replica.info.page_size + replica.ahead_tokens
    return tokens / replica.info.pool_tokens, *_turn(candidate)
