"""Root-mean-square norm of rows, alone or of the residual stream that a layer's output is added to.

    s = x + residual (rounded to x's type)         out = s / sqrt(mean(s^2) + eps) * weight

A program takes a few whole rows: every element is read once and written once (twice with the residual).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Chip, Shape, bucket_of, chip, dtype_name, launch_of


@dataclass(frozen=True, slots=True)
class NormLaunch:
    """Parameters of one launch. `elements`: of one program; a row that is longer has a program of its own."""

    elements: int
    num_warps: int


@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(
    x, residual, weight, out, stream, rows, eps, stride_x, stride_residual,
    H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    cell = (row < rows)[:, None] & (column < H)[None, :]
    wide_row = row.to(tl.int64)[:, None]
    values = tl.load(x + wide_row * stride_x + column[None, :], mask=cell, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        values += tl.load(residual + wide_row * stride_residual + column[None, :], mask=cell, other=0.0).to(tl.float32)
        rounded = values.to(stream.dtype.element_ty)
        tl.store(stream + wide_row * H + column[None, :], rounded, mask=cell)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 1) / H + eps)
    gain = tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32)
    result = values * scale[:, None] * gain[None, :]
    tl.store(out + wide_row * H + column[None, :], result.to(out.dtype.element_ty), mask=cell)


def norm_rule(shape: Shape, on: Chip) -> NormLaunch:
    """Rows of up to 4096 elements by four warps, which leaves 32 a thread in registers; longer ones by more."""
    warps = min(max(shape.head_dim // 1024, 4), 16)
    return NormLaunch(elements=4096, num_warps=warps)


def rms_norm(x: Tensor, weight: Tensor, eps: float, launch: NormLaunch | None = None) -> Tensor:
    """x [T, H] (rows at any stride), weight [H] -> [T, H]. Any float type; float32 inside.

    Raises:
        ValueError: an innermost axis has gaps, or the weight is of another width.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _normed(x, None, weight, eps, out, None, launch)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, launch: NormLaunch | None = None) -> tuple[Tensor, Tensor]:
    """x, residual [T, H], weight [H] -> (norm of s [T, H], s [T, H]) with s = x + residual.

    Raises:
        ValueError: as `rms_norm`, or the shapes differ.
    """
    if residual.shape != x.shape:
        raise ValueError(f"a residual of {tuple(residual.shape)} does not go with {tuple(x.shape)}")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stream = torch.empty_like(out)
    _normed(x, residual, weight, eps, out, stream, launch)
    return out, stream


def _normed(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, stream: Tensor | None, launch: NormLaunch | None
) -> None:
    rows, width = x.shape
    if x.stride(1) != 1 or (residual is not None and residual.stride(1) != 1) or weight.shape != (width,) or weight.stride(0) != 1:
        raise ValueError(f"rows of {width} must be without gaps, and the weight {tuple(weight.shape)} as long as they are")
    if rows == 0:
        return
    if launch is None:
        # The table's head_dim is the width of what is normed.
        launch = launch_of(NormLaunch, norm_rule, Shape("rms_norm", dtype_name(x.dtype), width, bucket=bucket_of(rows)), chip(x.device))
    block = triton.next_power_of_2(width)
    per_program = max(1, min(launch.elements // block, triton.next_power_of_2(rows)))
    _norm_kernel[(triton.cdiv(rows, per_program),)](
        x, residual, weight, out, stream, rows, eps, x.stride(0), 0 if residual is None else residual.stride(0),
        H=width, BLOCK=block, ROWS=per_program, HAS_RESIDUAL=residual is not None, num_warps=launch.num_warps,
    )  # fmt: skip
