"""Which decode rows begin with the same pages, with exact page ids, and when reading those once pays."""

import numpy as np
import pytest

from quire.worker.shared_prefix import EAGER_BYTES, GRAPH_BYTES, shared_pages, worth_sharing

GARBAGE = 1 << 28


@pytest.mark.parametrize(("tables", "kv_lens", "pages"), [
    ([[1, 2, 3], [1, 2, 4], [1, 2, 5]], [40, 33, 48], 2),
    ([[1, 2, 3], [1, 2, 3]], [48, 48], 3),  # all that they have
    ([[1, 2, 3], [1, 2, 3]], [47, 48], 2),  # the first one's third page is not whole
    ([[1, 2, 3], [1, 9, 3]], [48, 48], 1),  # alike again later does not count
    ([[1, 2], [3, 2]], [32, 32], 0),
    ([[1, GARBAGE], [1, GARBAGE]], [16, 17], 1),
    ([[1, GARBAGE], [1, GARBAGE]], [3, 32], 0),
    ([[1, 2, 3]], [48], 0),  # nobody to share with
])  # fmt: skip
def test_pages_that_all_rows_begin_with(tables, kv_lens, pages):
    assert shared_pages(np.array(tables, np.int32), np.array(kv_lens, np.int64), 16) == pages


def test_no_rows_share_nothing():
    assert shared_pages(np.zeros((0, 4), np.int32), np.zeros(0, np.int64), 16) == 0


def test_it_pays_by_what_is_not_read_again():
    page_bytes = 2**20
    assert not worth_sharing(1, 10**6, page_bytes, graphed=False)
    assert not worth_sharing(64, 0, page_bytes, graphed=False)
    assert worth_sharing(9, EAGER_BYTES // page_bytes // 8, page_bytes, graphed=False)
    assert not worth_sharing(9, EAGER_BYTES // page_bytes // 8, page_bytes, graphed=True)
    assert worth_sharing(9, GRAPH_BYTES // page_bytes // 8, page_bytes, graphed=True)
