"""How a request that comes from another replica is checked, and goes on here. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, Protocol

from .berth import Unfit
from .engine import Engine
from .migration_wire import Moving, Offer, Peer
from .protocol import BadRequest, GenerateRequest, SequenceOutput
from .snapshot import SequenceSnapshot
from .station import Placed


class Owner(NamedTuple):
    """Whose a request is."""

    ingress: str
    attempt: int


class Streams(Protocol):
    """The readers of outputs."""

    def owner(self, request_id: str) -> Owner | None:
        """The ingress that reads the request here, and on which attempt."""

    def can_take(self, request_id: str, owner: Owner) -> bool:
        """Whether there is a stream to that ingress, and the request is not here yet."""

    def take(self, request_id: str, owner: Owner, choices: int) -> None:
        """Its outputs go to that ingress from now on."""

    def tell(self, outputs: list[SequenceOutput]) -> None:
        """Give them to whoever reads them, now."""


class Arrivals:
    """Requests from one source (`berth.Arrivals`).

    Args:
        engine: where they go on.
        streams: who reads them.
        source: where they come from.
    """

    def __init__(self, engine: Engine, streams: Streams, source: Peer) -> None:
        self._engine = engine
        self._streams = streams
        self._source = source

    def check(self, offer: Offer) -> None:
        """As the protocol says; so below."""
        first = offer.sequences[0]
        same = first.request_id, first.attempt, first.priority, first.params
        if any((s.request_id, s.attempt, s.priority, s.params) != same for s in offer.sequences):
            raise Unfit("its sequences are not of one request")
        try:
            self._engine.door.check(_as_request(offer))
        except BadRequest as error:
            raise Unfit(str(error)) from None
        if not offer.ingress:
            return
        for s in offer.sequences:
            if not s.prompt_len <= len(s.tokens) < s.prompt_len + s.max_tokens <= s.prompt_len + self._engine.door.longest(s.prompt_len):
                raise Unfit(f"choice {s.choice} is longer than what is served here")
        if len(offer.sequences) > self._engine.room():
            raise Unfit("the queue is full")
        self._check_stream(offer)

    def install(self, offer: Offer, moved: dict[int, Moving], ended_tokens: int, placed: dict[int, Placed]) -> None:
        self._check_stream(offer)
        sequences = tuple(_grown(s, moved[s.choice], placed) for s in offer.sequences if s.choice in moved)
        for s in sequences:
            if not s.num_computed < len(s.tokens) < s.prompt_len + s.max_tokens or not all(
                0 <= t < self._engine.door.vocab_size for t in s.tokens
            ):
                raise Unfit(f"choice {s.choice} is not as it can be")
        self._engine.arrive(offer, sequences, ended_tokens, placed)
        self._streams.take(sequences[0].request_id, _owner(offer), len(sequences))
        peer = self._source.replica_id, self._source.epoch
        self._streams.tell(
            [SequenceOutput(s.request_id, s.choice, len(s.tokens) - s.prompt_len, (), peer=peer) for s in sequences]  # the first from here
        )

    def _check_stream(self, offer: Offer) -> None:
        if not self._streams.can_take(offer.sequences[0].request_id, _owner(offer)):
            raise Unfit("the request is here already, or there is no stream to its ingress")


def _owner(offer: Offer) -> Owner:
    return Owner(offer.ingress, offer.sequences[0].attempt)


def _grown(s: SequenceSnapshot, m: Moving, placed: dict[int, Placed]) -> SequenceSnapshot:
    computed = m.num_computed if s.choice in placed else 0
    return s._replace(tokens=s.tokens + m.gained, cached_tokens=m.cached_tokens, num_computed=computed)


def _as_request(offer: Offer) -> GenerateRequest:
    """What is offered, as if it had just been submitted: for the door, which then has checked all of it but where it stands."""
    first = offer.sequences[0]
    prompts: dict[int, tuple[int, ...]] = {}  # by their number
    for s in offer.sequences:
        prompt = s.tokens[: s.prompt_len]
        if prompts.setdefault(s.choice // max(first.params.n, 1), prompt) != prompt:
            raise Unfit("choices of one prompt have different ones")
    numbers = {number: i for i, number in enumerate(prompts)}
    resume = {
        numbers[s.choice // first.params.n] * first.params.n + s.choice % first.params.n: s.tokens[s.prompt_len :] for s in offer.sequences
    }
    params = first.params if offer.ingress else replace(first.params, max_tokens=None)
    return GenerateRequest(
        first.request_id, tuple(prompts.values()), params, first.priority, offer.tenant, None, resume, attempt=first.attempt
    )
