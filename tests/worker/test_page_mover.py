"""Pages that travel: to host memory and back, and to the ranks of another replica, bit by bit; and whatever cuts them off."""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import pytest
import torch
from movers import CPU, PAGES, WAIT_S, connect, plan, replicas

from quire.worker import page_channel, page_lane, page_link, page_mover
from quire.worker.page_channel import Channel, LinkBroken
from quire.worker.page_link import Hello, Listener, dial
from quire.worker.plan import LinkEnd, Move, MoveKind
from quire.worker.rendezvous import LOOPBACK, listen
from quire.worker.reslice import Share

# --- host memory ---


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_come_back_bit_by_bit(verify: bool, dtype: torch.dtype) -> None:
    with replicas((2, 1), verify=verify, dtype=dtype) as (one,):
        before = one.ranks[0].kv.pool.clone()
        # The second reads what the first wrote; pages 1 and 2 are neighbours at both ends.
        one.start(plan(Move(0, MoveKind.OUT, (4, 1, 2), (2, 0, 1)), Move(1, MoveKind.IN, (0, 3), (0, 2))))
        first, second = one.ended(2)
        assert (first.move, first.pages, first.error, second.move, second.pages, second.error) == (0, 3, None, 1, 2, None)
        assert first.seconds > 0
        for page, source in {0: 1, 3: 4, 1: 1, 2: 2, 4: 4}.items():
            assert torch.equal(one.page(page), before[source])
        assert torch.equal(one.ranks[0].kv.host[1], before[2])
        assert one.ranks[0].mover.poll() == ()


def test_a_copy_that_raises_is_an_error_of_its_move_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with replicas((2, 1)) as (one,):
        kv = one.ranks[0].kv
        copy = kv.copy_out

        def some(pages: tuple[int, ...], host_pages: tuple[int, ...]) -> None:
            if pages == (1,):
                raise RuntimeError("no")
            copy(pages, host_pages)

        monkeypatch.setattr(kv, "copy_out", some)
        one.start(plan(Move(0, MoveKind.OUT, (1,), (0,)), Move(2, MoveKind.OUT, (2,), (0,))))
        assert [moved.error for moved in one.ended(2)] == ["no", None]


def test_what_is_damaged_in_host_memory_is_found_when_moves_are_verified() -> None:
    with replicas((2, 1), verify=True) as (one,):
        one.start(plan(Move(0, MoveKind.OUT, (1,), (0,))))
        one.ended()
        one.ranks[0].kv.host[0, 0, 0, 0, 0, 0] += 1
        one.start(plan(Move(1, MoveKind.IN, (2,), (0,))))
        (moved,) = one.ended()
        assert moved.error is not None
        assert "differ" in moved.error


def test_whatever_goes_wrong_a_move_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with replicas((2, 1), (2, 1)) as (source, target):
        source.start(plan(Move(0, MoveKind.OUT, (PAGES,), (0,))))  # there is no such page
        assert source.ended()[0].error is not None
        wrong = LinkEnd("wrong", 2, target.addresses())  # two ranks, one address
        source.start(plan(Move(1, MoveKind.SEND, (1,), (), "wrong"), links=(wrong,)))
        assert "1 addresses of 2 ranks" in (source.ended()[0].error or "")
        target.start(plan(Move(1, MoveKind.RECEIVE, (1,), (), "odd"), links=(LinkEnd("odd", 3, ()),)))
        assert "3 ranks" in (target.ended()[0].error or "")
        source.start(plan(Move(2, MoveKind.OUT, (1,), (0,))))  # and copies go on
        assert source.ended()[0].error is None


def test_a_move_has_ended_when_it_has_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    with replicas((2, 2)) as (one,):
        gate = threading.Event()
        late = one.ranks[1].kv
        copy = late.copy_out

        def gated(pages: tuple[int, ...], host_pages: tuple[int, ...]) -> None:
            assert gate.wait(WAIT_S)
            copy(pages, host_pages)

        monkeypatch.setattr(late, "copy_out", gated)
        one.start(plan(Move(0, MoveKind.OUT, (1,), (0,))))
        assert not one.ranks[0].woken.acquire(timeout=0.2)
        gate.set()
        assert one.ended()[0].error is None
        assert one.store.values == {}  # the report has been read, and is gone


def test_what_fails_on_one_rank_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    with replicas((2, 2)) as (one,):

        def fail(pages: tuple[int, ...], host_pages: tuple[int, ...]) -> None:
            raise RuntimeError("rank 1 cannot")

        monkeypatch.setattr(one.ranks[1].kv, "copy_out", fail)
        one.start(plan(Move(0, MoveKind.OUT, (1,), (0,))))
        assert one.ended()[0].error == "rank 1 cannot"


