"""The page pool with exact page ids."""

import pytest

from quire.worker.page_pool import PagePool, PoolCorrupt, PoolCounts


def filled(pool: PagePool, tokens: list[int], salt: str = "") -> list[int]:
    """Pages that hold `tokens`, computed, indexed and released."""
    size, parent = pool.page_size, pool.root(salt)
    pages = pool.allocate(pool.pages_for(len(tokens)))
    for i in range(len(tokens) // size):
        parent = pool.register(pages[i], parent, tokens[i * size : (i + 1) * size])
    pool.release(pages)
    return pages


def test_pages_go_out_in_order_and_the_last_freed_comes_first():
    pool = PagePool(4, 2)
    assert pool.allocate(3) == [0, 1, 2]
    pool.release([0, 1])
    assert pool.allocate(2) == [0, 1]  # released from the tail, so the head was freed last
    assert pool.allocate(2) is None
    assert pool.counts() == PoolCounts(total=4, free=1, cached=0, active=3, reserved=0)
    pool.check([[0, 1, 2]])


def test_cached_pages_are_evicted_last_and_least_recently_released_first():
    pool = PagePool(4, 2)
    assert filled(pool, [1, 2, 3, 4]) == [0, 1]
    assert filled(pool, [5, 6]) == [2]
    assert pool.counts() == PoolCounts(total=4, free=1, cached=3, active=0, reserved=0)
    assert pool.allocate(2) == [3, 1]  # the free page, then the tail of the older prefix
    assert pool.find(pool.root(""), [1, 2, 3, 4], 2)[0] == [0]
    assert pool.find(pool.root(""), [5, 6], 1)[0] == [2]
    pool.check([[3, 1]])


def test_a_hit_moves_a_page_out_of_the_way_of_eviction():
    pool = PagePool(2, 2)
    filled(pool, [1, 2])
    filled(pool, [3, 4])
    pages, _ = pool.find(pool.root(""), [1, 2], 1)
    assert pool.cached_among(pages) == 1
    pool.retain(pages)
    assert pool.cached_among(pages) == 0
    pool.release(pages)
    assert pool.allocate(1) == [1]


def test_only_pages_of_the_same_chain_and_tenant_are_found():
    pool = PagePool(8, 2)
    filled(pool, [1, 2, 3, 4], salt="a")
    root = pool.root("a")
    assert pool.find(root, [1, 2, 3, 4, 5], 2)[0] == [0, 1]
    assert pool.find(root, [1, 2, 3, 4, 5], 1)[0] == [0]
    assert pool.find(root, [3, 4], 1)[0] == []  # the same tokens at another place in a sequence
    assert pool.find(pool.root("b"), [1, 2], 1)[0] == []
    assert PagePool(8, 2, b"another key").root("a") != root


def test_a_collision_is_a_miss(monkeypatch):
    monkeypatch.setattr("quire.worker.page_pool.page_hash", lambda key, parent, content: b"the same for all")
    pool = PagePool(8, 2)
    filled(pool, [1, 2])
    assert pool.find(pool.root(""), [3, 4], 1)[0] == []
    assert pool.find(pool.root("other"), [1, 2], 1)[0] == []
    assert pool.find(pool.root(""), [1, 2], 1)[0] == [0]


def test_the_first_page_with_a_content_is_the_one_that_is_found():
    pool = PagePool(4, 2)
    first, second = pool.allocate(2)
    root = pool.root("")
    assert pool.register(first, root, [1, 2]) == pool.register(second, root, [1, 2])
    pool.release([first, second])
    assert pool.counts() == PoolCounts(total=4, free=3, cached=1, active=0, reserved=0)
    assert pool.find(root, [1, 2], 1)[0] == [first]
    pool.check([])


def test_a_shared_or_findable_page_is_not_writable():
    pool = PagePool(4, 2)
    (page,) = pool.allocate(1)
    assert pool.writable(page)
    pool.retain([page])
    assert not pool.writable(page)
    pool.release([page])
    pool.register(page, pool.root(""), [1, 2])
    assert not pool.writable(page)


def test_pages_in_transit_are_neither_free_nor_findable_until_committed():
    pool = PagePool(4, 2)
    filled(pool, [1, 2])
    assert pool.reserve(5) is None
    pages = pool.reserve(4)
    assert pages == [1, 2, 3, 0]
    assert pool.available == 0
    assert pool.find(pool.root(""), [1, 2], 1)[0] == []
    pool.commit(pages[:2])
    pool.cancel(pages[2:])
    assert pool.counts() == PoolCounts(total=4, free=2, cached=0, active=2, reserved=0)
    assert pool.allocate(2) == [3, 0]
    pool.check([[1, 2], [3, 0]])


def test_without_a_prefix_cache_nothing_is_found():
    pool = PagePool(2, 2, prefix_cache=False)
    filled(pool, [1, 2])
    assert pool.counts().cached == 0
    assert pool.find(pool.root(""), [1, 2], 1)[0] == []


@pytest.mark.parametrize(
    "wrong",
    [
        lambda pool: pool.release([3]),
        lambda pool: pool.retain([3]),
        lambda pool: pool.commit([0]),
        lambda pool: pool.cancel([2, 2]),
        lambda pool: pool.register(3, b"", [1, 2]),
        lambda pool: pool.check([[0]]),
        lambda pool: pool.check([[0, 1], [1]]),
    ],
)
def test_wrong_books_are_not_kept(wrong):
    pool = PagePool(4, 2)
    pool.allocate(2)
    pool.reserve(1)
    pool.check([[0, 1]])
    with pytest.raises(PoolCorrupt):
        wrong(pool)


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="at least one token"):
        PagePool(1, 0)
    assert PagePool(3, 4).pages_for(9) == 3
