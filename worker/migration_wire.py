"""What two replicas say to each other while a request moves, or while pages of a prefix are copied. Pure.

    source                                   destination
      Offer     who, its sequences       ->
                                         <-  Accept     what it already has, the link  (or Abort: it refuses)
      Pages     room for so many         ->
                                         <-  Ready      a RECEIVE for them has been started
      ... SEND: full pages, while the request goes on; again Pages, Ready, until little is left ...
      Commit    the last SEND, frozen    ->
                                         <-  Committed  it goes on here  (or Abort: it does not, and never will)
      Abort     from either, at any time

Every message may be lost, doubled or late. The source repeats its latest one until it hears an answer, and from time to time even then:
that is its lease at the destination. A migration is named by a nonce that is never used again.
"""

from __future__ import annotations

from typing import NamedTuple

from .snapshot import SequenceSnapshot
from .strict_wire import BadMessage, pack, unpack


class Peer(NamedTuple):
    """The other replica of a migration, in one life of it; `actor` is the name by which it is called."""

    actor: str
    replica_id: str
    epoch: int


class Format(NamedTuple):
    """What must be the same at both ends for pages to mean the same; `kv` names shape and type of a page."""

    model: str
    page_size: int
    kv: str


class Offer(NamedTuple):
    """Will you take this?

    Attributes:
        format: of the pages.
        tp: ranks of the source.
        tenant: whose pages they are.
        ingress: whoever reads the stream; empty when only pages are copied.
        trace: `GenerateRequest.trace`.
        deadline_ms: how long it may still wait for its first step; None for ever.
        prompt_tokens, ended_tokens: of the whole request (`sequence.Request`).
        sequences: those that have not ended; of a copy of pages one, whose tokens are the prefix.
        pages: distinct pages that hold something of them; 0: nothing was computed, so nothing travels.
        running: how many of the sequences run.
    """

    format: Format
    tp: int
    tenant: str
    ingress: str
    trace: str
    deadline_ms: int | None
    prompt_tokens: int
    ended_tokens: int
    sequences: tuple[SequenceSnapshot, ...]
    pages: int
    running: int


class Accept(NamedTuple):
    """Yes. The link is called as the migration.

    Attributes:
        found: how many pages at the head of each of the offer's sequences need not be sent.
        tp, addresses: the ranks of the destination, and where they listen.
    """

    found: tuple[int, ...]
    tp: int
    addresses: tuple[str, ...]


class Pages(NamedTuple):
    """Make room for up to `room` pages. Rounds are numbered from 0; the n-th SEND goes into the n-th round."""

    round: int
    room: int


class Ready(NamedTuple):
    """There is room for the pages of this round."""

    round: int


class Moving(NamedTuple):
    """One sequence as it was when it was frozen.

    Attributes:
        choice: which.
        gained: output tokens since the offer.
        cached_tokens: as in its snapshot.
        num_computed: tokens whose keys and values are in its pages.
        table: where its pages came, behind those that the destination had: ordinals, in the order in which pages were sent.
    """

    choice: int
    gained: tuple[int, ...]
    cached_tokens: int | None
    num_computed: int
    table: tuple[int, ...]


class Commit(NamedTuple):
    """The source has stopped it; it is yours. `sent` pages were sent, in `rounds` rounds; `ended_tokens` as in the offer."""

    sequences: tuple[Moving, ...]
    sent: int
    rounds: int
    ended_tokens: int


class Committed(NamedTuple):
    """It goes on here."""


class Abort(NamedTuple):
    """It stays where it is."""

    reason: str


Message = Offer | Accept | Pages | Ready | Commit | Committed | Abort


class Envelope(NamedTuple):
    """A message, of which migration, and who sends it."""

    sender: Peer
    migration: str
    message: Message


class _Sealed(NamedTuple):
    sender: Peer
    migration: str
    kind: int
    body: bytes


_KINDS: tuple[type[Message], ...] = (Offer, Accept, Pages, Ready, Commit, Committed, Abort)


def pack_message(envelope: Envelope) -> bytes:
    """A message as msgpack."""
    return pack(_Sealed(envelope.sender, envelope.migration, _KINDS.index(type(envelope.message)), pack(envelope.message)))


def grammars_of(data: bytes) -> set[str]:
    """The grammars of the sequences that a message offers; none when it offers none, or is no message."""
    try:
        message = unpack_message(data).message
    except BadMessage:
        return set()
    return {s.params.grammar for s in message.sequences if s.params.grammar} if isinstance(message, Offer) else set()


def unpack_message(data: bytes) -> Envelope:
    """The inverse of `pack_message`.

    Raises:
        BadMessage: the bytes are not a message, or a snapshot in it is damaged or of another version.
    """
    sealed = unpack(_Sealed, data)
    if not 0 <= sealed.kind < len(_KINDS):
        raise BadMessage(f"there is no message of kind {sealed.kind}")
    return Envelope(sealed.sender, sealed.migration, unpack(_KINDS[sealed.kind], sealed.body))
