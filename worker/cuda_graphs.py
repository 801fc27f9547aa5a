"""Decode steps as CUDA graphs: one for each of a few batch sizes (buckets), captured when it is first used.

A step of n rows is replayed by the smallest bucket that holds them. The rows that are left over are no-ops: no keys, a slot of -1. The
graph reads its inputs from memory of its own, where `Staging` puts them; grids depend on the bucket alone, and how far the kernels go is
computed on the device from the lengths. All graphs share one memory pool, since no two run at once. Those of several ranks hold NCCL's
sums: every rank captures and replays the same ones in the same order (`device_layers`).

`capture` is what makes a graph of a function; a test on a CPU passes something that calls it again.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels.layout import AttentionBatch
from .sequence_table import Gathered
from .staging import Array, Staging, size_of

BUCKETS = 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512

Forward = Callable[[Tensor, Tensor, Tensor, AttentionBatch], Tensor]
"""(tokens or PENDING, owners, positions, batch) -> hidden states [T, hidden]"""

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""(what to compute) -> (what computes it again, where its result lies then)"""


def buckets_up_to(most: int) -> tuple[int, ...]:
    """The bucket sizes that a batch of at most `most` rows needs; the last one is `most` itself where that is below it."""
    return (*(b for b in BUCKETS if b < most), min(most, BUCKETS[-1]))


class _Graph(NamedTuple):
    batch: AttentionBatch  # the graph reads what its tensors hold, and must not outlive them
    memory: Tensor  # of the inputs that every row has
    tables: Tensor  # [bucket, W]
    replay: Callable[[], None]
    hidden: Tensor  # [bucket, hidden]


class DecodeGraphs:
    """The graphs of one model.

    Args:
        forward: computes rows of one token. Nothing in it may wait for the device, or depend on the rows but through tensors.
        most: rows of one step at most.
        width: pages of one sequence at most.
        device: where.
        capture: makes the graphs.
    """

    def __init__(self, forward: Forward, most: int, width: int, device: torch.device, capture: Capture) -> None:
        self.buckets = buckets_up_to(most)
        self._forward = forward
        self._width = width
        self._device = device
        self._capture = capture
        self._graphs: dict[int, _Graph] = {}
        self._inputs, self._tables = Staging(device), Staging(device)

    def holds(self, step: Gathered) -> bool:
        """Whether this step is rows of one token, and not too many."""
        return step.num_decode == len(step.rows) <= self.buckets[-1]

    def run(self, step: Gathered) -> Tensor:
        """Hidden states [n, hidden] of a step's n rows; good until the next call."""
        rows = len(step.rows)
        bucket = self.buckets[bisect_left(self.buckets, rows)]
        if bucket not in self._graphs:
            self._graphs[bucket] = self._make(bucket)
        graph = self._graphs[bucket]
        self._inputs.upload(_padded(step, bucket), graph.memory)
        width = step.tables.shape[1]
        graph.tables[:rows, :width].copy_(self._tables.upload([step.tables])[0], non_blocking=True)
        graph.replay()
        return graph.hidden[:rows]

    def _make(self, bucket: int) -> _Graph:
        nothing = _padded(None, bucket)
        memory = torch.empty(size_of(nothing), dtype=torch.uint8, device=self._device)
        tables = torch.zeros(bucket, self._width, dtype=torch.int32, device=self._device)
        owners, tokens, positions, slots, kv_lens = Staging(self._device).upload(nothing, memory)
        batch = AttentionBatch(
            row_starts=torch.arange(bucket + 1, dtype=torch.int32, device=self._device),
            kv_lens=kv_lens,
            block_tables=tables,
            slots=slots,
            num_decode=bucket,
            row_lens=(1,) * bucket,
            kv_lens_list=(0,) * bucket,  # the kernels of decode rows look at `kv_lens`
        )
        replay, hidden = self._capture(lambda: self._forward(tokens, owners, positions, batch))
        return _Graph(batch, memory, tables, replay, hidden)


def _padded(step: Gathered | None, bucket: int) -> list[Array]:
    """owners, tokens, positions, slots int64 and kv_lens int32, each [bucket]; rows behind those of `step` are no-ops."""
    padded: list[Array] = [
        np.zeros(bucket, np.int64),
        np.zeros(bucket, np.int64),
        np.zeros(bucket, np.int64),
        np.full(bucket, -1, np.int64),
        np.zeros(bucket, np.int32),
    ]
    if step is not None:
        for array, values in zip(padded, (step.owners, step.tokens, step.positions, step.slots, step.kv_lens), strict=True):
            array[: len(step.rows)] = values
    return padded


class CudaCapture:
    """`Capture` on a GPU."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # one: cuBLAS keeps 32 MiB for each that it has seen

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # once outside of the graph: kernels are compiled, libraries set up, NCCL connects
            compute()
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: pages that move.
        with _nothing_collected(), torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = compute()
        return graph.replay, result


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """What a garbage collection frees may speak to the device, as pinned memory does, which ends a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
