"""A matrix product whose tiles never depend on how many rows there are: the linear layer of the deterministic mode.

    y[t, n] = sum_k x[t, k] w[n, k] (+ bias[n])

Libraries choose tiles, and splits of the sum, by the shape of the whole product, so a token's result changes in the last bits with the
batch that it is in. Here every product has the same tiles and walks over k in the same steps: a row's bits depend on that row
alone. The price is a product of few rows that fills few multiprocessors, and of many rows that is short of the library's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, STEP = 32, 64, 64  # one choice for every shape: that is the point
COLUMNS_WIDE = 32  # of float32, whose tiles are twice as large


@triton.jit(do_not_specialize=["rows"])
def _matmul_kernel(
    x, weight, bias, out, rows, stride_x, stride_weight, stride_out,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_rows, in_columns = (row < rows)[:, None], (column < N)[:, None]
    at_x = row.to(tl.int64)[:, None] * stride_x + k[None, :]
    at_weight = column.to(tl.int64)[:, None] * stride_weight + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a = tl.load(x + at_x + start, mask=in_rows, other=0.0)
            b = tl.load(weight + at_weight + start, mask=in_columns, other=0.0)
        else:
            inside = (start + k < K)[None, :]
            a = tl.load(x + at_x + start, mask=in_rows & inside, other=0.0)
            b = tl.load(weight + at_weight + start, mask=in_columns & inside, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="tf32x3")
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    at_out = row.to(tl.int64)[:, None] * stride_out + column[None, :]
    tl.store(out + at_out, acc.to(out.dtype.element_ty), mask=in_rows & (column < N)[None, :])


def fixed_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K], weight [N, K], bias [N] -> [T, N]; one float type, float32 inside.

    Raises:
        ValueError: the shapes or types do not go together, or rows have gaps.
    """
    (rows, inner), (outputs, of_weight) = x.shape, weight.shape
    if inner != of_weight or x.dtype != weight.dtype or x.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError(f"{tuple(x.shape)} {x.dtype} and {tuple(weight.shape)} {weight.dtype} have no product, or have gaps")
    if bias is not None and (bias.shape != (outputs,) or bias.stride(0) != 1):
        raise ValueError(f"a bias of {tuple(bias.shape)} does not go with {outputs} outputs")
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    columns = COLUMNS_WIDE if x.dtype is torch.float32 else COLUMNS
    _matmul_kernel[(triton.cdiv(outputs, columns), triton.cdiv(rows, ROWS))](
        x, weight, bias, out, rows, x.stride(0), weight.stride(0), out.stride(0),
        N=outputs, K=inner, BLOCK_M=ROWS, BLOCK_N=columns, BLOCK_K=STEP, HAS_BIAS=bias is not None, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
