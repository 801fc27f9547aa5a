"""The rig of all Triton kernel tests: where they run, pages full of traps, and Triton's interpreter made right in bfloat16.

A test takes the `device` fixture (tests/kernels/conftest.py) and runs on CPU tensors in the interpreter, or with `pytest -m gpu` on a
CUDA device. tests/conftest.py sets TRITON_INTERPRET before anything imports Triton: the interpreter replaces Triton's own library
functions as well, so one process can either interpret or compile. Tests that compile start another process.

The interpreter takes 10 to 25 ms for each program of a launch: a test should come by with 60 of them, and a case be small.

- `error(got, expected)` is ||got - expected|| / ||expected||, `tolerance(dtype)` what is allowed.
- `paged(...)` places rows on pages in random order of a view into a bigger pool. What no query may look at is NaN: slots that are not
  written, pages that nobody owns, other layers; block table entries past a row's end point outside of the pool.
- `install()` mends bfloat16: the interpreter computes on the raw 16-bit patterns and truncates when it casts. `plain()` takes the mend
  away for a moment. Reductions of bfloat16 are not mended: kernels cast to float32 first. It also mends `tl.dot`, which is NumPy's product:
  on some processors its BLAS adds up the rows of one product in different orders, where a tensor core has one order for all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from quire.kernels.layout import AttentionBatch, attention_batch

FP8 = torch.float8_e4m3fn
LAYERS = 3  # of the pool that the layer view is cut from
OUTSIDE = 1 << 28  # a page that no pool has

Rows = Sequence[tuple[int, int]]  # (position of the first token, number of tokens); (-1, 1) is a padded row


def error(got: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm; infinite if either holds a NaN."""
    got, expected = got.double().cpu(), expected.double().cpu()
    found = float((got - expected).norm() / expected.norm())
    return math.inf if math.isnan(found) else found


def tolerance(dtype: torch.dtype) -> float:
    """What `error` may be in this type."""
    return {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


def random(shape: Sequence[int], dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same on every device."""
    return (torch.randn(*shape) * scale).to(dtype).to(device)


def poison(shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
    """NaN everywhere, in any type."""
    return torch.full(tuple(shape), math.nan).to(dtype).to(device)


def paged(
    rows: Rows, kv_heads: int, dim: int, page_size: int, dtype: torch.dtype, device: str, window: int | None = None
) -> tuple[AttentionBatch, Tensor]:
    """The batch of `rows` and the layer view [P, kv_heads, 2, page_size, dim] that holds their keys and values.

    Only what a query of the batch sees is written, so keys before all windows are NaN too.
    """
    counts = [-(-(start + count) // page_size) for start, count in rows]
    order = torch.randperm(sum(counts) + 3).tolist()
    pool = torch.full((len(order), kv_heads, LAYERS, 2, page_size, dim), math.nan)
    layer = pool[:, :, 1]
    placed = []
    for (start, count), needed in zip(rows, counts, strict=True):
        table = [order.pop() for _ in range(needed)]
        for position in range(0 if window is None else max(0, start - window + 1), start + count):
            layer[table[position // page_size], :, :, position % page_size] = torch.randn(kv_heads, 2, dim)
        placed.append((start, count, table))
    slotted = [(max(start, 0), count, table or [0]) for start, count, table in placed]
    batch = attention_batch(slotted, page_size)
    kv_lens = tuple(start + count for start, count in rows)
    tables = torch.full_like(batch.block_tables, OUTSIDE)
    for row, (_, _, table) in enumerate(placed):
        tables[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
    on_device = AttentionBatch(
        row_starts=batch.row_starts.to(device),
        kv_lens=torch.tensor(kv_lens, dtype=torch.int32, device=device),
        block_tables=tables.to(device),
        slots=batch.slots.to(device),
        num_decode=batch.num_decode,
        row_lens=batch.row_lens,
        kv_lens_list=kv_lens,
    )
    return on_device, pool.to(dtype).to(device)[:, :, 1]


_BUILDER = interpreter.InterpreterBuilder
_MENDED = "cast_impl", "create_fp_to_fp", "create_dot", "binary_op", "unary_op"
_ORIGINAL: dict[str, Any] = {name: getattr(_BUILDER, name) for name in _MENDED}


def _up(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def _down(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16's bits, to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _is_fp8(dtype: Any) -> bool:
    return dtype.is_floating() and dtype.primitive_bitwidth == 8


def _cast(self: Any, source: Any, target: Any) -> Any:
    handle, kind, wanted = interpreter.TensorHandle, source.dtype.scalar, target.scalar
    if kind == tl.bfloat16 and wanted != tl.bfloat16:
        return handle(_up(source.data).astype(interpreter._get_np_dtype(target)), wanted)
    if wanted == tl.bfloat16 and kind != tl.bfloat16 and not _is_fp8(kind):
        return handle(_down(source.data.astype(np.float32)), wanted)
    return _ORIGINAL["cast_impl"](self, source, target)


def _fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
    kinds = source.dtype.scalar, target.scalar
    if tl.bfloat16 in kinds and not any(_is_fp8(kind) for kind in kinds):
        return _cast(self, source, target)
    return _ORIGINAL["create_fp_to_fp"](self, source, target, rounding)


def _dot(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
    if _is_fp8(a.dtype) or _is_fp8(b.dtype):
        return _ORIGINAL["create_dot"](self, a, b, acc, *rest)
    left, right = ((_up(x.data) if _is_bf16(x) else x.data).astype(np.float64) for x in (a, b))
    product = np.matmul(left, right).astype(acc.data.dtype)  # rounded once, so that the order of its sums does not show
    return interpreter.TensorHandle(product + acc.data, acc.dtype.scalar)


def _binary(self: Any, left: Any, right: Any, operation: Any) -> Any:
    if not (_is_bf16(left) and _is_bf16(right)):
        return _ORIGINAL["binary_op"](self, left, right, operation)
    result = operation(_up(left.data), _up(right.data))
    if result.dtype == np.bool_:
        return interpreter.TensorHandle(result, tl.int1)
    return interpreter.TensorHandle(_down(result), tl.bfloat16)


def _unary(self: Any, argument: Any, operation: Any) -> Any:
    if not _is_bf16(argument):
        return _ORIGINAL["unary_op"](self, argument, operation)
    return interpreter.TensorHandle(_down(operation(_up(argument.data))), tl.bfloat16)


def install() -> None:
    """Mend bfloat16 and products in the interpreter."""
    for name, mended in zip(_MENDED, (_cast, _fp_to_fp, _dot, _binary, _unary), strict=True):
        setattr(_BUILDER, name, mended)


@contextmanager
def plain() -> Iterator[None]:
    """The interpreter as it is delivered, for a test that shows what is wrong with it."""
    for name, original in _ORIGINAL.items():
        setattr(_BUILDER, name, original)
    try:
        yield
    finally:
        install()