def test_a_rank_that_never_answers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_mover, "RANKS_TIMEOUT_S", 0.05)
    with replicas((2, 2)) as (one,):
        one.ranks[0].mover.start(plan(Move(0, MoveKind.OUT, (1,), (0,))))
        error = one.ended()[0].error
        assert error is not None
        assert "a rank has not moved" in error


# --- links ---

DEGREES = [(4, 1, 1), (4, 1, 2), (4, 2, 1), (4, 2, 4), (4, 4, 2), (4, 4, 1), (2, 4, 2), (2, 2, 4), (3, 3, 1)]


@pytest.mark.parametrize(("kv_heads", "source_tp", "target_tp"), DEGREES)
@pytest.mark.parametrize("kind", ["host", "gloo"])
@pytest.mark.parametrize("verify", [False, True])
def test_every_head_of_every_page_arrives(kv_heads: int, source_tp: int, target_tp: int, kind: str, verify: bool) -> None:
    with replicas((kv_heads, source_tp), (kv_heads, target_tp), link_kind=kind, verify=verify) as (source, target):
        connect(source, target)
        before = target.page(0).clone()
        target.start(plan(Move(0, MoveKind.RECEIVE, (5, 2, 3), (), "r/0/nonce"), Move(1, MoveKind.RECEIVE, (4, 0), (), "r/0/nonce")))
        source.start(plan(Move(7, MoveKind.SEND, (1, 4, 0), (), "r/0/nonce"), Move(8, MoveKind.SEND, (3,), (), "r/0/nonce")))
        assert [(m.move, m.pages, m.error) for m in source.ended(2)] == [(7, 3, None), (8, 1, None)]
        assert [(m.move, m.pages, m.error) for m in target.ended(2)] == [(0, 3, None), (1, 1, None)]
        for there, here in {5: 1, 2: 4, 3: 0, 4: 3}.items():
            assert torch.equal(target.page(there), source.page(here))
        assert torch.equal(target.page(0), before)  # there was room for it, and it did not come


