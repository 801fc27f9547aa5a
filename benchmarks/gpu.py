"""What the GPU benchmarks share: the machine in words, its limits as measured in the same run, and the time of a call."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DEVICE = "cuda"
COPY_BYTES = 2**30
MATMUL = 8192


def arguments(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def require_cuda() -> None:
    """Ends the program where there is no GPU: a figure of another device would mean nothing."""
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; torch finds none")


def machine() -> dict[str, Any]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def time_ms(call: Callable[[], object]) -> float:
    """Median time of a call, replayed from a CUDA graph, so that launches on the host do not count."""
    from triton.testing import do_bench_cudagraph

    call()  # compiles
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        return float(do_bench_cudagraph(call, rep=50, return_mode="median"))


def time_eager_ms(call: Callable[[], object]) -> float:
    """Median time of a call that a graph cannot hold."""
    from triton.testing import do_bench

    return float(do_bench(call, return_mode="median"))


def copy_bandwidth() -> float:
    """Bytes read and written per second by a device copy of 1 GiB."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (time_ms(lambda: target.copy_(source)) * 1e-3)


def matmul_rate() -> float:
    """Operations per second of a bfloat16 product of 8192 x 8192 matrices."""
    a, b = (torch.randn(MATMUL, MATMUL, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * MATMUL**3 / (time_ms(lambda: a @ b) * 1e-3)


def save(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {path}")
