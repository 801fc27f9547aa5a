"""The ranks' own connections, several ranks as threads of one process: messages of every length, sums, what an absent rank gives."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch

from quire.worker.parallel import PACKET_BYTES, GroupBroken, Membership, RankGroup, join, lead
from quire.worker.rendezvous import LOOPBACK, address_of, listen

CPU = torch.device("cpu")
WAIT_S = 120.0


def on_each(size: int, do: Callable[[RankGroup], Any], broken: list[str] | None = None, limit_s: float = 30.0) -> list[Any]:
    """What `do` returns on each of `size` ranks; what their groups said when they broke goes to `broken`."""
    said: list[str] = [] if broken is None else broken
    listener = listen(LOOPBACK)
    address = address_of(listener)

    def rank(k: int) -> Any:
        group = join(address, Membership(k, size, limit_s, said.append), CPU) if k else lead(listener, size, limit_s, said.append, CPU)
        try:
            return do(group)
        finally:
            group.close()

    with ThreadPoolExecutor(size) as threads:
        found = [answer.result(WAIT_S) for answer in [threads.submit(rank, k) for k in range(size)]]
    assert broken is not None or not said
    return found


@pytest.mark.parametrize("size", [2, 3, 5])
def test_sums_and_gathered_tensors(size: int) -> None:
    rows = torch.randn(size, 7, 33, generator=torch.Generator().manual_seed(0))
    in_order = rows[0].clone()
    for row in rows[1:]:
        in_order += row

    def do(group: RankGroup) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        return group.sum(rows[group.rank].clone()), group.gather(rows[group.rank][:, 1:])

    for rank, (total, gathered) in enumerate(on_each(size, do)):
        assert torch.equal(total, in_order)  # the same bits, however many numbers
        assert (gathered is None) == (rank != 0)
        if gathered is not None:
            assert all(torch.equal(got, row[:, 1:]) for got, row in zip(gathered, rows, strict=True))


def test_the_leaders_tensor_on_every_rank() -> None:
    def do(group: RankGroup) -> list[int]:
        x = torch.arange(3) + 10 * group.rank
        group.share(x)
        return x.tolist()

    assert on_each(3, do) == [[0, 1, 2]] * 3


def test_messages_of_every_length() -> None:
    messages = [bytes(i % 251 for i in range(n)) for n in (0, 1, PACKET_BYTES - 9, PACKET_BYTES - 8, PACKET_BYTES - 7, 3 * PACKET_BYTES, 5)]

    def do(group: RankGroup) -> list[bytes]:
        if group.leads:
            for message in messages:
                group.send(message)
            return messages
        return [group.receive() for _ in messages]

    assert on_each(3, do) == [messages] * 3


def test_every_rank_hears_every_other() -> None:
    said = [b"", b"longer than the others", b"x"]
    assert on_each(3, lambda group: group.exchange(said[group.rank])) == [said] * 3
    assert on_each(2, lambda group: group.exchange(b"")) == [[b"", b""]] * 2


def test_two_groups_live_side_by_side() -> None:
    def do(group: RankGroup) -> float:
        return float(group.sum(torch.ones(1))) if group.rank else float(group.sum(torch.ones(1))) + sum(on_each(2, lambda g: g.rank))

    assert on_each(2, do) == [3.0, 2.0]


def test_a_rank_that_does_not_answer_in_time_breaks_the_group() -> None:
    silent = threading.Event()

    def do(group: RankGroup) -> None:
        if group.rank:
            silent.wait(WAIT_S)
            return
        with pytest.raises(GroupBroken, match="a sum over the ranks failed"):
            group.sum(torch.ones(1))
        silent.set()

    on_each(2, do, broken=[], limit_s=0.5)


def test_nobody_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.worker.parallel._JOIN_TIMEOUT", timedelta(seconds=1))
    listener = listen(LOOPBACK)
    address = address_of(listener)
    listener.close()
    with pytest.raises(GroupBroken, match=f"rank 1: no leader at {address}"):
        join(address, Membership(1, 2, 5.0, lambda why: None), CPU)


def test_ranks_that_stay_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.worker.parallel._JOIN_TIMEOUT", timedelta(seconds=1))
    with pytest.raises(GroupBroken, match="the 3 ranks did not come together"):
        lead(listen(LOOPBACK), 3, 5.0, lambda why: None, CPU)
