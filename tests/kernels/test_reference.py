"""The torch kernels against formulas written out one query, one key, one number at a time, in float64."""

import math

import pytest
import torch
from torch import Tensor

from quire.kernels import reference
from quire.kernels.layout import AttentionBatch, attention_batch

PAGE, PAGES, LAYERS = 4, 48, 3


def empty_pages(kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A layer's view of a page-major pool (so its strides are not packed) that holds NaN everywhere."""
    return torch.full((PAGES, kv_heads, LAYERS, 2, PAGE, head_dim), float("nan"), dtype=dtype)[:, :, 1]


def filled(rows: list[tuple[int, int]], kv_heads: int, head_dim: int) -> tuple[AttentionBatch, Tensor, list[Tensor], list[Tensor]]:
    """Rows (start, count) on pages in random order, with random keys and values in the slots in use and NaN in all others."""
    free = torch.randperm(PAGES).tolist()
    pages = empty_pages(kv_heads, head_dim)
    keys, values, placed = [], [], []
    for start, count in rows:
        table = [free.pop() for _ in range(-(-(start + count) // PAGE))]
        k, v = torch.randn(2, start + count, kv_heads, head_dim, dtype=torch.float64)
        for position in range(start + count):
            pages[table[position // PAGE], :, 0, position % PAGE] = k[position]
            pages[table[position // PAGE], :, 1, position % PAGE] = v[position]
        keys.append(k)
        values.append(v)
        placed.append((start, count, table))
    return attention_batch(placed, PAGE), pages, keys, values


def naive_attention(q: Tensor, batch: AttentionBatch, keys: list[Tensor], values: list[Tensor], scale: float, window: int | None) -> Tensor:
    out = torch.empty_like(q)
    group = q.shape[1] // keys[0].shape[1]
    for row, count in enumerate(batch.row_lens):
        for i in range(count):
            token = int(batch.row_starts[row]) + i
            end = batch.kv_lens_list[row] - count + i + 1
            begin = 0 if window is None else max(0, end - window)
            for head in range(q.shape[1]):
                k, v = keys[row][begin:end, head // group], values[row][begin:end, head // group]
                out[token, head] = ((k @ q[token, head]) * scale).softmax(0) @ v
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 8), (3, 3, 6), (5, 1, 4)])
def test_paged_attention(heads: int, kv_heads: int, head_dim: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(heads)
    monkeypatch.setattr(reference, "QUERIES_AT_ONCE", 3)  # long rows in parts
    batch, pages, keys, values = filled([(0, 1), (7, 1), (12, 1), (0, 5), (3, 9), (2, 2), (11, 1)], kv_heads, head_dim)
    assert batch.num_decode == 3
    q = torch.randn(sum(batch.row_lens), heads, head_dim, dtype=torch.float64)
    got = reference.paged_attention(q, pages, batch, 0.3, window)
    torch.testing.assert_close(got, naive_attention(q, batch, keys, values, 0.3, window), atol=1e-12, rtol=0)


def test_paged_attention_ignores_block_tables_past_a_row_and_rounds_once() -> None:
    torch.manual_seed(0)
    batch, pages, keys, values = filled([(5, 1), (14, 1), (3, 6)], 2, 8)
    batch.block_tables[0, 2:] = 2**30  # nothing to read there
    q = torch.randn(8, 4, 8, dtype=torch.float64)
    expected = naive_attention(q, batch, keys, values, 0.4, None)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.03), (torch.float16, 4e-3)):
        got = reference.paged_attention(q.to(dtype), pages.to(dtype), batch, 0.4, None)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("normed", [False, True])
def test_rope_and_write_kv_turns_pairs_as_complex_numbers(normed: bool) -> None:
    torch.manual_seed(0)
    heads, kv_heads, dim, tokens = 4, 2, 6, 5
    pages = empty_pages(kv_heads, dim)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, dtype=torch.float64)
    positions = torch.tensor([9, 0, 3, 30, 2])
    angles = torch.outer(torch.arange(31, dtype=torch.float64), torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64))
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    slots = torch.tensor([5, 0, 7 * PAGE + 3, 8, 9])
    q_norm, k_norm = torch.rand(2, dim, dtype=torch.float64).unbind() if normed else (None, None)
    got = reference.rope_and_write_kv(qkv, positions, cos_sin, pages, slots, heads, q_norm, k_norm, 1e-3)

    for token in range(tokens):
        for head in range(heads + 2 * kv_heads):
            x = qkv[token, head * dim : (head + 1) * dim]
            if head < heads + kv_heads:
                norm = q_norm if head < heads else k_norm
                if norm is not None:
                    x = x / math.sqrt((x @ x).item() / dim + 1e-3) * norm
                turned = torch.complex(x[:3], x[3:]) * torch.polar(torch.ones(3, dtype=torch.float64), angles[positions[token]])
                x = torch.cat((turned.real, turned.imag))
            if head < heads:
                found = got[token, head]
            else:
                which, kv_head = divmod(head - heads, kv_heads)
                found = pages[slots[token] // PAGE, kv_head, which, slots[token] % PAGE]
            torch.testing.assert_close(found, x, atol=1e-12, rtol=0)
    assert int((~pages.isnan()).sum()) == tokens * kv_heads * 2 * dim  # nothing else was written


@pytest.mark.parametrize("shape", [(3, 7), (1, 1), (2, 3, 64)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(shape[-1], dtype=torch.float64)
    expected = x / (x.pow(2).sum(-1, keepdim=True) / shape[-1] + 1e-2).sqrt() * weight
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-2), expected, atol=1e-12, rtol=0)
    half = reference.rms_norm(x.bfloat16() * 1e18, weight.bfloat16(), 1e-2)  # squares overflow unless they are summed in float32
    assert half.dtype == torch.bfloat16
    assert bool(half.isfinite().all())


def test_add_rms_norm_and_silu_mul() -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, 5, 8, dtype=torch.float64)
    weight = torch.randn(8, dtype=torch.float64)
    normed, stream = reference.add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(stream, x + residual, atol=0, rtol=0)
    torch.testing.assert_close(normed, reference.rms_norm(x + residual, weight, 1e-5), atol=0, rtol=0)
    gate, up = x[:, :4], x[:, 4:]
    torch.testing.assert_close(reference.silu_mul(x), gate / (1 + torch.exp(-gate)) * up, atol=1e-12, rtol=0)
