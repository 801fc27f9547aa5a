"""Norms, activation, rotary embedding with the KV write, and page moves against their oracles in float64."""

from __future__ import annotations

import interpreter as rig
import pytest
import torch

from quire.kernels import page_copy, reference, rms_norm, rope_write, silu_mul

DTYPES = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 576), (7, 100), (5, 4097)])
def test_rms_norm(device, dtype, rows, width):
    x = rig.random((rows, width + 16), dtype, device)[:, :width]  # rows with gaps between them
    weight = rig.random((width,), dtype, device)
    assert rig.error(rms_norm.rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5)) < rig.tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (6, 576), (2, 1000)])
def test_add_rms_norm(device, dtype, rows, width):
    x, residual = rig.random((rows, width), dtype, device), rig.random((rows, width), dtype, device, 4.0)
    weight = rig.random((width,), dtype, device)
    out, stream = rms_norm.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(stream, x + residual)  # the stream is rounded once, as torch rounds it
    assert rig.error(out, reference.rms_norm(stream.double(), weight.double(), 1e-6)) < rig.tolerance(dtype)


def test_norm_refuses_what_does_not_go_together(device):
    x = rig.random((2, 64), torch.float32, device)
    with pytest.raises(ValueError, match="weight"):
        rms_norm.rms_norm(x, x[0, :32], 1e-5)
    with pytest.raises(ValueError, match="residual"):
        rms_norm.add_rms_norm(x, x[:1], x[0], 1e-5)
    assert rms_norm.rms_norm(x[:0], x[0], 1e-5).shape == (0, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner"), [(1, 8), (3, 1536), (2, 1025)])
def test_silu_mul(device, dtype, rows, inner):
    gate_up = rig.random((rows, 2 * inner), dtype, device, 5.0)
    gate_up[0, 0] = -200.0  # e^200 is beyond float32
    assert rig.error(silu_mul.silu_mul(gate_up), reference.silu_mul(gate_up.double())) < rig.tolerance(dtype)


def written(device, dtype, kv_dtype, heads, kv_heads, dim, page_size, norm, tokens=5):
    """(q, layer view) of the kernel and of the oracle, from NaN-filled pools; the third token is padding."""
    qkv = rig.random((tokens, (heads + 2 * kv_heads) * dim), dtype, device)
    positions = torch.tensor([0, 7, 3, 500, 21][:tokens], device=device)
    slots = torch.tensor([page_size, 3 * page_size - 1, -1, 0, 5 * page_size + 1][:tokens], device=device)
    angles = torch.randn(512, dim // 2)
    cos_sin = torch.cat((angles.cos(), angles.sin()), 1).to(device)
    norms = [rig.random((dim,), dtype, device) for _ in range(2)] if norm else [None, None]
    pool = rig.poison((6, kv_heads, rig.LAYERS, 2, page_size, dim), kv_dtype, device)
    q = rope_write.rope_and_write_kv(qkv, positions, cos_sin, pool[:, :, 1], slots, heads, *norms, 1e-5)
    oracle = rig.poison((6, kv_heads, rig.LAYERS, 2, page_size, dim), torch.float64, device)
    real = slots >= 0
    wide = [None if w is None else w.double() for w in norms]
    expected = reference.rope_and_write_kv(
        qkv[real].double(), positions[real], cos_sin.double(), oracle[:, :, 1], slots[real], heads, *wide, 1e-5
    )
    return (q[real], pool), (expected, oracle)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page_size", "norm"),
    [(9, 3, 64, 32, False), (4, 1, 128, 16, True), (7, 7, 80, 64, False), (8, 1, 96, 16, True), (2, 2, 256, 32, False)],
)
def test_rope_and_write(device, dtype, heads, kv_heads, dim, page_size, norm):
    (q, pool), (expected, oracle) = written(device, dtype, dtype, heads, kv_heads, dim, page_size, norm)
    assert rig.error(q, expected) < rig.tolerance(dtype)
    there = ~oracle.isnan()
    assert torch.equal(~pool.isnan(), there)  # its slots and nothing else
    assert rig.error(pool[there], oracle[there]) < rig.tolerance(dtype)


def test_fp8_pages_hold_the_nearest_values(device):
    (_, pool), (_, oracle) = written(device, torch.float32, rig.FP8, 4, 2, 64, 16, False)
    there = ~oracle.isnan()
    assert torch.equal(pool.float()[there], oracle[there].float().to(rig.FP8).float())


def test_every_fp8_value_and_midpoint_is_rounded_as_torch_rounds_it(device):
    values = torch.arange(256, dtype=torch.uint8).view(rig.FP8).float()
    values = values[~values.isnan()].sort().values
    numbers = torch.cat((values, (values[1:] + values[:-1]) / 2, torch.randn(300), torch.tensor([1e9, -1e9, 1e-9, -0.0, torch.nan])))
    numbers = torch.cat((numbers, numbers[: -len(numbers) % 64])).to(device)
    tokens = len(numbers) // 64
    qkv = torch.cat((torch.zeros(tokens, 128, device=device), numbers.view(tokens, 64)), 1)  # values are stored as they come
    cos_sin = torch.cat((torch.ones(1, 32), torch.zeros(1, 32)), 1).to(device)
    slots, positions = torch.arange(tokens, device=device), torch.zeros(tokens, dtype=torch.int64, device=device)
    pages = torch.zeros(1, 1, 2, 16, 64, device=device).to(rig.FP8)
    rope_write.rope_and_write_kv(qkv, positions, cos_sin, pages, slots, 1, None, None, 1e-5)
    expected = numbers.clamp(-448, 448).to(rig.FP8).float()
    assert torch.equal(pages[0, 0, 1, :tokens].float().view(-1).nan_to_num(512), expected.nan_to_num(512))


def test_rope_refuses_what_does_not_go_together(device):
    pages = torch.zeros(1, 1, 2, 16, 64, device=device)
    qkv, zero = torch.zeros(1, 3 * 64, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    cos_sin = torch.zeros(1, 64, device=device)
    with pytest.raises(ValueError, match="2 heads"):
        rope_write.rope_and_write_kv(qkv, zero, cos_sin, pages, zero, 2, None, None, 1e-5)
    with pytest.raises(ValueError, match="normed both"):
        rope_write.rope_and_write_kv(qkv, zero, cos_sin, pages, zero, 1, cos_sin[0], None, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("page", [(2, 3, 2, 16, 8), (1, 1, 2, 4, 6)])
def test_pages_come_through_packing_whole(device, dtype, page):
    pool = torch.randint(0, 200, (9, *page), device=device).to(dtype)
    before = pool.clone()
    order = torch.tensor([7, 0, 3], device=device)
    staging = torch.zeros(5, *page, dtype=dtype, device=device)
    page_copy.move_pages(pool, order, staging[:3], None)  # pack
    assert torch.equal(staging[:3], before[order])
    assert not staging[3:].any()
    target = torch.tensor([1, 8, 2], device=device)
    page_copy.move_pages(staging[:3], None, pool, target)  # unpack
    expected = before.clone()
    expected[target] = before[order]
    assert torch.equal(pool, expected)
    page_copy.move_pages(pool, torch.tensor([7], device=device), pool, torch.tensor([4], device=device))  # copy on write
    expected[4] = expected[7]
    assert torch.equal(pool, expected)


def test_any_number_of_pages_takes_the_same_small_grid(device):
    pool = torch.randint(0, 2**31, (40, 3, 8), dtype=torch.int32, device=device)
    staging = torch.zeros_like(pool)
    page_copy.move_pages(pool, torch.arange(39, -1, -1, device=device), staging, None, page_copy.CopyLaunch(3, 16, 4))
    assert torch.equal(staging, pool.flip(0))


def test_page_moves_refuse_other_pages(device):
    pool = torch.zeros(4, 2, 8, device=device)
    one = torch.tensor([1], device=device)
    for other, ids, said in [(torch.zeros(4, 2, 9, device=device), one, "are not"), (pool.half(), one, "are not"),
                             (pool, torch.tensor([1, 2], device=device), "as many"), (pool.transpose(1, 2), one, "are not")]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            page_copy.move_pages(pool, one, other, ids)
    with pytest.raises(ValueError, match="one span"):
        page_copy.move_pages(pool.transpose(1, 2), one, pool.transpose(1, 2), one)
