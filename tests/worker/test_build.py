"""How large pools become, when they are told in bytes and when they are not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quire.worker import build
from quire.worker.config import CacheOptions, EngineOptions, ModelOptions, ParallelOptions

PAGE_BYTES = 1000


def host_pages(told: int | None, device: str, tp: int = 1, pages: int = 50) -> int:
    options = EngineOptions(cache=CacheOptions(host_memory=told), parallel=ParallelOptions(tp=tp))
    return build._num_host_pages(options, pages, PAGE_BYTES, torch.device(device))


@pytest.mark.parametrize(
    ("told", "device", "tp", "pages"),
    [
        (None, "cpu", 1, 0),  # the pool is host memory itself
        (0, "cuda", 1, 0),
        (9999, "cpu", 1, 9),
        (9999, "cuda", 4, 2),  # each rank holds its part of every page
        (None, "cuda", 1, 50),  # as many as the pool
        (None, "cuda", 10, 20),  # but not more than a quarter of 800,000 bytes for all ranks together
    ],
)
def test_the_host_pool_is_what_is_told_or_what_fits(told, device, tp, pages, monkeypatch) -> None:
    monkeypatch.setattr(build, "free_bytes", lambda: 800_000)
    assert host_pages(told, device, tp) == pages


def test_a_host_pool_without_a_page_is_refused() -> None:
    with pytest.raises(ValueError, match="host_memory: 1999 bytes hold no page; one page takes 2000 bytes"):
        host_pages(1999, "cpu", tp=2)


def test_a_gpu_s_pool_is_a_share_of_what_is_free_once_torch_keeps_nothing_back(monkeypatch) -> None:
    free = [2_000]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(40_000))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 100_000))
    assert build._num_pages(EngineOptions(), PAGE_BYTES, torch.device("cuda"), 1000) == 34


@pytest.mark.parametrize(
    ("told", "windows", "graphs", "shares"),
    [
        ({}, (None, None), True, True),
        ({}, (16, None), True, True),
        ({}, (16, 16), True, False),
        ({"cuda_graphs": False}, (None,), False, True),
        ({"deterministic": True}, (None,), True, False),  # a prefix that is read apart would change the bits
    ],
)
def test_graphs_are_made_and_prefixes_shared_unless_it_is_turned_off_or_changes_tokens(told, windows, graphs, shares, monkeypatch) -> None:
    monkeypatch.setattr(build, "CudaCapture", object)  # which needs a GPU
    rank: Any = SimpleNamespace(config=SimpleNamespace(sliding_windows=windows))
    how = build._decoding(rank, EngineOptions(model=ModelOptions(**told)))
    assert (how.capture is not None, how.share_prefixes) == (graphs, shares)
