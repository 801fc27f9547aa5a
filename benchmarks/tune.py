"""Measures launch parameters on this GPU and writes the best into kernels/tuned.json, beside what stands there of other chips.

    python benchmarks/tune.py [--kernels paged_decode,paged_prefill] [--quick] [--dry-run]

Every shape of a model family and every bucket is tried with every candidate; the table keeps an entry only where it beats the rule by
more than 2 %. Nothing tunes itself at run time: what is not in the table gets the rule. An hour or so on an H200, which is an
estimate: it has not run yet. --quick takes the shapes of Llama-3.1-8B alone. Afterwards `make kernels` checks that each entry compiles
without spills for its chip.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import gpu
import torch
from torch import Tensor
from tqdm import tqdm
from triton.errors import TritonError

from quire.kernels import launch as table
from quire.kernels import page_copy, rms_norm, rope_write, sampling, silu_mul
from quire.kernels.attention_tile import Scores
from quire.kernels.launch import Chip, Shape
from quire.kernels.layout import AttentionBatch
from quire.kernels.paged_decode import DecodeLaunch, decode_rule, paged_decode, prefix_decode, prefix_rule
from quire.kernels.paged_prefill import PrefillLaunch, device_work, paged_prefill, prefill_rule

WORTH = 0.98  # of the rule's time: a smaller gain is noise
CONTEXT = 4096  # keys of a row while attention is tuned
LAYERS, VOCAB = 4, 128256

# (query heads, KV heads, head_dim): Llama-3.1-8B, Qwen2.5-7B, Llama-3.2-1B, Qwen3-0.6B, Gemma-like, and 70B at tp 8
MODELS = [(32, 8, 128), (28, 4, 128), (32, 8, 64), (16, 8, 128), (16, 8, 256), (8, 1, 128)]
PAGES = [16, 32, 64]
WIDTHS = [2048, 3584, 4096, 8192]  # of rows that are normed
ROWS, CHUNKS, TOKENS = [1, 8, 64, 256], [512, 1024], [16, 64, 256, 1024]  # buckets: of decode rows, of chunks of prompts, of any tokens
POOL, COPIED = (512, 8, 32, 2, 32, 128), 64
STORED = [torch.bfloat16, torch.float8_e4m3fn]


class Task(NamedTuple):
    """One entry of the table: its shape, what may be tried, and what is timed."""

    shape: Shape
    rule: Any
    candidates: list[Any]
    call: Callable[[Any], object]


def attention_tasks(kernel: str, quick: bool) -> Iterator[Task]:
    buckets = ROWS if kernel == "paged_decode" else CHUNKS
    for (heads, kv_heads, dim), page, stored, bucket in product(MODELS[:1] if quick else MODELS, PAGES, STORED, buckets):
        shape = Shape(kernel, table.dtype_name(torch.bfloat16, stored), dim, heads // kv_heads, page, bucket)
        rows = bucket if kernel == "paged_decode" else 1
        width = CONTEXT // page
        layer = torch.zeros(rows * width, kv_heads, LAYERS, 2, page, dim, device=gpu.DEVICE, dtype=stored)[:, :, 1]
        tables = torch.randperm(rows * width, device=gpu.DEVICE).to(torch.int32).view(rows, width)
        lens = torch.full((rows,), CONTEXT, dtype=torch.int32, device=gpu.DEVICE)
        q = torch.randn(bucket, heads, dim, device=gpu.DEVICE, dtype=torch.bfloat16)
        if kernel == "paged_decode":
            yield Task(shape, decode_rule(shape, on_this()), decode_candidates(), decode_call(q, layer, tables, lens))
        else:
            yield Task(shape, prefill_rule(shape, on_this()), prefill_candidates(), prefill_call(q, layer, tables, lens))


def decode_candidates() -> list[DecodeLaunch]:
    return [DecodeLaunch(*values) for values in product((32, 64, 128), (2, 4, 8), (3, 5, 7), (256, 512), (16, 32, 64))]


def prefill_candidates() -> list[PrefillLaunch]:
    return [PrefillLaunch(*values) for values in product((64, 128), (32, 64, 128), (4, 8), (3, 5, 7))]


def decode_call(q: Tensor, layer: Tensor, tables: Tensor, lens: Tensor) -> Callable[[DecodeLaunch], object]:
    out, scores = torch.empty_like(q), Scores(q.shape[2] ** -0.5)
    return lambda launch: paged_decode(q, layer, tables, lens, scores, out, launch=launch)


def prefill_call(q: Tensor, layer: Tensor, tables: Tensor, lens: Tensor) -> Callable[[PrefillLaunch], object]:
    count = len(q)
    starts = torch.tensor([0, count], dtype=torch.int32, device=gpu.DEVICE)
    batch = AttentionBatch(starts, lens, tables, starts.long()[:0], 0, (count,), (CONTEXT,))
    out, scores, group = torch.empty_like(q), Scores(q.shape[2] ** -0.5), q.shape[1] // layer.shape[1]
    works: dict[int, Tensor] = {}

    def call(launch: PrefillLaunch) -> None:
        if launch.block_m not in works:
            works[launch.block_m] = device_work(batch, 0, max(1, launch.block_m // group), scores.window, q.device)
        paged_prefill(q, layer, batch, works[launch.block_m], scores, out, launch=launch)

    return call


def small_tasks(kernel: str, quick: bool) -> Iterator[Task]:
    for width, bucket in product(WIDTHS[2:3] if quick else WIDTHS, TOKENS):
        if kernel == "rms_norm":
            shape = Shape(kernel, "bfloat16", width, bucket=bucket)
            x, weight = torch.randn(bucket, width, device=gpu.DEVICE, dtype=torch.bfloat16), torch.ones(width, device=gpu.DEVICE).bfloat16()
            norms = [rms_norm.NormLaunch(*values) for values in product((1, 4096, 8192), (2, 4, 8, 16))]
            yield Task(
                shape,
                rms_norm.norm_rule(shape, on_this()),
                norms,
                lambda launch, x=x, weight=weight: rms_norm.add_rms_norm(x, x, weight, 1e-5, launch),
            )
        else:
            shape = Shape(kernel, "bfloat16", 3 * width, bucket=bucket)
            gate_up = torch.randn(bucket, 6 * width, device=gpu.DEVICE, dtype=torch.bfloat16)
            silus = [silu_mul.SiluLaunch(*values) for values in product((512, 1024, 2048, 4096), (2, 4, 8))]
            yield Task(
                shape, silu_mul.silu_rule(shape, on_this()), silus, lambda launch, gate_up=gate_up: silu_mul.silu_mul(gate_up, launch)
            )


def prefix_tasks(kernel: str, quick: bool) -> Iterator[Task]:
    """A batch that shares CONTEXT keys: they lie once in the pool."""
    for (heads, kv_heads, dim), page, stored, bucket in product(MODELS[:1] if quick else MODELS, PAGES, STORED, ROWS[1:]):
        shape = Shape(kernel, table.dtype_name(torch.bfloat16, stored), dim, heads // kv_heads, page, bucket)
        width = CONTEXT // page
        layer = torch.zeros(width, kv_heads, LAYERS, 2, page, dim, device=gpu.DEVICE, dtype=stored)[:, :, 1]
        pages = torch.randperm(width, device=gpu.DEVICE).to(torch.int32)
        length = torch.full((1,), CONTEXT, dtype=torch.int32, device=gpu.DEVICE)
        q = torch.randn(bucket, heads, dim, device=gpu.DEVICE, dtype=torch.bfloat16)
        out, lse = torch.empty_like(q, dtype=torch.float32), torch.empty(bucket, heads, device=gpu.DEVICE)
        yield Task(
            shape,
            prefix_rule(shape, on_this()),
            decode_candidates(),
            partial(prefix_decode, q, layer, pages, length, Scores(dim**-0.5), out, lse),
        )


def rope_tasks(kernel: str, quick: bool) -> Iterator[Task]:
    for (heads, kv_heads, dim), page, stored, bucket in product(MODELS[:1] if quick else MODELS, PAGES, STORED, TOKENS):
        shape = Shape(kernel, table.dtype_name(torch.bfloat16, stored), dim, heads // kv_heads, page, bucket)
        qkv = torch.randn(bucket, (heads + 2 * kv_heads) * dim, device=gpu.DEVICE, dtype=torch.bfloat16)
        layer = torch.zeros(-(-bucket // page), kv_heads, LAYERS, 2, page, dim, device=gpu.DEVICE, dtype=stored)[:, :, 1]
        at, cos_sin = torch.randperm(bucket, device=gpu.DEVICE), torch.randn(bucket, dim, device=gpu.DEVICE)
        candidates = [rope_write.RopeLaunch(*values) for values in product((4, 8, 16, 32, 64), (2, 4, 8))]
        call = partial(rope_write.rope_and_write_kv, qkv, at, cos_sin, layer, at, heads, None, None, 1e-5)
        yield Task(shape, rope_write.rope_rule(shape, on_this()), candidates, call)


def copy_tasks(kernel: str, quick: bool) -> Iterator[Task]:
    """With at most 16 programs, whatever would be faster: a copy leaves the multiprocessors to the step that it runs beside."""
    pool = torch.zeros(*POOL, device=gpu.DEVICE, dtype=torch.bfloat16)
    order = torch.randperm(len(pool), device=gpu.DEVICE)
    candidates = [page_copy.CopyLaunch(*values) for values in product((12, 16), (1024, 2048, 4096, 8192), (4, 8, 16))]
    shape = Shape(kernel, "int32")
    call = partial(page_copy.move_pages, pool, order[:COPIED], pool, order[COPIED : 2 * COPIED])
    yield Task(shape, page_copy.copy_rule(shape, on_this()), candidates, call)


def sampling_tasks(kernel: str, quick: bool) -> Iterator[Task]:
    """Half of the rows search a threshold."""
    for bucket in ROWS:
        shape = Shape(kernel, "float32", bucket=bucket)
        logits = torch.randn(bucket, VOCAB, device=gpu.DEVICE) * 3
        top_k = 40 * (torch.arange(bucket, device=gpu.DEVICE, dtype=torch.int32) % 2)
        rows = sampling.SampleRows(
            temperature=torch.ones(bucket, device=gpu.DEVICE),
            top_k=top_k,
            top_p=torch.ones(bucket, device=gpu.DEVICE),
            min_p=torch.full((bucket,), float("-inf"), device=gpu.DEVICE),
            keys=torch.randint(0, 2**31, (bucket, 2), dtype=torch.int32, device=gpu.DEVICE),
            cell_starts=torch.zeros(bucket + 1, dtype=torch.int32, device=gpu.DEVICE),
            cell_tokens=torch.zeros(1, dtype=torch.int32, device=gpu.DEVICE),
            cell_bias=torch.zeros(1, device=gpu.DEVICE),
            penalties=torch.tensor([[1.0, 0.0, 0.0]], device=gpu.DEVICE).repeat(bucket, 1),
            owners=torch.arange(bucket, device=gpu.DEVICE),
            uncounted=torch.zeros(bucket, dtype=torch.int32, device=gpu.DEVICE),
            held=torch.zeros(bucket, VOCAB, dtype=torch.int16, device=gpu.DEVICE),
            latest=torch.zeros(bucket, dtype=torch.int64, device=gpu.DEVICE),
        )
        candidates = [sampling.SampleLaunch(*values) for values in product((1024, 2048, 4096, 8192), (4, 8, 16))]
        yield Task(shape, sampling.sample_rule(shape, on_this()), candidates, partial(sampling.sample, logits, rows))


KERNELS: dict[str, Callable[[str, bool], Iterator[Task]]] = {
    "paged_decode": attention_tasks,
    "paged_prefill": attention_tasks,
    "rms_norm": small_tasks,
    "silu_mul": small_tasks,
    "prefix_decode": prefix_tasks,
    "rope_write": rope_tasks,
    "page_copy": copy_tasks,
    "sampling": sampling_tasks,
}


def on_this() -> Chip:
    return table.chip(torch.device(gpu.DEVICE))


def best_of(task: Task) -> tuple[Any, float, float]:
    """The best candidate, its time, and the rule's, in ms."""
    of_rule = gpu.time_ms(lambda: task.call(task.rule))
    best, best_ms = task.rule, of_rule
    for candidate in task.candidates:
        try:
            taken = gpu.time_ms(lambda candidate=candidate: task.call(candidate))
        except (TritonError, RuntimeError):  # more shared memory or registers than the chip has, or the compiler gives up
            continue
        if taken < best_ms:
            best, best_ms = candidate, taken
    return best, best_ms, of_rule


