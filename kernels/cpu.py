"""The compiled CPU path: the functions of `reference`, in C for float32 tensors on a CPU, and `reference` itself for all others.

A token's result is the same bits whatever else is in the batch and however many threads work (the C files say why). The
library is compiled at the first call of `available()` or of any function; without a compiler everything here is `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .cpu_library import Library, library
from .layout import AttentionBatch

MAX_HEAD_DIM = 256
MIN_HEAD_DIM = 16
MAX_GROUP = 48  # query heads on one KV head


def available() -> bool:
    """Whether the compiled functions are there."""
    return library() is not None


def _compiled(x: Tensor) -> Library | None:
    return library() if x.dtype is torch.float32 and x.device.type == "cpu" else None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    lib = _compiled(x)
    if lib is None:
        return reference.rms_norm(x, weight, eps)
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    lib.rms_norm(x.data_ptr(), None, weight.data_ptr(), out.data_ptr(), None, x.numel() // width, width, eps, torch.get_num_threads())
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`."""
    lib = _compiled(x)
    if lib is None:
        return reference.add_rms_norm(x, residual, weight, eps)
    x, residual = x.contiguous(), residual.contiguous()
    out, stream = torch.empty_like(x), torch.empty_like(x)
    tokens, width = x.shape
    lib.rms_norm(
        x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), stream.data_ptr(), tokens, width, eps, torch.get_num_threads()
    )
    return out, stream


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `reference.silu_mul`."""
    lib = _compiled(gate_up)
    if lib is None:
        return reference.silu_mul(gate_up)
    gate_up = gate_up.contiguous()
    tokens, width = gate_up.shape
    out = gate_up.new_empty(tokens, width // 2)
    lib.silu_mul(gate_up.data_ptr(), out.data_ptr(), tokens, width // 2, torch.get_num_threads())
    return out


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
) -> Tensor:
    """See `reference.rope_and_write_kv`.

    Raises:
        IndexError: a slot or a position lies outside; the other tokens are written.
    """
    lib = _compiled(qkv)
    page_count, kv_heads, _, page_size, dim = pages.shape
    if lib is None or not _packed_tokens(pages) or dim > MAX_HEAD_DIM:
        return reference.rope_and_write_kv(qkv, positions, cos_sin, pages, slots, num_heads, q_norm, k_norm, eps)
    qkv, positions, slots = qkv.contiguous(), positions.contiguous(), slots.contiguous()
    tokens = qkv.shape[0]
    q = qkv.new_empty(tokens, num_heads, dim)
    strides = pages.stride()
    outside = lib.rope_and_write_kv(
        qkv.data_ptr(), positions.data_ptr(), cos_sin.data_ptr(), pages.data_ptr(), slots.data_ptr(), q.data_ptr(),
        None if q_norm is None else q_norm.data_ptr(), None if k_norm is None else k_norm.data_ptr(),
        tokens, num_heads, kv_heads, dim, page_count, page_size, strides[0], strides[1], strides[2],
        cos_sin.shape[0], eps, torch.get_num_threads(),
    )  # fmt: skip
    if outside:
        raise IndexError(f"{outside} of {tokens} tokens have a slot or a position outside of the pool or of the rope table")
    return q


def paged_attention(q: Tensor, pages: Tensor, batch: AttentionBatch, scale: float, sliding_window: int | None) -> Tensor:
    """See `reference.paged_attention`."""
    lib = _compiled(q)
    heads, dim = q.shape[1], q.shape[2]
    _, kv_heads, _, page_size, _ = pages.shape
    fits = MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM and heads <= MAX_GROUP * kv_heads
    if lib is None or not fits or not _packed_tokens(pages):
        return reference.paged_attention(q, pages, batch, scale, sliding_window)
    q, tables = q.contiguous(), batch.block_tables.contiguous()
    out = torch.empty_like(q)
    strides = pages.stride()
    failed = lib.attention(
        q.data_ptr(), out.data_ptr(), pages.data_ptr(), batch.row_starts.data_ptr(), batch.kv_lens.data_ptr(), tables.data_ptr(),
        len(batch.row_lens), heads, kv_heads, dim, page_size, strides[0], strides[1], strides[2], tables.shape[1], sliding_window or 0,
        scale, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the attention of this batch")
    return out


def _packed_tokens(pages: Tensor) -> bool:
    """The C loops take every stride but those of a page's inside."""
    return pages.dtype is torch.float32 and pages.stride(4) == 1 and pages.stride(3) == pages.shape[4]
