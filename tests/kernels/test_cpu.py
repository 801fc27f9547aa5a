"""The compiled CPU kernels against the torch reference in float64, and the promise that a token's bits do not depend on its batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quire.kernels import cpu, cpu_build, cpu_library, reference
from quire.kernels.layout import AttentionBatch, attention_batch

pytestmark = pytest.mark.skipif(not cpu.available(), reason="there is no C compiler here")

Rows = list[tuple[int, int]]  # (position of the first token, number of tokens)
LAYERS = 3
PREFILL = (0, 77), (300, 65), (61, 3)
DECODE = (0, 1), (30, 1), (31, 1), (32, 1), (63, 1), (64, 1), (517, 1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads():  # type: ignore[no-untyped-def]
    """Sets how many threads work, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).abs().max() / expected.abs().max())


def paged(rows: Rows, kv_heads: int, dim: int, page_size: int, window: int | None = None) -> tuple[AttentionBatch, Tensor]:
    """Rows on pages in random order of a pool with several layers. NaN wherever no query may look: before the windows as well."""
    counts = [-(-(start + count) // page_size) for start, count in rows]
    free = torch.randperm(sum(counts) + 3).tolist()
    pages = torch.full((len(free), kv_heads, LAYERS, 2, page_size, dim), float("nan"))[:, :, 1]
    placed = []
    for (start, count), needed in zip(rows, counts, strict=True):
        table = [free.pop() for _ in range(needed)]
        for position in range(0 if window is None else max(0, start - window + 1), start + count):
            pages[table[position // page_size], :, :, position % page_size] = torch.randn(kv_heads, 2, dim)
        placed.append((start, count, table))
    return attention_batch(placed, page_size), pages


def attention_error(rows: Rows, heads: int, kv_heads: int, dim: int, page_size: int, window: int | None = None) -> float:
    batch, pages = paged(rows, kv_heads, dim, page_size, window)
    q = torch.randn(sum(batch.row_lens), heads, dim)
    got = cpu.paged_attention(q, pages, batch, dim**-0.5, window)
    return error(got, reference.paged_attention(q.double(), pages.double().nan_to_num(), batch, dim**-0.5, window))


@pytest.mark.parametrize("rows", [DECODE, PREFILL, DECODE[:1], PREFILL[:1], DECODE + PREFILL])
@pytest.mark.parametrize("window", [None, 1, 50])
def test_attention_rows(rows: tuple[tuple[int, int], ...], window: int | None) -> None:
    assert attention_error(list(rows), 9, 3, 64, 32, window) < 1e-5


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (8, 2), (7, 1), (16, 2), (48, 1)])
@pytest.mark.parametrize("dim", [16, 24, 64, 80, 96, 128, 256])
def test_attention_shapes(heads: int, kv_heads: int, dim: int) -> None:
    assert attention_error([(0, 1), (100, 1), (70, 20)], heads, kv_heads, dim, 32) < 1e-5


@pytest.mark.parametrize("page_size", [1, 7, 16, 64, 200])
def test_attention_page_sizes(page_size: int) -> None:
    length = page_size
    assert attention_error([(length - 1, 1), (length, 1), (250, 1), (0, length + 1), (length, 130)], 9, 3, 64, page_size, 99) < 1e-5


def test_attention_leaves_what_it_cannot_do_to_the_reference() -> None:
    batch, pages = paged([(5, 1), (0, 9)], 1, 8, 4)
    q = torch.randn(10, 2, 8)
    assert torch.equal(cpu.paged_attention(q, pages, batch, 1.0, None), reference.paged_attention(q, pages, batch, 1.0, None))
    wide, pages = q.double(), pages.double()
    assert torch.equal(cpu.paged_attention(wide, pages, batch, 1.0, None), reference.paged_attention(wide, pages, batch, 1.0, None))


def test_a_row_has_the_same_bits_alone_and_in_a_batch(threads) -> None:  # type: ignore[no-untyped-def]
    rows = [*DECODE, *DECODE, *PREFILL]
    batch, pages = paged(rows, 3, 64, 32)
    q = torch.randn(sum(batch.row_lens), 9, 64)
    threads(2)
    together = cpu.paged_attention(q, pages, batch, 0.125, None)
    for r, (start, count) in enumerate(rows):
        begin, end = int(batch.row_starts[r]), int(batch.row_starts[r + 1])
        alone = attention_batch([(start, count, batch.block_tables[r].tolist())], 32)
        for number in (1, 2, 3):
            threads(number)
            assert torch.equal(cpu.paged_attention(q[begin:end], pages, alone, 0.125, None), together[begin:end])


@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("chunk", [1, 7, 14, 64])
@pytest.mark.parametrize(("heads", "dim"), [(9, 64), (3, 16), (6, 80)])
def test_a_row_has_the_same_bits_in_chunks(heads: int, dim: int, chunk: int, window: int | None) -> None:
    length = 200
    batch, pages = paged([(0, length)], 3, dim, 32)
    q = torch.randn(length, heads, dim)
    whole = cpu.paged_attention(q, pages, batch, 0.125, window)
    table = batch.block_tables[0].tolist()
    for start in range(0, length, chunk):
        part = q[start : start + chunk]
        got = cpu.paged_attention(part, pages, attention_batch([(start, len(part), table)], 32), 0.125, window)
        assert torch.equal(got, whole[start : start + chunk])


def test_not_a_number_in_the_queries_shows() -> None:
    batch, pages = paged([(40, 1), (3, 1)], 3, 64, 32)
    q = torch.randn(2, 9, 64)
    q[0, 4, 7] = float("nan")
    got = cpu.paged_attention(q, pages, batch, 0.125, None)
    assert got[0, 4].isnan().all()
    assert got.isfinite().sum() == got.numel() - 64


@pytest.mark.parametrize(("tokens", "width"), [(1, 576), (3, 5), (1, 1), (70, 577), (64, 4096)])
def test_norms(tokens: int, width: int) -> None:
    x, residual, weight = torch.randn(tokens, width), torch.randn(tokens, width) * 5, torch.randn(width)
    assert error(cpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5)) < 1e-6
    normed, stream = cpu.add_rms_norm(x, residual, weight, 1e-5)
    expected, _ = reference.add_rms_norm(x.double(), residual.double(), weight.double(), 1e-5)
    assert error(normed, expected) < 1e-6
    assert torch.equal(stream, x + residual)
    for t in range(0, tokens, 9):
        assert torch.equal(cpu.rms_norm(x[t : t + 1], weight, 1e-5)[0], cpu.rms_norm(x, weight, 1e-5)[t])


@pytest.mark.parametrize(("tokens", "width"), [(1, 1536), (3, 5), (40, 1537)])
def test_silu_mul(tokens: int, width: int) -> None:
    x = torch.randn(tokens, 2 * width) * 8
    assert error(cpu.silu_mul(x), reference.silu_mul(x.double())) < 1e-6
    extreme = torch.tensor([[-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, float("nan")]])
    got = cpu.silu_mul(torch.cat((extreme, torch.ones_like(extreme)), 1))
    torch.testing.assert_close(got, torch.nn.functional.silu(extreme), atol=1e-5, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 80), (8, 1, 128), (2, 2, 8), (2, 1, 256)])
