"""Every kernel in plain torch, on any device and in any float type: the oracle of the fast ones and their fall-back.

Sums and products run in float32 at least (float64 for float64 inputs) and the result is cast back once. Memory that nobody
has written may hold anything, NaN included: it is masked out of the scores and its values are zeroed before they are read.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import AttentionBatch

QUERIES_AT_ONCE = 1024  # bounds the mask and the scores of one long prefill row


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis. x [..., H], weight [H] -> [..., H]."""
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream and its norm: s = x + residual -> (rms_norm(s), s). x, residual [T, H], weight [H]."""
    stream = x + residual
    return rms_norm(stream, weight, eps), stream


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where gate and up are the two halves of the last axis. [T, 2I] -> [T, I]."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


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
    """Split qkv, norm q and k where the model does, rotate them, store K and V in their slots, return the rotated q.

    Args:
        qkv: [T, (Hq + 2 Hkv) * D].
        positions: int64 [T].
        cos_sin: float32 [max_position, D]; cos in the first half of the columns, sin in the second.
        pages: layer view [P, Hkv, 2, page_size, D], any strides; written to.
        slots: int64 [T], page * page_size + offset.
        num_heads: Hq.
        q_norm, k_norm: RMSNorm weights [D], or None.
        eps: of those norms.

    Returns:
        [T, Hq, D]. Rotation: x1 * cos - x2 * sin, x2 * cos + x1 * sin for the halves x1, x2 of a head.
    """
    kv_heads, page_size, head_dim = pages.shape[1], pages.shape[3], pages.shape[4]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    q, k, v = heads.split([num_heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    page, offset = slots // page_size, slots % page_size
    pages[page, :, 0, offset] = _rotate(k, cos, sin).to(pages.dtype)
    pages[page, :, 1, offset] = v.to(pages.dtype)
    return _rotate(q, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = _wide(x).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def paged_attention(q: Tensor, pages: Tensor, batch: AttentionBatch, scale: float, sliding_window: int | None) -> Tensor:
    """Causal attention of each row over its own pages.

    Token i of row r sees keys up to position `kv_len - row_len + i`, and with a sliding window the last `sliding_window` of them.

    Args:
        q: [T, Hq, D].
        pages: layer view [P, Hkv, 2, page_size, D] that already holds this step's K and V.
        batch: the rows.
        scale: of the scores before softmax.
        sliding_window: keys that a token sees at most, itself included; None for all.

    Returns:
        [T, Hq, D].
    """
    out = torch.empty_like(q)
    if batch.num_decode:
        _decode_rows(q, pages, batch, scale, sliding_window, out)
    start = batch.num_decode
    for row in range(batch.num_decode, len(batch.row_lens)):
        end = start + batch.row_lens[row]
        _prefill_row(q[start:end], pages, batch.block_tables[row], batch.kv_lens_list[row], scale, sliding_window, out[start:end])
        start = end
    return out


def _decode_rows(q: Tensor, pages: Tensor, batch: AttentionBatch, scale: float, sliding_window: int | None, out: Tensor) -> None:
    """One query a row, padded to the longest row. A KV head's queries are the rows of one small matrix product."""
    rows = batch.num_decode
    (_, kv_heads, _, page_size, head_dim) = pages.shape
    width = -(-max(batch.kv_lens_list[:rows]) // page_size)
    key = torch.arange(width * page_size, device=q.device)
    lens = batch.kv_lens[:rows, None]
    visible = key < lens
    own_page = key[::page_size] < lens  # [rows, width]
    if sliding_window is not None:
        visible &= key >= lens - sliding_window
    tables = batch.block_tables[:rows, :width].masked_fill(~own_page, 0)
    k, v = _gather(pages, tables)
    hidden = ~visible[:, None, :, None]
    k = k.masked_fill(hidden, 0)
    v = v.masked_fill(hidden, 0)
    grouped = q[:rows].view(rows, kv_heads, -1, head_dim)
    attended = F.scaled_dot_product_attention(grouped, k, v, attn_mask=visible[:, None, None, :], scale=scale)
    out[:rows] = attended.reshape(rows, -1, head_dim)


def _prefill_row(q: Tensor, pages: Tensor, table: Tensor, kv_len: int, scale: float, sliding_window: int | None, out: Tensor) -> None:
    """Many queries of one row. Keys before the first query's window and after the last query are never read."""
    page_size = pages.shape[3]
    for begin in range(0, len(q), QUERIES_AT_ONCE):
        part = q[begin : begin + QUERIES_AT_ONCE]
        position = torch.arange(kv_len - len(q) + begin, kv_len - len(q) + begin + len(part), device=q.device)[:, None]
        end_key = kv_len - len(q) + begin + len(part)
        first_key = 0 if sliding_window is None else max(0, end_key - len(part) - sliding_window + 1)
        first_page = first_key // page_size
        k, v = _gather(pages, table[None, first_page : -(-end_key // page_size)])
        k, v = k[:, :, : end_key - first_page * page_size], v[:, :, : end_key - first_page * page_size]
        key = torch.arange(first_page * page_size, end_key, device=q.device)
        visible = key <= position
        if sliding_window is not None:
            visible &= key > position - sliding_window
        attended = F.scaled_dot_product_attention(
            part.transpose(0, 1)[None], k, v, attn_mask=visible, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        out[begin : begin + len(part)] = attended[0].transpose(0, 1)


def _gather(pages: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    """K and V [R, Hkv, W * page_size, D] of the block tables [R, W]."""
    rows, width = tables.shape
    _, kv_heads, _, page_size, head_dim = pages.shape
    found = pages[tables.long()]  # [R, W, Hkv, 2, page_size, D]
    k, v = found.permute(3, 0, 2, 1, 4, 5).reshape(2, rows, kv_heads, width * page_size, head_dim)
    return k, v


def attention_states(
    q: Tensor, pages: Tensor, batch: AttentionBatch, scale: float, sliding_window: int | None = None, soft_cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """`paged_attention` with its log-sum-exp and a soft cap, token by token and in float64: slow and plain, the oracle of all others.

    Args:
        q: [T, Hq, D], any float type.
        pages: layer view [P, Hkv, 2, page_size, D], any float type, fp8 too. Only slots that a token sees are read.
        batch: the rows. A row with kv_len 0 sees nothing.
        scale: of the scores.
        sliding_window: keys that a token sees at most, itself included; None for all.
        soft_cap: scores become c * tanh(score / c); None for none.

    Returns:
        (float64 [T, Hq, D], float64 [T, Hq]): zeros and -inf for a token that sees no key.
    """
    page_size, kv_heads = pages.shape[3], pages.shape[1]
    group = q.shape[1] // kv_heads
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64, device=q.device)
    held = pages.view(torch.uint8) if pages.dtype.itemsize == 1 else pages  # torch does not gather fp8 on a GPU
    token = 0
    for row, count in enumerate(batch.row_lens):
        for end in range(batch.kv_lens_list[row] - count + 1, batch.kv_lens_list[row] + 1):
            seen = torch.arange(0 if sliding_window is None else max(0, end - sliding_window), end, device=q.device)
            if len(seen):
                page = batch.block_tables[row, seen // page_size].long()
                k, v = held[page, :, :, seen % page_size].view(pages.dtype).double().repeat_interleave(group, dim=1).unbind(2)  # [N, Hq, D]
                scores = torch.einsum("hd,nhd->hn", q[token].double(), k) * scale
                if soft_cap is not None:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                lse[token] = torch.logsumexp(scores, dim=1)
                out[token] = torch.einsum("hn,nhd->hd", scores.softmax(dim=1), v)
            token += 1
    return out, lse


def merge_states(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both states from attention over each: out = sum_i e^(lse_i - lse) out_i, lse = log sum_i e^lse_i.

    a, b [T, Hq, D], lse_a, lse_b [T, Hq] -> ([T, Hq, D], [T, Hq]), in the wider type of each pair. A side with log-sum-exp -inf
    counts for nothing; both: zeros and -inf.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    empty = lse == -torch.inf
    weights = [torch.where(empty, 0.0, torch.exp(side - lse)).unsqueeze(-1) for side in (lse_a, lse_b)]
    of_a, of_b = (torch.where(weight > 0, weight * state, 0.0) for weight, state in zip(weights, (a, b), strict=True))
    return of_a + of_b, lse


def gumbel(keys: Tensor, vocab: int) -> Tensor:
    """Noise of every token id below `vocab`, float64 [S, V], for the key words int32 [S, 2] (their bits are unsigned).

    h(t) = tail((mix(t + 0x9E3779B9) ^ k0) * k1) modulo 2**32, u = clamp(float32(h), 0.5, 2**32 - 2**8) / 2**32, -log(-log1p(-u)). Here
    mix(x) is lowbias32 (Wellons) and tail(x) its last three steps: x ^= x >> 15, x *= 0x846CA68B, x ^= x >> 16.
    """
    words = keys.long() & 0xFFFFFFFF
    h = (torch.arange(vocab, device=keys.device) + 0x9E3779B9) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = _tail(h)
    h = _tail(((h ^ words[:, :1]) * words[:, 1:]) & 0xFFFFFFFF)
    u = h.float().clamp(0.5, 4294967040.0).double() * 2.0**-32
    return -torch.log(-torch.log1p(-u))


def _tail(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def kept_tokens(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Which tokens of one row the filters leave, bool [V], by a full sort.

    Args:
        scores: [V], (logit - highest) / temperature.
        top_k: the highest scores that stay, and those equal to the last of them; 0 keeps all.
        top_p: then the smallest set of highest scores with this share of the mass that is left.
        min_p: before both: scores of at least so many times the highest probability.
    """
    kept = scores >= math.log(min_p) if min_p > 0 else torch.ones_like(scores, dtype=torch.bool)
    if top_k > 0:
        left = scores[kept].sort(descending=True).values
        kept &= scores >= left[min(top_k, len(left)) - 1]
    if top_p < 1:
        left = scores[kept].sort(descending=True).values
        mass = left.double().exp().cumsum(0)
        place = int(torch.searchsorted(mass, top_p * mass[-1]))
        kept &= scores >= left[min(place, len(left) - 1)]
    return kept
