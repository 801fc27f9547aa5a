"""What `cross_compile` compiles: calls of every launcher with the shapes that models have, and one for each entry of the table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch

from .attention_tile import Scores
from .cascade import cascade_decode
from .cross_compile import ARCHES, Case, Needs
from .fixed_matmul import fixed_matmul
from .launch import Shape, dtype_name, read_table
from .layout import AttentionBatch
from .merge_states import merge_states
from .page_copy import CopyLaunch, move_pages
from .paged_decode import DecodeLaunch, paged_decode, prefix_decode
from .paged_prefill import PrefillLaunch, paged_prefill
from .rms_norm import NormLaunch, add_rms_norm, rms_norm
from .rope_write import RopeLaunch, rope_and_write_kv
from .sampling import SampleLaunch, SampleRows, sample
from .silu_mul import SiluLaunch, silu_mul
from .triton_ops import FIXED_ROPE, fixed_attention

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
KV_HEADS, LAYERS, WIDTH = 2, 2, 64


@dataclass(frozen=True, slots=True)
class Attention:
    """An attention kernel's call.

    Attributes:
        params: of the launch; the rule's by default.
        chosen: where `params` come from, for the name.
        slot_gap: elements between one token's keys and the next one's, which a pool never has.
    """

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
    chosen: str = ""
    slot_gap: int = 0

    def case(self, arches: tuple[int, ...] = ARCHES) -> Case:
        """The call as a case."""
        extra = "".join(
            f" {name}" for name, on in (("window", self.sliding_window), ("cap", self.soft_cap), (self.chosen, self.chosen)) if on
        )
        name = f"{self.kernel} {dtype_name(self.dtype, self.stored)} d{self.head_dim} g{self.group} p{self.page_size}{extra}"
        needs = Needs.ASYNC_COPIES | Needs.TENSOR_CORES
        if self.kernel == "paged_prefill" and self.stored != FP32 and dict(self.params).get("block_m", 64) >= 64:
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
    return [*attention_cases(), *merge_cases(), *small_cases(), *fixed_cases(), *table_cases(read_table())]


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
    """Into the model's type; and a decode behind a shared prefix, whose table begins in the middle of another."""
    yield Case("cascade bfloat16 d128 g4 p32", _cascade, {"_decode_kernel": Needs.ASYNC_COPIES | Needs.TENSOR_CORES})
    for dim, dtype in ((128, BF16), (80, FP32)):
        a, lse = torch.empty(16, 8, dim), torch.empty(16, 8)
        yield Case(f"merge_states {dtype_name(dtype)} d{dim}", partial(merge_states, a, lse, a, lse, a.to(dtype), lse), {})


def _cascade() -> None:
    q = torch.empty(16, 4 * KV_HEADS, 128, dtype=BF16)
    pages = torch.empty(4, KV_HEADS, LAYERS, 2, 32, 128, dtype=BF16)[:, :, 1]
    lens = torch.zeros(16, dtype=torch.int32)
    cascade_decode(q, pages, torch.zeros(16, WIDTH, dtype=torch.int32), lens, 3, Scores(128**-0.5), torch.empty_like(q))


def small_cases() -> Iterator[Case]:
    """Norms, activation, rotary embedding, page moves, sampling and the fixed product, at a model's sizes."""
    for dtype, width in ((BF16, 4096), (FP32, 576)):
        x, weight = torch.empty(16, width, dtype=dtype), torch.empty(width, dtype=dtype)
        yield Case(f"rms_norm {dtype_name(dtype)} {width}", partial(rms_norm, x, weight, 1e-5), {})
        yield Case(f"add_rms_norm {dtype_name(dtype)} {width}", partial(add_rms_norm, x, x, weight, 1e-5), {})
        yield Case(f"silu_mul {dtype_name(dtype)} {width}", partial(silu_mul, x), {})
        yield Case(
            f"fixed_matmul {dtype_name(dtype)} {width}",
            partial(fixed_matmul, x, torch.empty(1024, width, dtype=dtype), None),
            {"_matmul_kernel": Needs.ASYNC_COPIES | Needs.TENSOR_CORES},
        )
    for dtype, stored, dim, normed in ((BF16, BF16, 128, True), (BF16, FP8, 80, False), (FP32, FP32, 64, False)):
        name = f"rope_write {dtype_name(dtype, stored)} d{dim}{' norm' if normed else ''}"
        yield Case(name, partial(_rope, dtype, stored, dim, normed), {})
    ids, pages = torch.zeros(8, dtype=torch.int64), torch.empty(16, KV_HEADS, LAYERS, 2, 32, 128, dtype=BF16)
    yield Case("page_copy", partial(move_pages, pages, ids, pages, ids), {})
    yield Case("page_copy pack", partial(move_pages, pages, ids, torch.empty_like(pages[:8]), None), {})
    yield Case("page_copy unpack", partial(move_pages, pages[:8], None, torch.empty_like(pages), ids), {})
    for rows in (1, 64):
        yield Case(f"sampling {rows} rows", partial(_sample, rows), {})


