"""Messages between replicas, and snapshots: what is read is what was written, or it is refused."""

import msgpack
import pytest

from quire.worker.migration_wire import (
    Abort,
    Accept,
    Commit,
    Committed,
    Envelope,
    Format,
    Moving,
    Offer,
    Pages,
    Peer,
    Ready,
    grammars_of,
    pack_message,
    unpack_message,
)
from quire.worker.protocol import SamplingParams
from quire.worker.snapshot import SequenceSnapshot
from quire.worker.strict_wire import BadMessage, pack, unpack

PARAMS = SamplingParams(n=2, logit_bias={3: 1.5}, stop=("x",), seed=7, logprobs=2)
SNAPSHOT = SequenceSnapshot("a", 2, -1, 1, (1, 2, 3), 2, PARAMS, 10, 2**64 - 1, None, 2)
MESSAGES = [
    Offer(Format("m", 4, "f32"), 2, "t", "i", "", 100, 2, 0, (SNAPSHOT, SNAPSHOT._replace(choice=0, cached_tokens=0)), 1, 2),
    Accept((1, 0), 4, ("127.0.0.1:1",)),
    Pages(0, 8),
    Ready(0),
    Commit((Moving(0, (5,), 0, 4, (0, 1)), Moving(1, (), None, 0, ())), 2, 1, 3),
    Committed(),
    Abort("no"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_what_is_read_is_what_was_written(message):
    envelope = Envelope(Peer("r0@3", "r0", 3), "r0/3/abc", message)
    assert unpack_message(pack_message(envelope)) == envelope
    assert type(unpack_message(pack_message(envelope)).message) is type(message)


def test_the_grammars_that_an_offer_brings():
    def packed(message):
        return pack_message(Envelope(Peer("r0@3", "r0", 3), "r0/3/abc", message))

    asks = [SNAPSHOT._replace(choice=i, params=SamplingParams(grammar=grammar)) for i, grammar in enumerate(["a", "", "b", "a"])]
    assert grammars_of(packed(MESSAGES[0]._replace(sequences=tuple(asks)))) == {"a", "b"}
    assert [grammars_of(packed(message)) for message in MESSAGES] == [set()] * len(MESSAGES)
    assert grammars_of(b"\xc1") == set()


def test_a_snapshot_survives_a_file():
    assert SequenceSnapshot.from_bytes(SNAPSHOT.to_bytes()) == SNAPSHOT


@pytest.mark.parametrize("at", [0, 14, 20, 60])
def test_a_damaged_snapshot_is_refused(at):
    data = bytearray(SNAPSHOT.to_bytes())
    data[at] ^= 1
    with pytest.raises(BadMessage):
        SequenceSnapshot.from_bytes(bytes(data))


def test_every_truncation_is_refused():
    data = pack_message(Envelope(Peer("r0@3", "r0", 3), "m", MESSAGES[0]))
    for end in range(len(data)):
        with pytest.raises(BadMessage):
            unpack_message(data[:end])


@pytest.mark.parametrize(
    "wrong",
    [
        SNAPSHOT._replace(seed=1.0),
        SNAPSHOT._replace(tokens=(1, "2")),
        SNAPSHOT._replace(tokens=5),
        SNAPSHOT._replace(cached_tokens=True),
        SNAPSHOT._replace(params=SamplingParams(logit_bias={"a": 1.0})),
        SNAPSHOT._replace(params=SamplingParams(temperature="hot")),
    ],
)
def test_a_field_of_another_type_is_refused(wrong):
    with pytest.raises(BadMessage, match=r"SequenceSnapshot\."):
        unpack(SequenceSnapshot, pack(wrong))


def test_a_kind_that_does_not_exist_is_refused():
    with pytest.raises(BadMessage, match="kind 9"):
        unpack_message(msgpack.packb([["a", "r0", 1], "m", 9, b""]))