def main() -> None:
    parser = gpu.arguments(__doc__)
    parser.add_argument("--kernels", default=",".join(KERNELS), help=f"some of {', '.join(KERNELS)}")
    parser.add_argument("--quick", action="store_true", help="the shapes of one model")
    parser.add_argument("--dry-run", action="store_true", help="print, and leave the table as it is")
    args = parser.parse_args()
    gpu.require_cuda()
    arch = on_this().arch
    found: list[dict[str, Any]] = []
    for kernel in args.kernels.split(","):
        for task in tqdm(KERNELS[kernel](kernel, args.quick), desc=kernel, unit="shape"):
            best, best_ms, of_rule = best_of(task)
            tqdm.write(f"{task.shape}: {of_rule * 1e3:.1f} us by the rule, {best_ms * 1e3:.1f} us with {best}")
            if best_ms < WORTH * of_rule:
                found.append({**asdict(task.shape), "arch": arch, "params": asdict(best)})
    tuned = set(args.kernels.split(","))
    content = json.loads(table.TABLE.read_text())
    kept = [entry for entry in content["entries"] if entry["arch"] != arch or entry["kernel"] not in tuned]
    if not args.dry_run:
        entries = sorted(kept + found, key=lambda entry: [str(entry[name]) for name in ("kernel", "arch", "dtype", "head_dim", "bucket")])
        table.TABLE.write_text(json.dumps({"format": table.FORMAT, "entries": entries}, indent=1) + "\n")
    print(f"{len(found)} entries for {gpu.machine()['gpu']} (arch {arch}), {len(kept)} others kept")
    gpu.save(args.json, {"machine": gpu.machine(), "entries": found})


if __name__ == "__main__":
    main()