@pytest.mark.parametrize("norms", [False, True])
def test_rope_and_write_kv(heads: int, kv_heads: int, dim: int, norms: bool) -> None:
    tokens, page_size, count = 37, 8, 9
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim)
    positions = torch.randint(0, 100, (tokens,))
    table = torch.randn(100, dim)
    slots = torch.randperm(count * page_size)[:tokens]
    q_norm, k_norm = (torch.randn(dim), torch.randn(dim)) if norms else (None, None)
    pool = torch.full((count, kv_heads, LAYERS, 2, page_size, dim), float("nan"))
    expected_pool = pool.clone().double()
    q = cpu.rope_and_write_kv(qkv, positions, table, pool[:, :, 1], slots, heads, q_norm, k_norm, 1e-6)
    expected = reference.rope_and_write_kv(
        qkv.double(), positions, table.double(), expected_pool[:, :, 1], slots, heads,
        None if q_norm is None else q_norm.double(), None if k_norm is None else k_norm.double(), 1e-6,
    )  # fmt: skip
    assert error(q, expected) < 1e-6
    torch.testing.assert_close(pool.double(), expected_pool, atol=1e-5, rtol=1e-6, equal_nan=True)  # and nothing else was written


@pytest.mark.parametrize(("slot", "position"), [(-1, 0), (16, 0), (0, -1), (0, 10)])
def test_rope_writes_nothing_outside(slot: int, position: int) -> None:
    pages = torch.zeros(2, 1, 2, 8, 16)
    with pytest.raises(IndexError, match="1 of 1 tokens"):
        cpu.rope_and_write_kv(
            torch.ones(1, 48), torch.tensor([position]), torch.ones(10, 16), pages, torch.tensor([slot]), 1, None, None, 1e-6
        )
    assert not pages.any()


def test_without_a_compiler_the_reference_takes_over(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cpu_build.shutil, "which", lambda name: None)
    cpu_library._library.cache_clear()
    try:
        assert not cpu.available()
        assert "no C compiler" in caplog.text
        x, weight = torch.randn(3, 8), torch.randn(8)
        assert torch.equal(cpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    finally:
        cpu_library._library.cache_clear()


def test_a_compiler_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu_build, "FLAGS", (*cpu_build.FLAGS, "-no-such-flag"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    with pytest.raises(cpu_build.CannotBuild, match="no-such-flag"):
        cpu_build.library_path()
    assert not list(tmp_path.rglob("*.so"))


def test_processes_that_start_together_share_one_library(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; pathlib.Path.home = staticmethod(lambda: pathlib.Path(sys.argv[1]));"
        "from quire.kernels import cpu, cpu_build; cpu_build.FLAGS += '-O0',; sys.exit(not cpu.available())"  # of it only the file counts
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(timeout=600) for process in started] == [0, 0]
    assert len(list(tmp_path.rglob("*"))) == 3  # .cache, quire, the library; no leftovers


@pytest.mark.parametrize("flags", [("-mavx2", "-mfma"), ("-mavx512f", "-mavx512bw", "-mfma"), ("-mavx2", "-mfma", "-mavxvnni"), ()])
def test_every_instruction_set_compiles(flags: tuple[str, ...], tmp_path: Path) -> None:
    if sys.platform != "linux" or not any(line.startswith("flags") for line in Path("/proc/cpuinfo").read_text().splitlines()):
        pytest.skip("flags of x86-64")
    folder = Path(cpu_build.__file__).parent
    for name in cpu_build.SOURCES:
        subprocess.run(
            ["cc", "-std=gnu11", "-O0", "-Wall", "-Werror", *flags, "-fopenmp", "-c", str(folder / name), "-o", str(tmp_path / "out.o")],
            check=True,
            timeout=120,
        )
