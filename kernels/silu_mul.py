"""The gated activation of the MLP: out = silu(gate) * up, with silu(x) = x / (1 + e^-x).

gate and up are the two halves of one row, as the fused product leaves them. A program takes one stretch of one row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Chip, Shape, bucket_of, chip, dtype_name, launch_of


@dataclass(frozen=True, slots=True)
class SiluLaunch:
    """Parameters of one launch. `elements`: outputs of one program."""

    elements: int
    num_warps: int


@triton.jit
def _silu_mul_kernel(gate_up, out, stride, INNER: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < INNER
    gate = tl.load(gate_up + row * stride + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + INNER + column, mask=there, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * INNER + column, result.to(out.dtype.element_ty), mask=there)


def silu_rule(shape: Shape, on: Chip) -> SiluLaunch:
    """Eight elements a thread of four warps: two 16-byte loads of each half in 16 bits."""
    return SiluLaunch(elements=1024, num_warps=4)


def silu_mul(gate_up: Tensor, launch: SiluLaunch | None = None) -> Tensor:
    """gate_up [T, 2 I] (rows at any stride) -> [T, I]. Any float type; float32 inside.

    Raises:
        ValueError: rows have gaps, or an odd width.
    """
    rows, width = gate_up.shape
    if width % 2 or gate_up.stride(1) != 1:
        raise ValueError(f"rows of gate and up must have an even width and no gaps, not {tuple(gate_up.shape)}, {gate_up.stride()}")
    inner = width // 2
    out = torch.empty(rows, inner, dtype=gate_up.dtype, device=gate_up.device)
    if rows == 0:
        return out
    if launch is None:
        shape = Shape("silu_mul", dtype_name(gate_up.dtype), inner, bucket=bucket_of(rows))
        launch = launch_of(SiluLaunch, silu_rule, shape, chip(gate_up.device))
    _silu_mul_kernel[(rows, triton.cdiv(inner, launch.elements))](
        gate_up, out, gate_up.stride(0), INNER=inner, BLOCK=launch.elements, num_warps=launch.num_warps
    )
    return out
