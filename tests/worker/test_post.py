"""Messages to other replicas: in order, without waiting, and a dead one is told of once it is called."""

from __future__ import annotations

import queue
from concurrent.futures import Future

from quire.worker.post import Post
from quire.worker.protocol import ReplicaLost

WAIT_S = 120.0


def done(error: Exception | None = None) -> Future[None]:
    answer: Future[None] = Future()
    answer.set_exception(error) if error else answer.set_result(None)
    return answer


def test_messages_are_handed_over_in_order_and_an_actor_is_looked_up_once() -> None:
    got: queue.Queue[tuple[str, bytes]] = queue.Queue()
    found: list[str] = []

    def find(actor):
        found.append(actor)
        return lambda data: (got.put((actor, data)), done())[1]

    post = Post(find, lambda actor: None)
    for i in range(5):
        post.send("ab"[i % 2], bytes([i]))
    assert [got.get(timeout=WAIT_S) for _ in range(5)] == [("ab"[i % 2], bytes([i])) for i in range(5)]
    assert found == ["a", "b"]


def test_who_is_dead_is_told_of_and_who_cannot_be_reached_is_not() -> None:
    lost: queue.Queue[str] = queue.Queue()
    got: queue.Queue[bytes] = queue.Queue()
    answers = {"died": done(ReplicaLost("died")), "away": done(ConnectionError("away"))}

    def find(actor):
        if actor == "none":
            raise ReplicaLost("there is no such actor")
        if actor == "odd":
            raise OSError("whatever")
        return lambda data: (got.put(data), answers[actor])[1]

    post = Post(find, lost.put)
    for actor in ("odd", "away", "none", "died", "died"):
        post.send(actor, actor.encode())
    assert [lost.get(timeout=WAIT_S) for _ in range(3)] == ["none", "died", "died"]
    assert [got.get(timeout=WAIT_S) for _ in range(3)] == [b"away", b"died", b"died"]
