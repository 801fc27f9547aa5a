"""The memory that pages are: one pool tensor of a rank, page-major, so that a page is one contiguous span, and a like one in host memory.

Nothing outside this file and the kernels' strides knows the layout. Whose page is whose is `page_pool`'s business.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

CACHE_LINE = 64
DMA_BYTES = 128 * 2**10  # a copy between GPU and host of fewer bytes costs more to start than to carry out
STAGED_BYTES = 32 * 2**20  # of pages that are packed at once, to leave a GPU in one piece


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

    Both start as zeros: nobody is handed memory that was another's. Of fp8 they hold the bytes, which everything that moves pages knows how
    to handle; layers are seen in the type itself.
    """

    def __init__(self, shape: PageShape, num_pages: int, device: torch.device | str, host_pages: int = 0) -> None:
        self.shape = shape
        self.num_pages = num_pages
        held = torch.uint8 if shape.dtype.itemsize == 1 else shape.dtype
        self.pool = _zeros((num_pages, *shape.dims), held, torch.device(device))
        pinned = self.pool.device.type == "cuda" and host_pages > 0
        self.host = _zeros((host_pages, *shape.dims), held, torch.device("cpu"), pinned)
        self._layers = [self.pool[:, :, layer].view(shape.dtype) for layer in range(shape.layers)]
        self._kernel = copy_with_kernel if self.pool.is_cuda and find_spec("triton") else None
        self._lane = threading.local()  # its stream: what is staged on one, the allocator keeps for that one

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.shape.page_size

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.shape.page_bytes

    def layer(self, layer: int) -> Tensor:
        """The view [pages, kv_heads, 2, page_size, head_dim] in the pages' type that kernels read and write."""
        return self._layers[layer]

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy (source, destination) pages; every source is read before any destination is written."""
        if not pairs:
            return
        if self._kernel is not None and not {source for source, _ in pairs} & {destination for _, destination in pairs}:
            self._kernel(self.pool, pairs)
        else:
            sources, destinations = torch.tensor(pairs, device=self.pool.device).unbind(1)
            self.pool[destinations] = self.pool[sources]

    def warm_up(self) -> None:
        """Compile what copies pages, packs and unpacks them, on an empty pool."""
        if self._kernel is not None:
            unpack(packed(self.pool, [0]), self.pool, [0])
            self.copy_pages([(0, 1)] if self.num_pages > 1 else [])

    # --- beside the steps: called on other threads than theirs ---

    def after(self) -> Callable[[], AbstractContextManager[None]]:
        """What is done inside of the context comes after everything that has been asked of the device so far, beside what is asked later,
        and is over at its end. Entering it waits for the former."""
        if self.pool.device.type != "cuda":
            return nullcontext
        written = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        written.record()

        @contextmanager
        def beside() -> Iterator[None]:
            written.synchronize()
            if not hasattr(self._lane, "stream"):
                self._lane.stream = torch.cuda.Stream(self.pool.device)  # type: ignore[no-untyped-call]
            stream = self._lane.stream
            with torch.cuda.stream(stream):
                try:
                    yield
                finally:
                    stream.synchronize()  # after a failure, too: nothing may be written into pages that are somebody else's by then

        return beside

    def copy_out(self, pages: Sequence[int], host_pages: Sequence[int]) -> None:
        """Pages to host pages, pairwise."""
        self._copy(self.pool, pages, self.host, host_pages)

    def copy_in(self, host_pages: Sequence[int], pages: Sequence[int]) -> None:
        """Host pages to pages, pairwise."""
        self._copy(self.host, host_pages, self.pool, pages)

    def _copy(self, source: Tensor, source_pages: Sequence[int], target: Tensor, target_pages: Sequence[int]) -> None:
        """Runs of neighbours in one go; small pages on a GPU by the kernel, which reaches pinned memory itself."""
        device = self.pool.device
        if device.type == "cpu":
            read, written = (x.view(len(x), -1).view(torch.uint8).numpy() for x in (source, target))
            for here, there, count in _runs(source_pages, target_pages):
                np.copyto(written[there : there + count], read[here : here + count])  # by this thread alone, and without Python's lock
        elif self._kernel is not None and self.page_bytes < DMA_BYTES:
            from ..kernels.page_copy import move_pages

            move_pages(source, torch.tensor(source_pages, device=device), target, torch.tensor(target_pages, device=device))
        else:
            for here, there, count in _runs(source_pages, target_pages):
                target[there : there + count].copy_(source[here : here + count], non_blocking=True)

    def parts(self, pages: Sequence[int], heads: slice, single: bool) -> Iterator[Tensor]:
        """Some heads of `pages`, in order, to be sent: contiguous tensors. Without the kernel, or with `single`, one for each page."""
        if self._kernel is None or single:
            for page in pages:
                yield self.pool[page, heads]
            return
        for some in self._stages(pages, heads):
            yield packed(self.pool[:, heads], some)

    def landings(self, pages: Sequence[int], heads: slice, single: bool) -> Iterator[Tensor]:
        """The inverse of `parts`: tensors to be filled one after the other. A page is there when the next one is asked for, or the end."""
        if self._kernel is None or single:
            for page in pages:
                yield self.pool[page, heads]
            return
        for some in self._stages(pages, heads):
            landed = self.pool.new_empty((len(some), *self.pool[0, heads].shape))
            yield landed
            unpack(landed, self.pool[:, heads], some)

    def _stages(self, pages: Sequence[int], heads: slice) -> Iterator[Sequence[int]]:
        most = max(STAGED_BYTES // self.pool[0, heads].nbytes, 1)
        for first in range(0, len(pages), most):
            yield pages[first : first + most]


def copy_with_kernel(pool: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """Copy (source, destination) pages, none of which is both, beside whatever else the device does: no memory is taken for it."""
    from ..kernels.page_copy import move_pages  # Triton is not installed everywhere

    ids = torch.tensor(list(zip(*pairs, strict=True)), dtype=torch.int64, pin_memory=pool.is_cuda)
    sources, destinations = ids.to(pool.device, non_blocking=True)
    move_pages(pool, sources, pool, destinations)


def packed(pool: Tensor, pages: Sequence[int]) -> Tensor:
    """Copies of those pages of a pool, or of some heads of it, one after the other."""
    from ..kernels.page_copy import move_pages

    found = pool.new_empty((len(pages), *pool.shape[1:]))
    move_pages(pool, torch.tensor(pages, device=pool.device), found, None)
    return found


def unpack(some: Tensor, pool: Tensor, pages: Sequence[int]) -> None:
    """The inverse of `packed`."""
    from ..kernels.page_copy import move_pages

    move_pages(some, None, pool, torch.tensor(pages, device=pool.device))


def _runs(sources: Sequence[int], targets: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(source, target, count) of the stretches in which both follow one another."""
    first = 0
    for i in range(1, len(sources) + 1):
        if i == len(sources) or sources[i] != sources[i - 1] + 1 or targets[i] != targets[i - 1] + 1:
            yield sources[first], targets[first], i - first
            first = i


