"""The compiled CPU kernels beside torch's, on the shapes of SmolLM2-135M: best time of several, in ms.

    python benchmarks/cpu_kernels.py [--threads 2] [--repeat 10]

"linears" are all of the model's (30 layers and the head) one after the other, so that weights come from memory and not from a
cache; "GB/s" is how fast the weights were read at one token, and the line before the table how fast this machine reads at all.
Attention is one layer's, with pages in random order; "torch" is gather + scaled_dot_product_attention.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from quire.kernels import cpu, reference
from quire.kernels.layout import AttentionBatch, attention_batch
from quire.worker.linear import CompiledLinear, Int8Linear, OneDnnLinear, PlainLinear

HIDDEN, HEADS, KV_HEADS, DIM, INTER, LAYERS, VOCAB, PAGE = 576, 9, 3, 64, 1536, 30, 49152, 32
QKV = (HEADS + 2 * KV_HEADS) * DIM
SHAPES = [(QKV, HIDDEN), (HIDDEN, HIDDEN), (2 * INTER, HIDDEN), (HIDDEN, INTER)] * LAYERS + [(VOCAB, HIDDEN)]


def best_ms(call: Callable[[], object], repeat: int) -> float:
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def linears(repeat: int) -> None:
    forms = [PlainLinear, OneDnnLinear, CompiledLinear, Int8Linear]
    counts = (1, 8, 32, 128, 512)
    print("linears, tokens:" + "".join(f"{n:>9}" for n in counts) + "     GB/s")
    for form in forms:
        layers = [(inputs, form(torch.randn(outputs, inputs), None)) for outputs, inputs in SHAPES]
        times = []
        for tokens in counts:
            x = {size: torch.randn(tokens, size) for size in (HIDDEN, INTER)}

            def step(x: dict[int, Tensor] = x, layers: list[tuple[int, Callable[[Tensor], Tensor]]] = layers) -> None:
                for inputs, layer in layers:
                    layer(x[inputs])

            times.append(best_ms(step, max(2, repeat // (1 if tokens <= 32 else 4))))
        weight_bytes = sum(outputs * inputs for outputs, inputs in SHAPES) * (68 / 64 if form is Int8Linear else 4)
        print(f"{form.__name__:16}" + "".join(f"{t:9.1f}" for t in times) + f"{weight_bytes / times[0] / 1e6:9.1f}")
        del layers


def rows_of(streams: int, start: int, count: int) -> AttentionBatch:
    pages = -(-(start + count) // PAGE)
    order = torch.randperm(streams * pages).tolist()
    return attention_batch([(start, count, order[i * pages : (i + 1) * pages]) for i in range(streams)], PAGE)


def attention(repeat: int) -> None:
    print("attention of a layer, streams x (context + new tokens):    compiled       torch")
    for streams, start, count in [(s, c, 1) for s in (1, 8, 32) for c in (128, 512)] + [(1, 0, 512), (1, 3584, 512), (8, 0, 64)]:
        batch = rows_of(streams, start, count)
        pool = torch.randn(int(batch.block_tables.max()) + 1, KV_HEADS, 4, 2, PAGE, DIM)
        q = torch.randn(streams * count, HEADS, DIM)
        layer = [0]

        def run(
            ops: object, pool: Tensor = pool, q: Tensor = q, batch: AttentionBatch = batch, layer: list[int] = layer
        ) -> None:  # another layer each time
            layer[0] = (layer[0] + 1) % 4
            ops.paged_attention(q, pool[:, :, layer[0]], batch, DIM**-0.5, None)  # type: ignore[attr-defined]

        times = [best_ms(lambda ops=ops: run(ops), repeat * 3) for ops in (cpu, reference)]  # type: ignore[misc]
        print(f"{streams:>30} x ({start:5} + {count:3})           {times[0]:12.3f}{times[1]:12.3f}")


def small(repeat: int) -> None:
    print("small operations, tokens:                                         1        8       32      512")
    for name in ("add_rms_norm", "silu_mul", "rope_and_write_kv"):
        for kind, ops in (("compiled", cpu), ("torch", reference)):
            times = []
            for tokens in (1, 8, 32, 512):
                x, residual, weight = torch.randn(tokens, HIDDEN), torch.randn(tokens, HIDDEN), torch.randn(HIDDEN)
                pool = torch.zeros(-(-tokens // PAGE), KV_HEADS, 4, 2, PAGE, DIM)[:, :, 1]
                slots = torch.arange(tokens)
                qkv, table, gate_up = torch.randn(tokens, QKV), torch.randn(tokens, DIM), torch.randn(tokens, 2 * INTER)
                calls = {
                    "add_rms_norm": lambda ops=ops, x=x, r=residual, w=weight: ops.add_rms_norm(x, r, w, 1e-5),
                    "silu_mul": lambda ops=ops, g=gate_up: ops.silu_mul(g),
                    "rope_and_write_kv": lambda ops=ops, qkv=qkv, s=slots, t=table, p=pool: ops.rope_and_write_kv(
                        qkv, s, t, p, s, HEADS, None, None, 1e-5
                    ),
                }
                times.append(best_ms(calls[name], repeat * 10))
            print(f"{name:>30} {kind:>10}, ms {'':12}" + "".join(f"{t:9.4f}" for t in times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if not cpu.available():
        raise SystemExit("there is no C compiler here, so there is nothing to compare")
    memory = torch.ones(128 * 2**20)
    print(f"{arguments.threads} threads; reading memory: {memory.nbytes / best_ms(memory.sum, arguments.repeat) / 1e6:.1f} GB/s")
    with torch.inference_mode():
        linears(arguments.repeat)
        attention(arguments.repeat)
        small(arguments.repeat)


if __name__ == "__main__":
    main()