def fixed_cases() -> Iterator[Case]:
    """What the deterministic mode launches otherwise than by the rules."""
    yield Case("rope_write bfloat16 d128 norm fixed", partial(_rope, BF16, BF16, 128, True, launch=FIXED_ROPE), {})
    for dim, dtype, group in ((64, BF16, 4), (128, BF16, 8), (256, BF16, 4), (128, FP32, 4)):
        params = tuple(asdict(fixed_attention(group)).items())
        yield Attention("paged_prefill", dim, dtype, dtype, group, params=params, chosen="fixed").case()


def _rope(
    dtype: torch.dtype, stored: torch.dtype, dim: int, normed: bool, group: int = 2, page_size: int = 32, launch: RopeLaunch | None = None
) -> None:
    heads = group * KV_HEADS
    qkv = torch.empty(16, (heads + 2 * KV_HEADS) * dim, dtype=dtype)
    at = torch.zeros(16, dtype=torch.int64)
    pages = torch.empty(4, KV_HEADS, LAYERS, 2, page_size, dim, dtype=stored)[:, :, 1]
    weight = torch.empty(dim, dtype=dtype) if normed else None
    rope_and_write_kv(qkv, at, torch.empty(64, dim), pages, at, heads, weight, weight, 1e-6, launch)


def _sample(rows: int, launch: SampleLaunch | None = None) -> None:
    whole, real = partial(torch.zeros, dtype=torch.int32), torch.zeros
    long = torch.zeros(rows, dtype=torch.int64)
    filters = real(rows), whole(rows), real(rows), real(rows), whole(rows, 2)
    edits = whole(rows + 1), whole(8), real(8), real(rows, 3), long, whole(rows), torch.zeros(rows, 128256, dtype=torch.int16), long
    sample(real(rows, 128256), SampleRows(*filters, *edits), launch)


def table_cases(table: dict[tuple[int, Shape], dict[str, int]]) -> Iterator[Case]:
    """A case for each entry, on its own chip."""
    for (arch, shape), params in table.items():
        if shape.kernel in ("paged_decode", "paged_prefill", "prefix_decode"):
            dtype, stored = _types(shape)
            sizes = shape.head_dim, dtype, stored, shape.group, shape.page_size, shape.bucket
            of = Attention(shape.kernel, *sizes, params=tuple(params.items()), chosen=f"table b{shape.bucket}")
            yield of.case((arch,))
        else:
            name = f"{shape.kernel} {shape.dtype} d{shape.head_dim} g{shape.group} p{shape.page_size} table b{shape.bucket}"
            yield Case(name, partial(_tuned, shape, params), {}, (arch,))


def _types(shape: Shape) -> tuple[torch.dtype, torch.dtype]:
    inputs, _, stored = shape.dtype.partition("+")
    return getattr(torch, inputs), getattr(torch, stored or inputs)


def _tuned(shape: Shape, params: dict[str, int]) -> None:
    """The call of a kernel that is not attention, as an entry of the table has it."""
    dtype, stored = _types(shape)
    match shape.kernel:
        case "rms_norm":
            x, launch = torch.empty(shape.bucket, shape.head_dim, dtype=dtype), NormLaunch(**params)
            rms_norm(x, x[0], 1e-5, launch)
            add_rms_norm(x, x, x[0], 1e-5, launch)
        case "silu_mul":
            silu_mul(torch.empty(shape.bucket, 2 * shape.head_dim, dtype=dtype), SiluLaunch(**params))
        case "rope_write":
            _rope(dtype, stored, shape.head_dim, True, shape.group, shape.page_size, RopeLaunch(**params))
        case "page_copy":
            ids, pages = torch.zeros(8, dtype=torch.int64), torch.empty(16, 4096, dtype=dtype)
            move_pages(pages, ids, pages, ids, CopyLaunch(**params))
        case "sampling":
            _sample(shape.bucket, SampleLaunch(**params))
        case _:
            raise ValueError(f"the table has an entry for {shape.kernel}, and no launcher looks for one")
