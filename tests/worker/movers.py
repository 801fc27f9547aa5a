"""Movers for tests: the ranks of replicas in one process, without a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from quire.worker.kv_store import KVStore, PageShape
from quire.worker.page_link import Listener
from quire.worker.page_mover import PageMover, Place
from quire.worker.plan import LinkEnd, Move, Moved, StepPlan
from quire.worker.rendezvous import LOOPBACK, listen
from quire.worker.reslice import heads_of

CPU = torch.device("cpu")
LAYERS, PAGE_SIZE, DIM, PAGES = 3, 4, 8, 6
WAIT_S = 120.0


def plan(*moves: Move, links: tuple[LinkEnd, ...] = (), closed: tuple[str, ...] = (), fenced: tuple[int, ...] = ()) -> StepPlan:
    return StepPlan(0, (), (), (), (), (), moves, fenced, links, closed)


class Rank:
    """One rank's mover over six pages of random numbers and three in host memory."""

    def __init__(self, heads: int, place: Place, dtype: torch.dtype = torch.float32) -> None:
        self.kv = KVStore(PageShape(heads, LAYERS, PAGE_SIZE, DIM, dtype), PAGES, "cpu", host_pages=3)
        self.kv.pool.copy_(torch.randn(self.kv.pool.shape))
        self.listener = Listener(listen(LOOPBACK), CPU)
        self.mover = PageMover(self.kv, place, self.listener)
        self.woken = threading.Semaphore(0)
        self.mover.watch(self.woken.release)

    def ended(self, count: int = 1) -> list[Moved]:
        """The next `count` moves to end."""
        found: list[Moved] = []
        while len(found) < count:
            assert self.woken.acquire(timeout=WAIT_S)
            found += self.mover.poll()
        return found


class Store:
    """The store that ranks share, in one process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        self.values[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key]

    def delete_key(self, key: str) -> bool:
        return self.values.pop(key, None) is not None


class Replica:
    """The ranks of one replica, and the whole of each page as they hold it together."""

    def __init__(self, kv_heads: int, tp: int, **options: Any) -> None:
        self.kv_heads, self.tp, self.store = kv_heads, tp, Store()
        dtype = options.pop("dtype", torch.float32)
        reports = self.store if tp > 1 else None
        self.ranks = [Rank(len(heads_of(kv_heads, rank, tp)), Place(rank, tp, kv_heads, reports, **options), dtype) for rank in range(tp)]
        whole = torch.randn(PAGES, kv_heads, LAYERS, 2, PAGE_SIZE, DIM).to(dtype)
        for number, rank in enumerate(self.ranks):
            held = heads_of(kv_heads, number, tp)
            rank.kv.pool.copy_(whole[:, held.start : held.stop])

    def page(self, page: int) -> torch.Tensor:
        heads: dict[int, torch.Tensor] = {}
        for number, rank in enumerate(self.ranks):
            for i, head in enumerate(heads_of(self.kv_heads, number, self.tp)):
                assert head not in heads or torch.equal(heads[head], rank.kv.pool[page, i]), "the copies of a head differ"
                heads[head] = rank.kv.pool[page, i]
        return torch.stack([heads[head] for head in range(self.kv_heads)])

    def start(self, some: StepPlan) -> None:
        for rank in self.ranks:
            rank.mover.start(some)

    def addresses(self) -> tuple[str, ...]:
        return tuple(rank.listener.address for rank in self.ranks)

    def ended(self, count: int = 1) -> list[Moved]:
        return self.ranks[0].ended(count)


@contextmanager
def replicas(*shapes: tuple[int, int], **options: Any) -> Iterator[list[Replica]]:
    torch.manual_seed(0)
    found = [Replica(kv_heads, tp, **options) for kv_heads, tp in shapes]
    with ExitStack() as stack:
        for replica in found:
            for rank in replica.ranks:
                stack.callback(rank.mover.close)
        yield found


def connect(source: Replica, target: Replica, link: str = "r/0/nonce") -> None:
    target.start(plan(links=(LinkEnd(link, source.tp, ()),)))
    source.start(plan(links=(LinkEnd(link, target.tp, target.addresses()),)))
