"""Every Triton kernel on a GPU: time, bytes or operations, and the share of what this GPU gave to a plain copy or product in the same run.

    python benchmarks/kernels.py [--only decode,prefill,shared,small,products,copy,sampling] [--json benchmarks/results/kernels_h200.json]

Attention stands beside torch's scaled_dot_product_attention (on keys and values that lie packed, which serving cannot have) and
FlexAttention (compiled, packed as well). Shapes are those of Llama-3.1-8B: 32 heads, 8 KV heads, 128 dimensions, bfloat16.
Pages are 32 tokens, in random order of a pool with the layers of a real one. Takes about three minutes, most of it compiling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import gpu
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from quire.kernels import page_copy, rms_norm, rope_write, silu_mul
from quire.kernels.attention_tile import Scores
from quire.kernels.cascade import cascade_decode
from quire.kernels.fixed_matmul import fixed_matmul
from quire.kernels.layout import AttentionBatch
from quire.kernels.merge_states import merge_states
from quire.kernels.paged_decode import paged_decode
from quire.kernels.paged_prefill import device_work, paged_prefill, prefill_launch
from quire.kernels.sampling import SampleRows, sample

HEADS, KV_HEADS, DIM, PAGE, LAYERS, HIDDEN, INNER, VOCAB = 32, 8, 128, 32, 4, 4096, 14336, 128256
BF16 = torch.bfloat16
SCORES = Scores(DIM**-0.5)
DECODES = (1, 1024), (1, 32768), (8, 2048), (64, 1024), (64, 8192), (256, 1024), (256, 4096)  # rows, keys of each
PREFILLS = (1, 2048, 0), (1, 8192, 0), (1, 16384, 0), (8, 1024, 0), (4, 512, 7680)  # rows, tokens of each, keys before them
TOKENS = 64, 4096
POOL, COPIED = 4096, (16, 256)  # pages
SHARED = (64, 8192, 256), (256, 2048, 256)  # rows, keys of the prefix that they share, keys of each beside it
SAMPLED = 1, 64, 256  # rows
SAMPLINGS = [  # temperature, top_k, top_p, repetition penalty
    ("greedy", 0.0, 0, 1.0, 1.0),
    ("drawn", 1.0, 0, 1.0, 1.0),
    ("drawn, repetition 1.1", 1.0, 0, 1.0, 1.1),
    ("top-k 40, top-p 0.9", 1.0, 40, 0.9, 1.0),
]


class Figure(NamedTuple):
    """One measured call. Either `bytes` or `operations` says what it had to do."""

    kernel: str
    shape: str
    call: Callable[[], object]
    bytes: float = 0.0
    operations: float = 0.0
    peers: tuple[tuple[str, Callable[[], object]], ...] = ()


def pool(pages: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(pages, KV_HEADS, LAYERS, 2, PAGE, DIM, device=gpu.DEVICE, dtype=BF16).to(dtype)


def tables(rows: int, context: int) -> Tensor:
    width = -(-context // PAGE)
    return torch.randperm(rows * width, device=gpu.DEVICE).to(torch.int32).view(rows, width)


def decode() -> Iterator[Figure]:
    for rows, context in DECODES:
        for stored in (BF16, torch.float8_e4m3fn):
            table = tables(rows, context)
            layer = pool(table.numel(), stored)[:, :, 1]
            lens = torch.full((rows,), context, dtype=torch.int32, device=gpu.DEVICE)
            q = torch.randn(rows, HEADS, DIM, device=gpu.DEVICE, dtype=BF16)
            out = torch.empty_like(q)
            name = "bf16 pages" if stored == BF16 else "fp8 pages"
            read = 2 * rows * context * KV_HEADS * DIM * stored.itemsize
            yield Figure(
                "paged_decode",
                f"{rows} x {context}, {name}",
                lambda q=q, layer=layer, table=table, lens=lens, out=out: paged_decode(q, layer, table, lens, SCORES, out),
                bytes=read,
                peers=packed_peers(q.unsqueeze(2), rows, context, False) if stored == BF16 else (),
            )


def prefill() -> Iterator[Figure]:
    for rows, count, cached in PREFILLS:
        context = count + cached
        table = tables(rows, context)
        layer = pool(table.numel())[:, :, 1]
        starts = torch.arange(0, (rows + 1) * count, count, dtype=torch.int32, device=gpu.DEVICE)
        lens = torch.full((rows,), context, dtype=torch.int32, device=gpu.DEVICE)
        slots = torch.empty(0, dtype=torch.int64, device=gpu.DEVICE)
        batch = AttentionBatch(starts, lens, table, slots, 0, (count,) * rows, (context,) * rows)
        q = torch.randn(rows * count, HEADS, DIM, device=gpu.DEVICE, dtype=BF16)
        out = torch.empty_like(q)
        launch = prefill_launch(q, layer)
        work = device_work(batch, 0, max(1, launch.block_m // (HEADS // KV_HEADS)), SCORES.window, q.device)
        pairs = rows * (count * cached + count * (count + 1) / 2)
        yield Figure(
            "paged_prefill",
            f"{rows} x {count} after {cached}",
            lambda q=q, layer=layer, batch=batch, work=work, out=out, launch=launch: paged_prefill(
                q, layer, batch, work, SCORES, out, launch=launch
            ),
            operations=4 * pairs * HEADS * DIM,
            peers=packed_peers(q.view(rows, count, HEADS, DIM).transpose(1, 2), rows, context, True) if not cached else (),
        )


def packed_peers(q: Tensor, rows: int, context: int, causal: bool) -> tuple[tuple[str, Callable[[], object]], ...]:
    """torch's own attention for queries [rows, heads, n, dim] over packed keys and values."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # each shape is compiled for itself; after eight of them torch would give up
    k, v = (torch.randn(rows, KV_HEADS, context, DIM, device=gpu.DEVICE, dtype=BF16) for _ in range(2))
    flex = torch.compile(flex_attention, dynamic=False)
    length = q.shape[2]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, context, device=gpu.DEVICE) if causal else None
    return (
        ("sdpa", lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)),
        ("flex", lambda: flex(q, k, v, block_mask=mask, enable_gqa=True)),
    )


