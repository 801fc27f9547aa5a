"""Pages from one place to another, whole: within the pool (copy on write), pool to staging buffer (pack), and back (unpack).

A page is one span of bytes, so the three are one kernel: rows of `source`, chosen by ids or all in order, go to rows of
`destination`, chosen by ids or all in order. The grid is small and fixed whatever the number of pages: programs take stretches
of pages in turn, so that a copy beside a running step takes a few multiprocessors and leaves it the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Chip, Shape, chip, launch_of

WORD = torch.int32


@dataclass(frozen=True, slots=True)
class CopyLaunch:
    """Parameters of one launch. `programs` at most; `words`: 4-byte words that a program moves at once."""

    programs: int
    words: int
    num_warps: int


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["source_ids", "destination_ids"])
def _copy_kernel(
    source, source_ids, destination, destination_ids, count, stride_source, stride_destination,
    WORDS: tl.constexpr, BLOCK: tl.constexpr, BY_SOURCE: tl.constexpr, BY_DESTINATION: tl.constexpr,
):  # fmt: skip
    STRETCHES: tl.constexpr = (WORDS + BLOCK - 1) // BLOCK
    for piece in range(tl.program_id(0), count * STRETCHES, tl.num_programs(0)):
        page = piece // STRETCHES
        word = piece % STRETCHES * BLOCK + tl.arange(0, BLOCK)
        there = word < WORDS
        taken = page.to(tl.int64)
        put = page.to(tl.int64)
        if BY_SOURCE:
            taken = tl.load(source_ids + page)
        if BY_DESTINATION:
            put = tl.load(destination_ids + page)
        tl.store(destination + put * stride_destination + word, tl.load(source + taken * stride_source + word, mask=there), mask=there)


def copy_rule(shape: Shape, on: Chip) -> CopyLaunch:
    """16 programs: what a copy may take of a chip of about 132 multiprocessors."""
    return CopyLaunch(programs=16, words=4096, num_warps=8)


def move_pages(
    source: Tensor,
    source_ids: Tensor | None,
    destination: Tensor,
    destination_ids: Tensor | None,
    launch: CopyLaunch | None = None,
) -> None:
    """destination[destination_ids[i]] = source[source_ids[i]] for every i.

    Args:
        source, destination: [pages, ...] of one type and one page shape, each page without gaps; of any number of pages.
        source_ids, destination_ids: int64 [n] on the same device; None takes pages 0 to n - 1.
        launch: parameters other than the table's.

    Nothing may be both read and written, and no destination may occur twice: programs run in any order.

    Raises:
        ValueError: the pages differ, have gaps, or are no multiple of 4 bytes.
    """
    ids = source_ids if source_ids is not None else destination_ids
    count = len(source) if ids is None else len(ids)
    if source.shape[1:] != destination.shape[1:] or source.dtype != destination.dtype:
        raise ValueError(f"pages {tuple(source.shape[1:])} {source.dtype} are not {tuple(destination.shape[1:])} {destination.dtype}")
    if (source_ids is not None and len(source_ids) != count) or (destination_ids is not None and len(destination_ids) != count):
        raise ValueError("as many pages must be written as are read")
    if count == 0:
        return
    of_source, of_destination = _words(source), _words(destination)
    words = of_source.shape[1]
    if launch is None:
        launch = launch_of(CopyLaunch, copy_rule, Shape("page_copy", "int32"), chip(source.device))
    block = min(launch.words, triton.next_power_of_2(words))
    _copy_kernel[(min(launch.programs, count * triton.cdiv(words, block)),)](
        of_source, source_ids, of_destination, destination_ids, count, of_source.stride(0), of_destination.stride(0),
        WORDS=words, BLOCK=block, BY_SOURCE=source_ids is not None, BY_DESTINATION=destination_ids is not None,
        num_warps=launch.num_warps,
    )  # fmt: skip


def _words(pages: Tensor) -> Tensor:
    """The pages as [pages, words]; no copy."""
    page = pages[0]
    if not page.is_contiguous() or page.numel() * page.element_size() % WORD.itemsize:
        raise ValueError("a page must be one span of a multiple of 4 bytes")
    flat = pages.as_strided((len(pages), page.numel()), (pages.stride(0), 1))
    return flat.view(WORD)
