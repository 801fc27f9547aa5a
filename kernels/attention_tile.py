"""What the attention kernels share: reading a tile of keys and values through a block table, and the running softmax over it.

A program holds M query rows (queries times the query heads of one KV head) and walks over tiles of N keys:

    s = q k^T, hidden keys to -inf     u = scale               (soft cap c: s = tanh(q k^T * scale / c), u = c)
    m' = max(m, max_n s u)             l' = l * 2^(m - m') + sum_n 2^(s u - m')
    acc' = acc * 2^(m - m') + 2^(s u - m') v                                   out = acc / l

in base 2: u, which is positive, carries log2(e). m starts at a finite -1e30, so that a row that has seen no key yet stays without NaN.
s u - m' is rounded once, and says so: a compiler would do that in a loop without masks, and not where a mask stands between.
Sums are float32. 16-bit queries meet keys in their own type; fp8 pages are widened to float16, which holds every e4m3 value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Chip

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
NO_KEY: tl.constexpr = tl.constexpr(-1.0e30)
EVERYTHING = 2**31 - 1  # a sliding window that hides nothing
FP8_CAPABILITY = 89  # the first one that converts e4m3 in hardware; Triton refuses the type below


@dataclass(frozen=True, slots=True)
class Scores:
    """How a score is made of a query and a key.

    Attributes:
        scale: times q k^T.
        sliding_window: keys that a query sees at most, itself included; None for all.
        soft_cap: c of c * tanh(score / c); None for none.
    """

    scale: float
    sliding_window: int | None = None
    soft_cap: float | None = None

    @property
    def window(self) -> int:
        """The sliding window as a number."""
        return EVERYTHING if self.sliding_window is None else self.sliding_window


def check_pages(q: Tensor, pages: Tensor) -> None:
    """Raises ValueError if kernels cannot read `pages` [P, Hkv, 2, page_size, D] for the queries [T, Hq, D]."""
    if pages.stride(4) != 1 or q.stride(2) != 1:
        raise ValueError("the head dimension must be the innermost one, without gaps")
    if q.shape[2] != pages.shape[4] or q.shape[1] % pages.shape[1]:
        raise ValueError(f"queries {tuple(q.shape)} do not go with pages {tuple(pages.shape)}")
    page_size = pages.shape[3]
    if page_size & (page_size - 1) or q.shape[2] % 16:
        raise ValueError(f"page size {page_size} is no power of two, or head dimension {q.shape[2]} no multiple of 16")


def readable(pages: Tensor, on: Chip) -> Tensor:
    """The pages in a type that the chip's compiler takes: fp8 as its bits where there is no fp8."""
    fp8 = pages.dtype == torch.float8_e4m3fn
    return pages.view(torch.uint8) if fp8 and 0 < on.arch < FP8_CAPABILITY else pages


@triton.jit
def widened(x, like):
    """A tile of pages as the products read it. e4m3 bits become float16: exponent and mantissa in place, times 2^8 for the bias."""
    if x.dtype == tl.uint8:
        bits = x.to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        wide = half.to(tl.float16, bitcast=True) * 256.0
    elif x.dtype == like.dtype:
        wide = x
    else:
        wide = x.to(tl.float16)
    return wide


@triton.jit
def slots_of(table, key, there, stride_page, stride_slot, PAGE: tl.constexpr):
    """Where keys lie, in elements from the layer's first page: int64 [N]. Table entries of keys that are not `there` are not read."""
    if there is None:
        page = tl.load(table + key // PAGE)
    else:
        page = tl.load(table + key // PAGE, mask=there, other=0)
    return page.to(tl.int64) * stride_page + (key % PAGE) * stride_slot


@triton.jit
def unit_of(scale, soft_cap, HAS_CAP: tl.constexpr):
    """What `scores_of` are multiples of, in base 2."""
    if HAS_CAP:
        unit = soft_cap * LOG2_E
    else:
        unit = scale * LOG2_E
    return unit


@triton.jit
def scores_of(q, k, scale, soft_cap, HAS_CAP: tl.constexpr):
    """[M, N] scores, in units of `unit_of`, of queries [M, D] and keys [N, D]."""
    s = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    if HAS_CAP:
        # tanh(x) = 1 - 2 / (e^2x + 1): right at both ends, where e^2x is 0 or infinite.
        s = 1.0 - 2.0 / (tl.exp2(s * (scale / soft_cap * (2.0 * LOG2_E))) + 1.0)
    return s


@triton.jit
def absorb(acc, row_max, row_sum, s, unit, v):
    """One tile of scores [M, N], in units of `unit`, and values [N, D] into the running softmax."""
    new_max = tl.maximum(row_max, tl.max(s, 1) * unit)
    p = tl.exp2(tl.fma(s, unit, -new_max[:, None]))
    shrink = tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
    return acc, new_max, row_sum


@triton.jit
def finished(acc, row_max, row_sum):
    """(out [M, D], natural log-sum-exp [M]); zeros and -inf for rows that saw no key."""
    empty = row_sum == 0.0
    out = acc / tl.where(empty, 1.0, row_sum)[:, None]
    lse = tl.where(empty, float("-inf"), (row_max + tl.log2(tl.where(empty, 1.0, row_sum))) / LOG2_E)
    return out, lse