def small() -> Iterator[Figure]:
    for tokens in TOKENS:
        x, residual = (torch.randn(tokens, HIDDEN, device=gpu.DEVICE, dtype=BF16) for _ in range(2))
        weight = torch.randn(HIDDEN, device=gpu.DEVICE, dtype=BF16)
        yield Figure("rms_norm", f"{tokens} x {HIDDEN}", partial(rms_norm.rms_norm, x, weight, 1e-5), bytes=2 * x.nbytes)
        yield Figure(
            "add_rms_norm",
            f"{tokens} x {HIDDEN}",
            lambda x=x, residual=residual, weight=weight: rms_norm.add_rms_norm(x, residual, weight, 1e-5),
            bytes=4 * x.nbytes,
        )
        gate_up = torch.randn(tokens, 2 * INNER, device=gpu.DEVICE, dtype=BF16)
        yield Figure("silu_mul", f"{tokens} x {INNER}", lambda gate_up=gate_up: silu_mul.silu_mul(gate_up), bytes=1.5 * gate_up.nbytes)
        qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * DIM, device=gpu.DEVICE, dtype=BF16)
        layer = pool(-(-tokens // PAGE))[:, :, 1]
        slots = torch.randperm(tokens, device=gpu.DEVICE)
        cos_sin = torch.randn(8192, DIM, device=gpu.DEVICE)
        yield Figure(
            "rope_write",
            f"{tokens} tokens",
            lambda qkv=qkv, layer=layer, slots=slots, cos_sin=cos_sin: rope_write.rope_and_write_kv(
                qkv, slots, cos_sin, layer, slots, HEADS, None, None, 1e-5
            ),
            bytes=2 * qkv.nbytes,
        )


def shared() -> Iterator[Figure]:
    """Beside the same rows when the prefix is read by each of them."""
    for rows, prefix, own in SHARED:
        table = tables(rows, prefix + own)
        table[:, : prefix // PAGE] = table[0, : prefix // PAGE].clone()
        layer = pool(table.numel())[:, :, 1]
        lens = torch.full((rows,), prefix + own, dtype=torch.int32, device=gpu.DEVICE)
        q = torch.randn(rows, HEADS, DIM, device=gpu.DEVICE, dtype=BF16)
        out = torch.empty_like(q)
        yield Figure(
            "cascade",
            f"{rows} x ({prefix} shared + {own})",
            partial(cascade_decode, q, layer, table, lens, prefix // PAGE, SCORES, out),
            bytes=2 * (prefix + rows * own) * KV_HEADS * DIM * BF16.itemsize,
            peers=(("each its own", partial(paged_decode, q, layer, table, lens, SCORES, out)),),
        )
        a, b = (torch.randn(rows, HEADS, DIM, device=gpu.DEVICE) for _ in range(2))
        lse = torch.randn(rows, HEADS, device=gpu.DEVICE)
        read = a.nbytes + b.nbytes + 2 * lse.nbytes + out.nbytes
        yield Figure("merge_states", f"{rows} x {HEADS}", partial(merge_states, a, lse, b, lse, out), bytes=read)


def products() -> Iterator[Figure]:
    """The deterministic mode's product beside the library's."""
    weight = torch.randn(INNER, HIDDEN, device=gpu.DEVICE, dtype=BF16)
    for tokens in TOKENS:
        x = torch.randn(tokens, HIDDEN, device=gpu.DEVICE, dtype=BF16)
        yield Figure(
            "fixed_matmul",
            f"{tokens} x {HIDDEN} x {INNER}",
            partial(fixed_matmul, x, weight),
            operations=2 * tokens * HIDDEN * INNER,
            peers=(("torch", partial(F.linear, x, weight)),),
        )


def copies() -> Iterator[Figure]:
    whole = pool(POOL)
    staging = torch.empty_like(whole[: max(COPIED)])
    for count in COPIED:
        ids = torch.randperm(len(whole), device=gpu.DEVICE)[:count]
        yield Figure(
            "page_copy",
            f"pack {count} pages of {whole[0].nbytes >> 10} KiB",
            lambda ids=ids, count=count: page_copy.move_pages(whole, ids, staging[:count], None),
            bytes=2 * count * whole[0].nbytes,
        )
        yield Figure(
            "page_copy",
            f"unpack {count} pages of {whole[0].nbytes >> 10} KiB",
            lambda ids=ids, count=count: page_copy.move_pages(staging[:count], None, whole, ids),
            bytes=2 * count * whole[0].nbytes,
        )


def sample_figures() -> Iterator[Figure]:
    for rows in SAMPLED:
        logits = torch.randn(rows, VOCAB, device=gpu.DEVICE) * 3
        for name, temperature, top_k, top_p, repetition in SAMPLINGS:
            how = sample_rows(rows, temperature, top_k, top_p, repetition)
            yield Figure("sampling", f"{rows} x {VOCAB} {name}", lambda logits=logits, how=how: sample(logits, how), bytes=logits.nbytes)


def sample_rows(rows: int, temperature: float, top_k: int, top_p: float, repetition: float) -> SampleRows:
    def column(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device=gpu.DEVICE)

    return SampleRows(
        temperature=column(temperature, torch.float32),
        top_k=column(top_k, torch.int32),
        top_p=column(top_p, torch.float32),
        min_p=column(float("-inf"), torch.float32),
        keys=torch.randint(0, 2**31, (rows, 2), dtype=torch.int32, device=gpu.DEVICE),
        cell_starts=torch.zeros(rows + 1, dtype=torch.int32, device=gpu.DEVICE),
        cell_tokens=torch.zeros(1, dtype=torch.int32, device=gpu.DEVICE),
        cell_bias=torch.zeros(1, device=gpu.DEVICE),
        penalties=torch.tensor([[repetition, 0.0, 0.0]], device=gpu.DEVICE).repeat(rows, 1),
        owners=torch.arange(rows, device=gpu.DEVICE),
        uncounted=column(1, torch.int32),
        held=torch.randint(0, 2, (rows, VOCAB), dtype=torch.int16, device=gpu.DEVICE),
        latest=torch.zeros(rows, dtype=torch.int64, device=gpu.DEVICE),
    )


GROUPS = {
    "decode": decode,
    "prefill": prefill,
    "shared": shared,
    "small": small,
    "products": products,
    "copy": copies,
    "sampling": sample_figures,
}


def main() -> None:
    parser = gpu.arguments(__doc__)
    parser.add_argument("--only", default=",".join(GROUPS), help=f"some of {', '.join(GROUPS)}")
    args = parser.parse_args()
    gpu.require_cuda()
    chosen = [GROUPS[name] for name in args.only.split(",")]
    bandwidth, rate = gpu.copy_bandwidth(), gpu.matmul_rate()
    result: dict[str, Any] = {"machine": gpu.machine(), "copy_gb_s": bandwidth / 1e9, "matmul_tflop_s": rate / 1e12, "kernels": []}
    print(f"{result['machine']}\ncopy {bandwidth / 1e9:.0f} GB/s, bf16 product {rate / 1e12:.0f} TFLOP/s")
    print(f"{'kernel':16}{'shape':36}{'us':>9}{'GB/s':>8}{'TFLOP/s':>9}{'of limit':>9}   peers, us")
    for group in chosen:
        for figure in tqdm(group(), leave=False, unit="shape", desc=group.__name__):
            row = measured(figure, bandwidth, rate)
            result["kernels"].append(row)
            peers = ", ".join(f"{name} {us:.1f}" if us else f"{name} -" for name, us in row["peers_us"].items())
            speed = f"{row['gb_s']:8.0f}{'':9}" if figure.bytes else f"{'':8}{row['tflop_s']:9.0f}"
            tqdm.write(f"{figure.kernel:16}{figure.shape:36}{row['us']:9.1f}{speed}{row['of_limit']:9.1%}   {peers}")
    gpu.save(args.json, result)


def measured(figure: Figure, bandwidth: float, rate: float) -> dict[str, Any]:
    seconds = gpu.time_ms(figure.call) * 1e-3
    peers: dict[str, float | None] = {}
    for name, call in figure.peers:
        try:
            peers[name] = gpu.time_eager_ms(call) * 1e3
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:  # a peer that cannot do a shape is no reason to stop
            tqdm.write(f"{name} cannot do {figure.shape}: {str(error).splitlines()[0]}")
            peers[name] = None
    return {
        "kernel": figure.kernel,
        "shape": figure.shape,
        "us": seconds * 1e6,
        "gb_s": figure.bytes / seconds / 1e9,
        "tflop_s": figure.operations / seconds / 1e12,
        "of_limit": figure.bytes / seconds / bandwidth if figure.bytes else figure.operations / seconds / rate,
        "peers_us": peers,
    }


if __name__ == "__main__":
    main()
