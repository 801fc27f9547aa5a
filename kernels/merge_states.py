"""Two attention results over different keys of the same queries into the one over all keys.

    lse = log(e^lse_a + e^lse_b)        out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b

A side without keys has log-sum-exp -inf and counts for nothing, whatever its output holds. Both empty: zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .attention_tile import LOG2_E, NO_KEY

ELEMENTS = 4096  # of one program


@triton.jit(do_not_specialize=["rows"])
def _merge_kernel(a, lse_a, b, lse_b, out, lse, rows, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, HAS_LSE: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    real = row < rows
    cell = real[:, None] & (d < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + d[None, :]
    of_a = tl.load(lse_a + row, mask=real, other=0.0)
    of_b = tl.load(lse_b + row, mask=real, other=0.0)
    largest = tl.maximum(tl.maximum(of_a, of_b), NO_KEY)
    weight_a = tl.exp2((of_a - largest) * LOG2_E)
    weight_b = tl.exp2((of_b - largest) * LOG2_E)
    total = weight_a + weight_b
    safe = tl.where(total == 0.0, 1.0, total)
    side_a = tl.load(a + at, mask=cell & (weight_a > 0.0)[:, None], other=0.0).to(tl.float32)
    side_b = tl.load(b + at, mask=cell & (weight_b > 0.0)[:, None], other=0.0).to(tl.float32)
    merged = (weight_a / safe)[:, None] * side_a + (weight_b / safe)[:, None] * side_b
    tl.store(out + at, merged.to(out.dtype.element_ty), mask=cell)
    if HAS_LSE:
        tl.store(lse + row, tl.where(total == 0.0, float("-inf"), largest + tl.log2(safe) / LOG2_E), mask=real)


def merge_states(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor | None = None) -> None:
    """Merge the states (a, lse_a) and (b, lse_b).

    Args:
        a, b: [T, Hq, D], contiguous, any float types.
        lse_a, lse_b: float32 [T, Hq], contiguous.
        out: [T, Hq, D], contiguous, written; may be `a` or `b`.
        lse: float32 [T, Hq], written; None if nobody asks.

    Raises:
        ValueError: a tensor has gaps.
    """
    if not all(x.is_contiguous() for x in (a, lse_a, b, lse_b, out)):
        raise ValueError("states to merge must be contiguous")
    dim = a.shape[-1]
    block_d = triton.next_power_of_2(dim)
    rows = a.numel() // dim
    per_program = max(1, ELEMENTS // block_d)
    _merge_kernel[(triton.cdiv(rows, per_program),)](
        a, lse_a, b, lse_b, out, lse, rows, D=dim, BLOCK_D=block_d, ROWS=per_program, HAS_LSE=lse is not None, num_warps=4
    )
