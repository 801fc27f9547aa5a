"""The page-major pool: one page is one contiguous span, and copies do what they say."""

from pathlib import Path

import pytest
import torch

from quire.worker import kv_store
from quire.worker.kv_store import KVStore, PageShape, copy_with_kernel

SHAPE = PageShape(kv_heads=2, layers=3, page_size=4, head_dim=8, dtype=torch.float32)


def numbered(pages: int = 6) -> KVStore:
    store = KVStore(SHAPE, pages, "cpu")
    store.pool.copy_(torch.arange(store.pool.numel()).view_as(store.pool))
    return store


def test_a_page_is_one_span_of_page_bytes() -> None:
    store = KVStore(SHAPE, 6, "cpu")
    assert store.page_bytes == SHAPE.page_bytes == 2 * 3 * 2 * 4 * 8 * 4
    assert store.pool.nbytes == 6 * store.page_bytes
    assert store.pool[3].is_contiguous()
    assert not store.pool.any()  # fresh memory is zeros


def test_layer_views_reach_the_same_memory() -> None:
    store = numbered()
    layer = store.layer(2)
    assert layer.shape == (6, 2, 2, 4, 8)
    layer[5, 1, 0, 3] = -1.0
    assert bool((store.pool[5, 1, 2, 0, 3] == -1).all())
    assert int((store.pool == -1).sum()) == 8


def test_copies_read_every_source_first() -> None:
    store = numbered()
    before = store.pool.clone()
    store.copy_pages([(0, 1), (1, 2), (5, 0)])
    for page, source in {0: 5, 1: 0, 2: 1, 3: 3, 4: 4, 5: 5}.items():
        assert torch.equal(store.pool[page], before[source])
    store.copy_pages([])
    assert torch.equal(store.pool[1], before[0])


def test_the_kernel_copies_the_same() -> None:
    store, pairs = numbered(8), [(0, 3), (5, 1), (0, 7)]
    before = store.pool.clone()
    copy_with_kernel(store.pool, pairs)
    for page in range(8):
        source = {3: 0, 1: 5, 7: 0}.get(page, page)
        assert torch.equal(store.pool[page], before[source])


def test_a_page_that_is_read_and_written_is_no_work_for_the_kernel() -> None:
    store, seen = numbered(), []
    before = store.pool.clone()
    store._kernel = lambda pool, pairs: seen.append(pairs)
    store.copy_pages([(0, 1), (1, 2)])
    assert torch.equal(store.pool[2], before[1])
    store.copy_pages([(0, 4)])
    assert seen == [[(0, 4)]]


@pytest.mark.parametrize("staged_pages", [1, 2, 9])
@pytest.mark.parametrize("single", [False, True])
def test_some_heads_of_pages_are_packed_and_unpacked(staged_pages: int, single: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_store, "STAGED_BYTES", staged_pages * SHAPE.page_bytes // 2)
    store, other = numbered(8), KVStore(SHAPE, 8, "cpu")
    store._kernel = other._kernel = copy_with_kernel
    sent = list(store.parts((6, 0, 3), slice(1, 2), single))
    assert [len(part) for part in sent] == ([1] * 3 if single else {1: [1] * 3, 2: [2, 1], 9: [3]}[staged_pages])
    for part, landing in zip(sent, other.landings((1, 7, 2), slice(0, 1), single), strict=True):
        assert part.is_contiguous()
        landing.copy_(part)
    assert torch.equal(other.pool[[1, 7, 2], 0], store.pool[[6, 0, 3], 1])
    assert not other.pool[:, 1].any()
    assert not other.pool[[0, 3, 4, 5, 6]].any()


class Locks:
    """In place of CUDA's run time: which memory is locked."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.locked: dict[int, int] = {}
        self.unlocked: list[bool] = []  # whether the memory was still there

    def cudaHostRegister(self, at: int, size: int, flags: int) -> int:  # noqa: N802
        self.locked[at] = size
        return self.error

    def cudaHostUnregister(self, at: int) -> None:  # noqa: N802
        del self.locked[at]
        lines = Path("/proc/self/maps").read_text().splitlines()
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
        self.unlocked.append(any(begin <= at < end for begin, end in ranges))


def test_pinned_memory_is_locked_as_long_as_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    locks = Locks()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: locks)
    host = kv_store._zeros((3, *SHAPE.dims), torch.float32, torch.device("cpu"), pinned=True)
    assert host.shape == (3, *SHAPE.dims)
    assert not host.any()
    assert locks.locked == {host.data_ptr(): 3 * SHAPE.page_bytes}
    view = host[1:]
    del host
    assert locks.locked, "a view holds it"
    del view
    assert not locks.locked
    assert locks.unlocked == [True]


def test_memory_that_may_not_be_locked_is_an_error_that_names_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Locks(error=2))
    with pytest.raises(RuntimeError, match=r"host_memory: 4096 bytes .* \(CUDA error 2\)"):
        kv_store._zeros((1024,), torch.float32, torch.device("cpu"), pinned=True)