@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1)])
def test_what_cannot_be_opened_goes_over_the_connection(failing: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    gloo, tried = page_channel._gloo, []

    def some(store: Any, rank: int, host: str) -> Any:
        tried.append(rank)
        if rank in failing:
            raise RuntimeError("no")
        return gloo(store, rank, host)

    monkeypatch.setattr(page_channel, "_gloo", some)
    for kind in ("gloo", "nccl"):  # pages on a CPU cannot travel over NCCL
        with replicas((2, 1), (2, 1), link_kind=kind) as (source, target):
            began_s = time.monotonic()
            connect(source, target)
            target.start(plan(Move(0, MoveKind.RECEIVE, (5,), (), "r/0/nonce")))
            source.start(plan(Move(0, MoveKind.SEND, (1,), (), "r/0/nonce")))
            assert target.ended()[0].error is None
            assert torch.equal(target.page(5), source.page(1))
            assert time.monotonic() - began_s < page_channel.MEET_TIMEOUT.total_seconds()  # neither waits for what will not come
    assert sorted(tried) == [0, 1]


def test_links_do_not_wait_for_each_other() -> None:
    with replicas((2, 1), (2, 1)) as (source, target):
        for link in ("a/0/1", "b/0/2"):
            connect(source, target, link)
        target.start(plan(Move(0, MoveKind.RECEIVE, (0,), (), "a/0/1"), Move(1, MoveKind.RECEIVE, (1,), (), "b/0/2")))
        source.start(plan(Move(0, MoveKind.SEND, (3,), (), "b/0/2")))
        assert [moved.move for moved in target.ended()] == [1]
        source.start(plan(Move(1, MoveKind.SEND, (2,), (), "a/0/1")))
        assert [moved.move for moved in target.ended()] == [0]
        assert torch.equal(target.page(0), source.page(2))
        assert torch.equal(target.page(1), source.page(3))


@pytest.mark.parametrize("kind", ["host", "gloo"])
@pytest.mark.parametrize("who", ["source", "target"])
def test_a_link_that_is_closed_ends_what_waits_on_it_at_both_ends(kind: str, who: str) -> None:
    with replicas((2, 1), (2, 1), link_kind=kind) as (source, target):
        connect(source, target)
        target.start(plan(Move(0, MoveKind.RECEIVE, (0,), (), "r/0/nonce"), Move(1, MoveKind.RECEIVE, (1,), (), "r/0/nonce")))
        source.start(plan(Move(0, MoveKind.SEND, (2,), (), "r/0/nonce")))
        assert target.ended()[0].error is None  # both ends are open, and the second RECEIVE waits
        began_s = time.monotonic()
        (source if who == "source" else target).start(plan(closed=("r/0/nonce",)))
        assert target.ended()[0].error is not None
        assert time.monotonic() - began_s < page_channel.TRANSFER_TIMEOUT_S / 2  # not by waiting for the time-out
        source.start(plan(Move(1, MoveKind.SEND, (3,), (), "r/0/nonce")))
        assert {moved.move: moved.error is None for moved in source.ended(2)}[1] is False


def test_a_peer_that_dies_in_mid_page_is_an_error_and_the_other_link_goes_on() -> None:
    with replicas((2, 1), (2, 1)) as (source, target):
        connect(source, target, "good")
        target.start(plan(Move(0, MoveKind.RECEIVE, (0,), (), "bad"), links=(LinkEnd("bad", 1, ()),)))
        channel = dial(target.addresses()[0], Hello("bad", 0, 0, "host"), CPU)
        channel.send(torch.tensor([1]))
        channel.send(source.page(1)[0, 0].contiguous())
        channel.close()
        (moved,) = target.ended()
        assert moved.error is not None
        target.start(plan(Move(1, MoveKind.RECEIVE, (1,), (), "good")))
        source.start(plan(Move(0, MoveKind.SEND, (2,), (), "good")))
        assert target.ended()[0].error is None


def test_more_pages_than_there_is_room_for_are_refused() -> None:
    with replicas((2, 1), (2, 1)) as (source, target):
        connect(source, target)
        before = target.ranks[0].kv.pool.clone()
        target.start(plan(Move(0, MoveKind.RECEIVE, (0,), (), "r/0/nonce")))
        source.start(plan(Move(0, MoveKind.SEND, (1, 2), (), "r/0/nonce")))
        error = target.ended()[0].error
        assert error is not None
        assert "room for 1" in error
        assert torch.equal(target.ranks[0].kv.pool, before)
        source.ended()  # it may all have gone into the connection's buffer
        began_s = time.monotonic()
        source.start(plan(Move(1, MoveKind.SEND, (1, 2), (), "r/0/nonce")))
        source.start(plan(Move(2, MoveKind.SEND, (1, 2), (), "r/0/nonce")))
        assert source.ended(2)[1].error is not None  # nobody reads any more, which the other end hears at once
        assert time.monotonic() - began_s < page_channel.TRANSFER_TIMEOUT_S / 2


def held() -> int:
    """Threads and file descriptors of this process."""
    return len(os.listdir("/proc/self/task")) + len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("kind", ["host", "gloo"])
def test_a_link_that_was_closed_leaves_nothing_behind(kind: str) -> None:
    with replicas((2, 1), (2, 1), link_kind=kind) as (source, target):
        before = held()
        for i in range(5):
            name = f"r/{i}"
            connect(source, target, name)
            target.start(plan(Move(i, MoveKind.RECEIVE, (5,), (), name)))
            source.start(plan(Move(i, MoveKind.SEND, (1,), (), name)))
            assert target.ended()[0].error is None
            assert source.ended()[0].error is None
            for replica in (source, target):
                replica.start(plan(closed=(name,)))
                replica.start(plan(Move(10 + i, MoveKind.SEND, (1,), (), name)))  # there is no such link any more
                assert replica.ended()[0].error is not None
        until_s = time.monotonic() + WAIT_S
        while held() > before + 3:  # torch may keep a thread or two of its own, but not for every link
            assert time.monotonic() < until_s, (before, held())
            time.sleep(0.01)


def test_a_link_that_nobody_opens_or_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_link, "ARRIVAL_TIMEOUT_S", 0.1)
    with replicas((2, 1), (2, 1)) as (source, target):
        target.start(plan(Move(0, MoveKind.RECEIVE, (0,), (), "a"), Move(1, MoveKind.RECEIVE, (1,), (), "b"), links=(LinkEnd("a", 1, ()),)))
        errors = {moved.move: moved.error or "" for moved in target.ended(2)}
        assert "did not come" in errors[0]
        assert "no link" in errors[1]
        source.start(plan(Move(0, MoveKind.SEND, (1,), (), "x"), links=(LinkEnd("x", 1, target.addresses()),)))  # nobody expects it
        assert source.ended()[0].error is not None