def _zeros(dims: tuple[int, ...], dtype: torch.dtype, device: torch.device, pinned: bool = False) -> Tensor:
    """Zeros. On a CPU the system hands them out when they are first touched, so an idle pool takes no memory and no time."""
    if device.type != "cpu":
        return torch.zeros(dims, dtype=dtype, device=device)
    size = prod(dims) * dtype.itemsize
    memory = _pinned(size) if pinned else np.zeros(size + CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return torch.from_numpy(memory[start : start + size]).view(dtype).view(dims)


def _pinned(size: int) -> npt.NDArray[np.uint8]:
    """Zeros that are locked in their place as long as they live, so that a GPU reaches them. torch would round up to a power of two bytes.

    Raises:
        RuntimeError: so much may not be locked.
    """
    mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # pages of its own: none can be locked twice
    mapped.madvise(mmap.MADV_HUGEPAGE)  # all are touched now: a few large ones are quicker
    memory = np.frombuffer(mapped, np.uint8)
    cudart, at = torch.cuda.cudart(), memory.ctypes.data  # type: ignore[no-untyped-call]
    code = int(cudart.cudaHostRegister(at, size, 0))
    if code:
        raise RuntimeError(f"host_memory: {size} bytes of host memory cannot be locked for the GPU (CUDA error {code})")
    # Whatever is mapped there next could not be locked otherwise. The array goes before the mapping does. At the end of the process there
    # may be no CUDA any more.
    weakref.finalize(memory, cudart.cudaHostUnregister, at).atexit = False
    return memory
