"""The index of page hashes over replicas: exact answers, and a model to compare with."""

from __future__ import annotations

import random

import pytest

from quire.cluster.page_index import PageIndex

PAGES = [bytes([i]) * 16 for i in range(8)]
A, B, C, D = PAGES[:4]


def test_prefixes_are_counted_from_the_head_without_gaps():
    index = PageIndex()
    index.update("r0", [A, B], [])
    index.update("r1", [A, B, C], [])
    index.update("r2", [B, C], [])  # has no head
    index.update("r3", [A, C], [])  # has a gap
    assert index.longest_prefix([A, B, C]) == {"r0": 2, "r1": 3, "r3": 1}
    assert index.longest_prefix([B, C, D]) == {"r0": 1, "r1": 2, "r2": 2}
    assert index.longest_prefix([D, A]) == {}
    assert index.longest_prefix([]) == {}


def test_removed_pages_are_no_longer_found_where_they_were_removed():
    index = PageIndex()
    index.update("r0", [A, B], [])
    index.update("r1", [A, B], [])
    index.update("r0", [], [B, C])  # C was never there
    assert index.longest_prefix([A, B]) == {"r0": 1, "r1": 2}
    assert (index.count("r0"), index.count("r1"), len(index)) == (1, 2, 2)
    index.update("r1", [], [A, B])
    assert index.longest_prefix([A, B]) == {"r0": 1}
    assert (index.count("r1"), len(index)) == (0, 1)


def test_a_page_named_twice_counts_once():
    index = PageIndex()
    index.update("r0", [A, A], [])
    index.update("r0", [A], [])
    assert index.count("r0") == 1
    index.update("r0", [], [A, A])
    assert (index.count("r0"), len(index)) == (0, 0)


def test_a_page_removed_and_stored_in_one_update_is_there():
    index = PageIndex()
    index.update("r0", [A], [A])
    assert index.longest_prefix([A]) == {"r0": 1}


def test_a_forgotten_replica_is_not_found_and_the_others_are():
    index = PageIndex()
    index.update("r0", [A, B], [])
    index.update("r1", [A], [])
    index.forget("r0")
    index.forget("never there")
    assert index.longest_prefix([A, B]) == {"r1": 1}
    index.update("r0", [B], [])  # a new life
    assert index.longest_prefix([A, B]) == {"r1": 1}
    assert index.longest_prefix([B]) == {"r0": 1}


def test_what_is_beyond_the_bound_is_not_indexed_and_the_heads_stay():
    index = PageIndex(max_pages=3)
    index.update("r0", [A, B, C, D], [])
    assert index.longest_prefix([A, B, C, D]) == {"r0": 3}
    index.update("r1", [A, D], [])  # a page that is known takes no memory
    assert index.longest_prefix([A, D]) == {"r0": 1, "r1": 1}
    index.update("r0", [D], [C])
    assert index.longest_prefix([D]) == {"r0": 1}
    assert len(index) == 3


def test_pages_of_forgotten_replicas_make_room_when_the_bound_is_met():
    index = PageIndex(max_pages=2)
    index.update("r0", [A], [])
    index.update("r1", [B], [])
    index.forget("r0")
    index.update("r1", [C, D], [])
    assert index.longest_prefix([B, C]) == {"r1": 2}
    assert (len(index), index.count("r1")) == (2, 2)


def test_many_lives_leave_no_pages_behind():
    index = PageIndex()
    index.update("steady", [A], [])
    for life in range(100):
        index.update("flaky", [life.to_bytes(16, "big"), A], [])
        index.forget("flaky")
    assert len(index) <= 10
    assert index.longest_prefix([A]) == {"steady": 1}


@pytest.mark.parametrize("seed", range(20))
def test_it_answers_as_a_plain_model_does(seed: int):
    draw = random.Random(seed)
    index, model = PageIndex(), {}
    replicas = [f"r{i}" for i in range(12)]
    for _ in range(400):
        replica = draw.choice(replicas)
        held = model.setdefault(replica, set())
        if draw.random() < 0.15:
            index.forget(replica)
            del model[replica]
        else:
            removed, stored = draw.sample(PAGES, 2), draw.sample(PAGES, 3)
            index.update(replica, stored, removed)
            held.difference_update(removed)
            held.update(stored)
        chain = draw.sample(PAGES, 5)
        expected = {}
        for name, pages in model.items():
            length = next((i for i, page in enumerate(chain) if page not in pages), len(chain))
            if length:
                expected[name] = length
        assert index.longest_prefix(chain) == expected
        assert all(index.count(name) == len(pages) for name, pages in model.items())
