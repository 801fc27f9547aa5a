"""A process at the other end of a link that dies, or stops, in the middle of a page: the move ends with an error, in time."""

from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing import get_context
from typing import Any

import pytest
from movers import WAIT_S, Replica, connect, plan, replicas
from ranks import spawn

from quire.worker import page_channel
from quire.worker.plan import LinkEnd, Move, MoveKind

FOUR = (0, 1, 2, 3)


def halfway(of_pages: Any, reached: Any) -> Any:
    """The first pages of a move, and then nothing, for ever."""

    def some(*args: Any) -> Any:
        for i, part in enumerate(of_pages(*args)):
            if i == 2:
                reached.set()
                threading.Event().wait()
            yield part

    return some


def sending_process(kind: str, address: str, reached: Any) -> None:
    replica = Replica(2, 1, link_kind=kind)
    kv = replica.ranks[0].kv
    kv.parts = halfway(kv.parts, reached)
    replica.start(plan(Move(0, MoveKind.SEND, FOUR, (), "link"), links=(LinkEnd("link", 1, (address,)),)))
    threading.Event().wait(600)


def receiving_process(kind: str, addresses: Any, reached: Any) -> None:
    replica = Replica(2, 1, link_kind=kind)
    kv = replica.ranks[0].kv
    kv.landings = halfway(kv.landings, reached)
    addresses.put(replica.addresses()[0])
    replica.start(plan(Move(0, MoveKind.RECEIVE, FOUR, (), "link"), links=(LinkEnd("link", 1, ()),)))
    threading.Event().wait(600)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "stops"])
@pytest.mark.parametrize("kind", ["host", "gloo"])
def test_of_the_sender(kind: str, how: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    if how is signal.SIGSTOP:  # which only a time-out can tell from a pause
        monkeypatch.setattr(page_channel, "TRANSFER_TIMEOUT_S", 0.5)
    reached = get_context("spawn").Event()
    with replicas((2, 1), (2, 1)) as (target, third):
        links = (LinkEnd("link", 1, ()),)
        target.start(plan(Move(0, MoveKind.RECEIVE, FOUR, (), "link"), Move(1, MoveKind.RECEIVE, (4,), (), "link"), links=links))
        process = spawn(sending_process, kind, target.addresses()[0], reached)
        try:
            assert reached.wait(WAIT_S)
            os.kill(process.pid, how)
            began_s = time.monotonic()
            first, second = target.ended(2)
            assert (first.move, second.move) == (0, 1)
            assert first.error is not None
            assert second.error is not None
            assert time.monotonic() - began_s < 10.0  # what a death takes to be heard of, and not the usual time-out of 20 s
            connect(third, target)
            target.start(plan(Move(2, MoveKind.RECEIVE, (5,), (), "r/0/nonce")))
            third.start(plan(Move(0, MoveKind.SEND, (1,), (), "r/0/nonce")))
            assert target.ended()[0].error is None  # other links go on
        finally:
            process.kill()
            process.join(WAIT_S)


@pytest.mark.parametrize("kind", ["host", "gloo"])
def test_of_the_receiver(kind: str) -> None:
    context = get_context("spawn")
    reached, addresses = context.Event(), context.Queue()
    process = spawn(receiving_process, kind, addresses, reached)
    try:
        with replicas((2, 1), link_kind=kind) as (source,):
            links = (LinkEnd("link", 1, (addresses.get(timeout=WAIT_S),)),)
            source.start(plan(Move(0, MoveKind.SEND, FOUR, (), "link"), links=links))
            assert reached.wait(WAIT_S)
            process.kill()
            process.join(WAIT_S)
            began_s = time.monotonic()
            source.ended()  # small pages may all have gone into the connection's buffer before
            number, error = 1, None
            while error is None:
                source.start(plan(Move(number, MoveKind.SEND, FOUR, (), "link")))
                error = source.ended()[0].error
                number += 1
            assert time.monotonic() - began_s < 10.0
    finally:
        process.kill()
        process.join(WAIT_S)
