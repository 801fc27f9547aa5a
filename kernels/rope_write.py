"""What happens between the qkv product and attention, in one launch: norm q and k, rotate them, put K and V into their pages.

    head = x * rsqrt(mean(x^2) + eps) * norm                 where the model norms q and k; rounded to x's type
    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)           halves of a head, angles of the token's position

A program takes one token and a few of its heads: q heads go to `q`, k and v heads to the token's slot. A slot of -1 is padding:
nothing of that token is read or written, and its row of `q` keeps what it held. fp8 pages get e4m3, clamped to +-448.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Chip, Shape, bucket_of, chip, dtype_name, launch_of

FP8_MAX: tl.constexpr = tl.constexpr(448.0)


@dataclass(frozen=True, slots=True)
class RopeLaunch:
    """Parameters of one launch. `heads`: of one program."""

    heads: int
    num_warps: int


@triton.jit
def _e4m3_bits(x):
    """float32 to the bits of e4m3, clamped to +-448, to the nearest, ties to even: the same on every chip, with the conversion or without.

    A normal number keeps three bits of its mantissa; below 2^-6 the steps are 2^-9, and adding 2^14 leaves those in a float32.
    """
    x = tl.where(x == x, tl.clamp(x, -FP8_MAX, FP8_MAX), x)
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    rounded = size + 0x7FFFF + ((size >> 20) & 1)
    normal = (rounded >> 20) - (120 << 3)
    steps = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    return tl.where(x == x, sign | tl.where(size < 0x3C800000, steps, normal), 0x7F).to(tl.uint8)


@triton.jit
def _rope_write_kernel(
    qkv, positions, cos_sin, pages, slots, q, q_norm, k_norm, eps,
    stride_token, stride_angle, stride_page, stride_head, stride_kv, stride_slot,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_H: tl.constexpr,
    PAGE: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    HALF: tl.constexpr = D // 2
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_HALF)
    inside = d < HALF
    cell = (head < HEADS + 2 * KV_HEADS)[:, None] & inside[None, :]
    at = token * stride_token + head[:, None] * D + d[None, :]
    first = tl.load(qkv + at, mask=cell, other=0.0)
    second = tl.load(qkv + at + HALF, mask=cell, other=0.0)
    is_q = head < HEADS
    is_v = head >= HEADS + KV_HEADS
    x1, x2 = first.to(tl.float32), second.to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / D + eps)[:, None]
        of_q1 = tl.load(q_norm + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        of_q2 = tl.load(q_norm + HALF + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        of_k1 = tl.load(k_norm + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        of_k2 = tl.load(k_norm + HALF + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        x1 = (x1 * scale * tl.where(is_q[:, None], of_q1, of_k1)).to(first.dtype).to(tl.float32)
        x2 = (x2 * scale * tl.where(is_q[:, None], of_q2, of_k2)).to(first.dtype).to(tl.float32)
    angles = cos_sin + tl.load(positions + token) * stride_angle + d
    cos = tl.load(angles, mask=inside, other=0.0)[None, :]
    sin = tl.load(angles + HALF, mask=inside, other=0.0)[None, :]
    turned1 = tl.where(is_v[:, None], first.to(tl.float32), x1 * cos - x2 * sin)
    turned2 = tl.where(is_v[:, None], second.to(tl.float32), x2 * cos + x1 * sin)

    to_q = q + (token * HEADS + head[:, None]) * D + d[None, :]
    tl.store(to_q, turned1.to(q.dtype.element_ty), mask=cell & is_q[:, None])
    tl.store(to_q + HALF, turned2.to(q.dtype.element_ty), mask=cell & is_q[:, None])
    kv_head = tl.where(is_v, head - HEADS - KV_HEADS, head - HEADS)
    base = (slot // PAGE) * stride_page + (slot % PAGE) * stride_slot
    at_head = kv_head.to(tl.int64) * stride_head + tl.where(is_v, 1, 0).to(tl.int64) * stride_kv
    to_page = pages + base + at_head[:, None] + d[None, :]
    if pages.dtype.element_ty == tl.uint8:
        stored1, stored2 = _e4m3_bits(turned1), _e4m3_bits(turned2)
    else:
        stored1, stored2 = turned1.to(pages.dtype.element_ty), turned2.to(pages.dtype.element_ty)
    tl.store(to_page, stored1, mask=cell & (head >= HEADS)[:, None])
    tl.store(to_page + HALF, stored2, mask=cell & (head >= HEADS)[:, None])


def rope_rule(shape: Shape, on: Chip) -> RopeLaunch:
    """About 2048 elements a program by four warps."""
    return RopeLaunch(heads=max(1, 2048 // triton.next_power_of_2(shape.head_dim)), num_warps=4)


def rope_and_write_kv(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    pages: Tensor,
    slots: Tensor,
    num_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    launch: RopeLaunch | None = None,
) -> Tensor:
    """See `reference.rope_and_write_kv`; slots of -1 are padding, and pages may be float8_e4m3fn.

    Raises:
        ValueError: the shapes do not go together, or only one of q and k is normed.
    """
    (tokens, width), (_, kv_heads, _, page_size, dim) = qkv.shape, pages.shape
    if width != (num_heads + 2 * kv_heads) * dim or dim % 2 or qkv.stride(1) != 1 or pages.stride(4) != 1:
        raise ValueError(f"qkv {tuple(qkv.shape)} does not go with {num_heads} heads and pages {tuple(pages.shape)}")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q and k are normed both, or neither")
    q = torch.empty(tokens, num_heads, dim, dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return q
    if launch is None:
        shape = Shape("rope_write", dtype_name(qkv.dtype, pages.dtype), dim, num_heads // kv_heads, page_size, bucket_of(tokens))
        launch = launch_of(RopeLaunch, rope_rule, shape, chip(qkv.device))
    heads = num_heads + 2 * kv_heads
    per_program = min(launch.heads, triton.next_power_of_2(heads))
    _rope_write_kernel[(tokens, triton.cdiv(heads, per_program))](
        qkv, positions, cos_sin, pages.view(torch.uint8) if pages.dtype == torch.float8_e4m3fn else pages, slots, q, q_norm, k_norm, eps,
        qkv.stride(0), cos_sin.stride(0), pages.stride(0), pages.stride(1), pages.stride(2), pages.stride(3),
        HEADS=num_heads, KV_HEADS=kv_heads, D=dim, BLOCK_HALF=triton.next_power_of_2(dim // 2), BLOCK_H=per_program, PAGE=page_size,
        HAS_NORM=q_norm is not None, num_warps=launch.num_warps,
    )  # fmt: skip
    return q
