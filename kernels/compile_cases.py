"""What `cross_compile` compiles: calls of every launcher with the shapes that models have, and one for each entry of the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from .attention_tile import Scores
from .cross_compile import ARCHES, Case, Needs
from .launch import Shape, dtype_name, read_table
from .layout import AttentionBatch
from .merge_states import merge_states
from .paged_decode import DecodeLaunch, paged_decode, prefix_decode
from .paged_prefill import PrefillLaunch, paged_prefill

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
KV_HEADS, LAYERS, WIDTH = 2, 2, 64


@dataclass(frozen=True, slots=True)
class Attention:
    """An attention kernel's call. `slot_gap`: elements between one token's keys and the next one's, which a pool never has."""

    kernel: str
    head_dim: int = 128
    dtype: torch.dtype = BF16
    stored: torch.dtype = BF16
    group: int = 4
    page_size: int = 32
    rows: int = 16
    sliding_window: int | None = None
    soft_cap: float | None = None
    params: tuple[tuple[str, int], ...] = ()
    slot_gap: int = 0

    def case(self, arches: tuple[int, ...] = ARCHES) -> Case:
        """The call as a case."""
        extra = "".join(f" {name}" for name, on in (("window", self.sliding_window), ("cap", self.soft_cap), ("table", self.params)) if on)
        name = f"{self.kernel} {dtype_name(self.dtype, self.stored)} d{self.head_dim} g{self.group} p{self.page_size}{extra}"
        needs = Needs.ASYNC_COPIES | Needs.TENSOR_CORES
        if self.kernel == "paged_prefill" and self.stored != FP32:
            needs |= Needs.WARP_GROUP
        return Case(name, self.launch, {"_decode_kernel": needs, "_prefill_kernel": needs}, arches)

    def launch(self) -> None:
        """Call the launcher with tensors of these shapes; what they hold does not matter."""
        q = torch.empty(self.rows, KV_HEADS * self.group, self.head_dim, dtype=self.dtype)
        width = self.head_dim + self.slot_gap
        pages = torch.empty(4, KV_HEADS, LAYERS, 2, self.page_size, width, dtype=self.stored)[:, :, 1, ..., : self.head_dim]
        tables = torch.zeros(self.rows, WIDTH, dtype=torch.int32)
        lens = torch.zeros(self.rows, dtype=torch.int32)
        scores = Scores(self.head_dim**-0.5, self.sliding_window, self.soft_cap)
        out, lse, params = torch.empty_like(q), torch.empty(q.shape[:2]), dict(self.params)
        if self.kernel == "paged_prefill":
            batch = AttentionBatch(torch.zeros(2, dtype=torch.int32), lens, tables, lens, 0, (self.rows,), (self.rows,))
            work = torch.zeros(1, 2, dtype=torch.int32)
            paged_prefill(q, pages, batch, work, scores, out, None, PrefillLaunch(**params) if params else None)
        elif self.kernel == "prefix_decode":
            prefix_decode(q, pages, tables[0], lens[:1], scores, out.float(), lse, DecodeLaunch(**params) if params else None)
        else:
            paged_decode(q, pages, tables, lens, scores, out, None, DecodeLaunch(**params) if params else None)


def all_cases() -> list[Case]:
    """Every case, in a fixed order."""
    return [*attention_cases(), *merge_cases(), *table_cases(read_table())]


def attention_cases() -> Iterator[Case]:
    """Every head dimension and type, and each page size, group and option once."""
    for kernel in ("paged_decode", "paged_prefill"):
        for dim in (64, 80, 96, 128, 256):
            yield Attention(kernel, dim).case()
        yield Attention(kernel, 128, FP16, FP16, group=1, page_size=16, sliding_window=4096).case()
        yield Attention(kernel, 128, BF16, FP8, group=8, page_size=64).case()
        yield Attention(kernel, 128, group=7, soft_cap=30.0).case()
        yield Attention(kernel, 128, FP32, FP32, group=3).case()
        yield Attention(kernel, 256, FP32, FP32).case()
    for dim in (64, 128, 256):
        yield Attention("prefix_decode", dim).case()
    yield Attention("prefix_decode", 128, BF16, FP8, group=8).case()
    yield Attention("prefix_decode", 128, FP32, FP32, group=3).case()


def merge_cases() -> Iterator[Case]:
    """Both of its uses: into the model's type, and in place."""
    for dim, dtype in ((128, BF16), (80, FP32)):
        yield Case(f"merge_states {dtype_name(dtype)} d{dim}", _merge(dim, dtype), {})


def _merge(dim: int, dtype: torch.dtype) -> Callable[[], None]:
    def call() -> None:
        a, b, lse = torch.empty(16, 8, dim), torch.empty(16, 8, dim), torch.empty(16, 8)
        merge_states(a, lse, b, lse, torch.empty(16, 8, dim, dtype=dtype), lse)

    return call


def table_cases(table: dict[tuple[int, Shape], dict[str, int]]) -> Iterator[Case]:
    """A case for each entry of an attention kernel, on its own chip."""
    for (arch, shape), params in table.items():
        dtype, _, stored = shape.dtype.partition("+")
        of = Attention(shape.kernel, shape.head_dim, getattr(torch, dtype), getattr(torch, stored or dtype), shape.group, shape.page_size)
        if shape.kernel in ("paged_decode", "paged_prefill", "prefix_decode"):
            yield replace(of, rows=shape.bucket, params=tuple(params.items())).case((arch,))
