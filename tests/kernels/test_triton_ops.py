"""The kernels as the decoder calls them: mixed batches, and the promise of the deterministic mode."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interpreter import error, paged, random, tolerance

from quire.kernels import launch, reference, rope_write, triton_ops
from quire.kernels.layout import AttentionBatch
from quire.kernels.triton_ops import FIXED_ROPE, TritonOps

HEADS, KV_HEADS, DIM, PAGE = 6, 2, 64, 16
MIXED = (33, 1), (0, 1), (15, 1), (0, 20), (40, 9)  # decode rows stand first


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 12])
def test_decode_and_prefill_rows_in_one_step(device, deterministic, dtype, window):
    batch, pages = paged(MIXED, KV_HEADS, DIM, PAGE, dtype, device, window)
    q = random((sum(count for _, count in MIXED), HEADS, DIM), dtype, device)
    out = TritonOps(deterministic).paged_attention(q, pages, batch, DIM**-0.5, window)
    expected, _ = reference.attention_states(q, pages, batch, DIM**-0.5, window)
    assert error(out, expected) < tolerance(dtype)


def test_the_work_list_of_another_batch_is_not_reused(device):
    ops = TritonOps()
    for rows in ((0, 20), (3, 5)), ((0, 5), (0, 7)):
        batch, pages = paged(rows, KV_HEADS, DIM, PAGE, torch.float32, device)
        q = random((sum(count for _, count in rows), HEADS, DIM), torch.float32, device)
        expected, _ = reference.attention_states(q, pages, batch, DIM**-0.5)
        assert error(ops.paged_attention(q, pages, batch, DIM**-0.5, None), expected) < tolerance(torch.float32)


def part_of(batch: AttentionBatch, row: int, device: str) -> AttentionBatch:
    """One row of a batch, alone."""
    length = batch.row_lens[row]
    return AttentionBatch(
        row_starts=torch.tensor([0, length], dtype=torch.int32, device=device),
        kv_lens=batch.kv_lens[row : row + 1],
        block_tables=batch.block_tables[row : row + 1],
        slots=batch.slots[:0],
        num_decode=int(length == 1),
        row_lens=(length,),
        kv_lens_list=batch.kv_lens_list[row : row + 1],
    )


def test_deterministic_attention_has_the_same_bits_alone_and_in_any_chunk(device):
    ops = TritonOps(deterministic=True)
    batch, pages = paged(MIXED, KV_HEADS, DIM, PAGE, torch.bfloat16, device)
    q = random((sum(batch.row_lens), HEADS, DIM), torch.bfloat16, device)
    together = ops.paged_attention(q, pages, batch, DIM**-0.5, None)
    for row, first in ((0, 0), (4, 23)):
        alone = ops.paged_attention(q[first : first + batch.row_lens[row]], pages, part_of(batch, row, device), DIM**-0.5, None)
        assert torch.equal(alone, together[first : first + batch.row_lens[row]])
    # The last token of the last row, as a chunk of its own.
    last = part_of(batch, 4, device)
    chunk = AttentionBatch(torch.tensor([0, 1], dtype=torch.int32, device=device), last.kv_lens, last.block_tables, last.slots, 1, (1,),
                           last.kv_lens_list)  # fmt: skip
    assert torch.equal(ops.paged_attention(q[-1:], pages, chunk, DIM**-0.5, None), together[-1:])


def test_deterministic_attention_holds_a_large_group(device):
    batch, pages = paged(((33, 1), (0, 5)), 1, DIM, PAGE, torch.float32, device)
    q = random((6, 20, DIM), torch.float32, device)
    out = TritonOps(deterministic=True).paged_attention(q, pages, batch, DIM**-0.5, None)
    assert error(out, reference.attention_states(q, pages, batch, DIM**-0.5)[0]) < tolerance(torch.float32)


def test_deterministic_norms_have_the_same_bits_in_any_batch(device):
    ops = TritonOps(deterministic=True)
    x, weight = random((9, 96), torch.float32, device), random((96,), torch.float32, device)
    assert torch.equal(ops.rms_norm(x[4:5], weight, 1e-5), ops.rms_norm(x, weight, 1e-5)[4:5])
    normed, stream = ops.add_rms_norm(x, x, weight, 1e-5)
    alone, alone_stream = ops.add_rms_norm(x[8:], x[8:], weight, 1e-5)
    assert torch.equal(alone, normed[8:])
    assert torch.equal(alone_stream, stream[8:])


def test_the_deterministic_mode_has_no_use_for_what_was_measured_for_a_number_of_rows(device, monkeypatch):
    """Entries of two buckets that would add up a head in different orders."""
    shape = launch.Shape("rope_write", "bfloat16", DIM, HEADS // KV_HEADS, PAGE)
    on = launch.chip(torch.device(device)).arch
    entries = {(on, replace(shape, bucket=n)): {"heads": heads, "num_warps": warps} for n, heads, warps in ((1, 1, 1), (4, 8, 8))}
    monkeypatch.setattr(launch, "_table", lambda: entries)
    launch.launch_of.cache_clear()
    used, run = [], rope_write.rope_and_write_kv
    monkeypatch.setattr(triton_ops, "rope_and_write_kv", lambda *args, **named: used.append(named["launch"]) or run(*args, **named))
    qkv, norm = random((3, (HEADS + 2 * KV_HEADS) * DIM), torch.bfloat16, device), random((DIM,), torch.bfloat16, device)
    at, cos_sin = torch.arange(3, device=device), random((8, DIM), torch.float32, device)
    try:
        for deterministic in (True, False):
            rows = []
            for count in (3, 1):
                pages = torch.zeros(1, KV_HEADS, 2, PAGE, DIM, dtype=torch.bfloat16, device=device)
                call = qkv[:count], at[:count], cos_sin, pages, at[:count], HEADS, norm, norm, 1e-5
                rows.append((TritonOps(deterministic).rope_and_write_kv(*call)[0], pages[0, :, :, 0]))
            if deterministic:
                assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))
    finally:
        launch.launch_of.cache_clear()
    assert used == [FIXED_ROPE, FIXED_ROPE, None, None]
