"""A sequence as bytes: all that is needed to go on with it elsewhere or later, beside the pages themselves. Pure.

Where its sampler stands follows from tokens, parameters and seed. On disk: magic, version, checksum, then msgpack.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from .protocol import SamplingParams
from .strict_wire import BadMessage, pack, unpack

if TYPE_CHECKING:
    from .sequence import Sequence

MAGIC = b"quire-sequence"
VERSION = 2
_CHECKSUM_BYTES = 16


class SequenceSnapshot(NamedTuple):
    """One sequence as it stands; the fields are those of `sequence.Sequence`.

    Attributes:
        attempt: `GenerateRequest.attempt` of its request.
        num_computed: tokens whose keys and values are in its pages.
    """

    request_id: str
    attempt: int
    priority: int
    choice: int
    tokens: tuple[int, ...]
    prompt_len: int
    params: SamplingParams
    max_tokens: int
    seed: int
    cached_tokens: int | None
    num_computed: int

    @staticmethod
    def of(s: Sequence, attempt: int, computed: int) -> SequenceSnapshot:
        """A sequence as it stands, with so many tokens in its pages."""
        known = s.request_id, attempt, s.priority, s.choice, tuple(s.tokens), s.prompt_len, s.params, s.max_tokens, s.seed
        return SequenceSnapshot(*known, s.cached_tokens, computed)

    def to_bytes(self) -> bytes:
        """For a file: with what tells a damaged one from a whole one."""
        body = pack(self)
        return MAGIC + bytes([VERSION]) + _checksum(body) + body

    @staticmethod
    def from_bytes(data: bytes) -> SequenceSnapshot:
        """The inverse of `to_bytes`.

        Raises:
            BadMessage: it is something else, of another version, or damaged.
        """
        head = len(MAGIC)
        if data[:head] != MAGIC:
            raise BadMessage("not the snapshot of a sequence")
        if data[head : head + 1] != bytes([VERSION]):
            raise BadMessage(f"a snapshot of version {data[head : head + 1].hex()}; this is version {VERSION}")
        body = data[head + 1 + _CHECKSUM_BYTES :]
        if data[head + 1 : head + 1 + _CHECKSUM_BYTES] != _checksum(body):
            raise BadMessage("the snapshot is damaged: its checksum is wrong")
        return unpack(SequenceSnapshot, body)


def _checksum(body: bytes) -> bytes:
    return blake2b(body, digest_size=_CHECKSUM_BYTES).digest()
