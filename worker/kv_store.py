"""The memory that pages are: one pool tensor of a rank, page-major, so that a page is one contiguous span.

Nothing outside this file and the kernels' strides knows the layout. Whose page is whose is `page_pool`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

CACHE_LINE = 64


@dataclass(frozen=True, slots=True)
class PageShape:
    """What one page holds on one rank: K and V of `page_size` consecutive tokens, for all layers."""

    kv_heads: int
    layers: int
    page_size: int
    head_dim: int
    dtype: torch.dtype

    @property
    def dims(self) -> tuple[int, int, int, int, int]:
        """(kv_heads, layers, 2, page_size, head_dim)."""
        return self.kv_heads, self.layers, 2, self.page_size, self.head_dim

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, for sizing a pool before it is made."""
        return prod(self.dims) * self.dtype.itemsize


class KVStore:
    """A pool [pages, kv_heads, layers, 2, page_size, head_dim], and another like it in host memory (pinned beside a GPU).

    Both start as zeros: nobody is handed memory that was another's.
    """

    def __init__(self, shape: PageShape, num_pages: int, device: torch.device | str, host_pages: int = 0) -> None:
        self.shape = shape
        self.num_pages = num_pages
        self.pool = _zeros((num_pages, *shape.dims), shape.dtype, torch.device(device))
        self.host = _host_zeros((host_pages, *shape.dims), shape.dtype, pinned=self.pool.is_cuda)
        self._layers = [self.pool[:, :, layer] for layer in range(shape.layers)]

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.shape.page_size

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.shape.page_bytes

    def layer(self, layer: int) -> Tensor:
        """The view [pages, kv_heads, 2, page_size, head_dim] that kernels read and write."""
        return self._layers[layer]

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy (source, destination) pages; every source is read before any destination is written."""
        if not pairs:
            return
        sources, destinations = torch.tensor(pairs, device=self.pool.device).unbind(1)
        self.pool[destinations] = self.pool[sources]

    def read_page(self, page: int) -> Tensor:
        """A copy of the page, contiguous, on the pool's device: [kv_heads, layers, 2, page_size, head_dim]."""
        return self.pool[page].clone()

    def write_page(self, page: int, data: Tensor) -> None:
        """The inverse of `read_page`; `data` may be on another device.

        Raises:
            ValueError: the shape or the type is not a page's.
        """
        if tuple(data.shape) != self.shape.dims or data.dtype != self.shape.dtype:
            raise ValueError(f"a page is {self.shape.dims} {self.shape.dtype}, got {tuple(data.shape)} {data.dtype}")
        self.pool[page].copy_(data)


def _host_zeros(dims: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> Tensor:
    return torch.zeros(dims, dtype=dtype, pin_memory=True) if pinned and dims[0] else _zeros(dims, dtype, torch.device("cpu"))


def _zeros(dims: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On a CPU the system hands them out when they are first touched, so an idle pool takes no memory and no time."""
    if device.type != "cpu":
        return torch.zeros(dims, dtype=dtype, device=device)
    size = prod(dims) * dtype.itemsize
    memory = np.zeros(size + CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return torch.from_numpy(memory[start : start + size]).view(dtype).view(dims)