def test_a_stranger_that_dawdles_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_link, "DIAL_TIMEOUT_S", 0.3)
    listener = Listener(listen(LOOPBACK), CPU)
    host, port = listener.address.split(":")
    with socket.create_connection((host, int(port)), WAIT_S) as stranger:
        stranger.sendall(b"\x80\0\0\0")  # 128 bytes come, one every now and then
        until_s = time.monotonic() + WAIT_S
        sent = 0
        with suppress(ConnectionError):
            while time.monotonic() < until_s:
                sent += stranger.send(b"\0")
                time.sleep(0.05)
        assert sent < 128
    listener.close()


def test_a_connection_that_cannot_be_taken_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = Listener(listen(LOOPBACK), CPU)
    accept, failures = socket.socket.accept, [OSError("too many open files")]

    def failing(self: socket.socket) -> tuple[socket.socket, Any]:
        if failures:
            raise failures.pop()
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", failing)
    for link in ("a", "b"):  # the listener waits for the first one already
        dialled: queue.Queue[Channel] = queue.Queue()
        threading.Thread(target=lambda link=link, to=dialled: to.put(dial(listener.address, Hello(link, 0, 0, "host"), CPU))).start()
        listener.accept(link, 0, 0).close()
        dialled.get(timeout=WAIT_S).close()
    assert not failures
    listener.close()


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x05\x00\x00\x00\xc1\xc1\xc1\xc1\xc1", b"\xff\xff\xff\x7f"])
def test_a_stranger_is_turned_away(said: bytes) -> None:
    listener = Listener(listen(LOOPBACK), CPU)
    host, port = listener.address.split(":")
    with socket.create_connection((host, int(port)), WAIT_S) as stranger:
        stranger.sendall(said)
        stranger.shutdown(socket.SHUT_WR)
        stranger.settimeout(WAIT_S)
        with suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
    listener.close()
    with pytest.raises(LinkBroken):
        dial(listener.address, Hello("a", 0, 0, "host"), CPU)


def test_the_same_pair_cannot_come_twice() -> None:
    listener = Listener(listen(LOOPBACK), CPU)
    refused = threading.Event()

    def knock() -> None:
        try:
            dial(listener.address, Hello("a", 0, 0, "host"), CPU).close()
        except LinkBroken:
            refused.set()

    threads = [threading.Thread(target=knock) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert refused.wait(WAIT_S)
    listener.accept("a", 0, 0).close()  # whoever came first
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    listener.close()


def test_a_rank_that_is_late_with_a_move_that_was_given_up_writes_nothing_after_the_next_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    send = page_lane.Ends._send

    def late(ends: page_lane.Ends, share: Share, channel: Channel, pages: tuple[int, ...]) -> None:
        assert share.target == 0 or gate.wait(WAIT_S)
        send(ends, share, channel, pages)

    monkeypatch.setattr(page_lane.Ends, "_send", late)
    monkeypatch.setattr(page_mover, "RANKS_TIMEOUT_S", 0.05)
    with replicas((2, 1), (2, 2)) as (source, target):
        connect(source, target)
        target.start(plan(Move(3, MoveKind.RECEIVE, (4,), link="r/0/nonce")))
        source.start(plan(Move(0, MoveKind.SEND, (1,), link="r/0/nonce")))
        (moved,) = target.ended()
        assert "a rank has not moved its pages" in (moved.error or "")
        target.start(plan(fenced=(3,)))
        pool = target.ranks[1].kv.pool
        pool[4] = 7.0  # it is somebody else's now
        gate.set()
        assert source.ended()[0].error is not None
        target.start(plan(closed=("r/0/nonce",)))
        assert bool((pool[4] == 7.0).all())


def test_a_copy_that_was_given_up_is_waited_for_and_those_behind_it_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, gate = threading.Event(), threading.Event()
    with replicas((2, 1)) as (one,):
        kv = one.ranks[0].kv
        copy = kv.copy_out

        def slow(pages: tuple[int, ...], host_pages: tuple[int, ...]) -> None:
            begun.set()
            assert gate.wait(WAIT_S)
            copy(pages, host_pages)

        monkeypatch.setattr(kv, "copy_out", slow)
        monkeypatch.setattr(page_mover, "FENCE_TIMEOUT_S", 0.05)
        moves = [Move(i, MoveKind.OUT, (i,), (i,)) for i in range(3)]
        one.start(plan(*moves))
        assert begun.wait(WAIT_S)
        with pytest.raises(RuntimeError, match="move 0 was given up"):
            one.start(plan(fenced=(0,)))
        with pytest.raises(RuntimeError, match="move 1 was given up"):  # it has not even begun
            one.start(plan(fenced=(1,)))
        gate.set()
        assert [moved.error for moved in one.ended(3)] == [None, "it was given up", None]
        one.start(plan(fenced=(0, 1)))
