"""Compile every kernel for every chip on a machine that has none, through the launchers that serve, and refuse what would run badly.

`python -m quire.kernels.cross_compile` (`make kernels`) compiles the cases of `compile_cases`, and one for each entry of the table of
tuned parameters, and reads the machine code:

- no registers spilled to memory, and shared memory within the chip's limit, for every kernel;
- where a case says so: 16-byte asynchronous copies from memory (LDGSTS.128), tensor cores (HMMA, HGMMA, UTCHMMA), and on sm_90
  those of a warp group (HGMMA).

A driver that only answers questions stands in for a GPU, and what launches a kernel only compiles it, so a kernel gets the very
specialization (types, strides that are multiples of 16, ...) that its tensors would give it in service. Needs neither a GPU nor CUDA:
the assembler and the disassembler come with Triton. Works with triton 3.6 to 3.9.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Flag, auto
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from .launch import INTERPRETED, described

ARCHES = 80, 90, 100
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TENSOR_CORES = "HMMA", "HGMMA", "UTCHMMA", "QGMMA", "UTCQMMA"
COUNTED = (*TENSOR_CORES, "LDL", "STL", "LDGSTS")
JOBS = 2


class Needs(Flag):
    """What a kernel's machine code must show."""

    NOTHING = 0
    ASYNC_COPIES = auto()
    TENSOR_CORES = auto()
    WARP_GROUP = auto()  # on chips that have them


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a launcher. `needs` by kernel; a kernel that is not named needs nothing special."""

    name: str
    launch: Callable[[], object]
    needs: dict[str, Needs]
    arches: tuple[int, ...] = ARCHES


@dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel takes of a multiprocessor, and the instructions it is made of."""

    kernel: str
    arch: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    wide_copies: int
    counts: dict[str, int]

    @property
    def spills(self) -> int:
        """Instructions that go to a thread's own memory."""
        return self.counts["LDL"] + self.counts["STL"]

    @property
    def tensor_cores(self) -> int:
        """Instructions of the tensor cores."""
        return sum(self.counts[name] for name in TENSOR_CORES)

    def complaints(self, needs: Needs) -> list[str]:
        """What is wrong with it; empty if nothing is."""
        wrong = []
        if self.spills or self.stack_bytes:
            wrong.append(f"{self.spills} spills, {self.stack_bytes} bytes of stack")
        limit = described(self.arch).shared_bytes
        if self.shared_bytes > limit:
            wrong.append(f"{self.shared_bytes} bytes of shared memory, the chip has {limit}")
        if Needs.ASYNC_COPIES in needs and not self.wide_copies:
            wrong.append("no asynchronous 16-byte copies")
        if Needs.TENSOR_CORES in needs and not self.tensor_cores:
            wrong.append("no tensor cores")
        if Needs.WARP_GROUP in needs and self.arch == 90 and not self.counts["HGMMA"]:
            wrong.append("no tensor cores of a warp group")
        return wrong


class PretendGPU(DriverBase):  # type: ignore[misc]
    """Answers what the compiler asks of a driver. Nothing can be launched with it."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> None:
        return None

    def get_current_device(self) -> int:
        return self.arch  # kernels are kept per device: one number for all, and the second chip would get the first one's

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def compiling(arch: int) -> Iterator[list[tuple[str, CompiledKernel]]]:
    """Inside, launches compile for `arch` and do nothing else. The list gets (kernel's name, compiled kernel).

    The pretended chip stays the process's GPU.
    """
    found: list[tuple[str, CompiledKernel]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> CompiledKernel:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.fn.__name__, kernel))
        return kernel

    triton.runtime.driver.set_active(PretendGPU(arch))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run


def resources(name: str, arch: int, kernel: CompiledKernel) -> Resources:
    """Read the machine code of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        code = _cuobjdump("-sass", file.name)
    taken = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if taken is None:
        raise ValueError(f"cuobjdump says nothing of {name}'s registers: {usage}")
    counts = {op: len(re.findall(rf"\b{op}\b", code)) for op in COUNTED}
    wide = len(re.findall(r"\bLDGSTS[.\w]*\.128\b", code))
    return Resources(name, arch, int(taken[1]), int(taken[2]), kernel.metadata.shared, wide, counts)


def _cuobjdump(option: str, path: str) -> str:
    return subprocess.run([CUOBJDUMP, option, path], capture_output=True, text=True, check=True, timeout=60).stdout


def compiled(case: Case, arch: int) -> list[tuple[Resources, list[str]]]:
    """Compile one case for one chip: what each of its kernels takes, and what is wrong with it."""
    with compiling(arch) as found:
        case.launch()
    read = [resources(name, arch, kernel) for name, kernel in found]
    return [(one, one.complaints(case.needs.get(one.kernel, Needs.NOTHING))) for one in read]


def report(case: Case, rows: Iterable[tuple[Resources, list[str]]]) -> str:
    """A line for each kernel of a case."""
    lines = []
    for one, wrong in rows:
        kernel, says = one.kernel.strip("_").removesuffix("_kernel"), "; ".join(wrong) or "ok"
        numbers = f"{one.registers:4} {one.shared_bytes:7} {one.spills:6} {one.wide_copies:5} {one.tensor_cores:5}"
        lines.append(f"{kernel:14} {case.name:52} sm_{one.arch:<4} {numbers}  {says}\n")
    return "".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile all cases, print a table. 1 if something is wrong with a kernel."""
    parser = argparse.ArgumentParser(prog="python -m quire.kernels.cross_compile", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--arch", type=int, action="append", help="compute capability times ten (default: 80, 90 and 100)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=JOBS, help=f"processes that compile (default: {JOBS})")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        sys.stderr.write("TRITON_INTERPRET is set: kernels are interpreted, there is nothing to compile\n")
        return 2
    work = [
        (index, arch)
        for index, case in enumerate(_cases())
        for arch in case.arches
        if options.only in case.name and (options.arch is None or arch in options.arch)
    ]
    start = time.monotonic()
    sys.stdout.write(f"{'kernel':14} {'case':52} {'chip':7} {'regs':>4} {'shared':>7} {'spills':>6} {'async':>5} {'mma':>5}\n")
    failed = 0
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for done, (text, wrong) in enumerate(pool.map(_one, work), start=1):
            sys.stdout.write(text)
            sys.stdout.flush()
            sys.stderr.write(f"\r{done}/{len(work)}" + ("\n" if done == len(work) else ""))
            failed += wrong
    sys.stdout.write(f"{len(work)} cases in {time.monotonic() - start:.0f} s, {failed} of them wrong\n")
    return 1 if failed else 0


def _cases() -> list[Case]:
    from .compile_cases import all_cases  # imports every kernel, and this module

    return all_cases()


def _one(work: tuple[int, int]) -> tuple[str, bool]:
    index, arch = work
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    case = _cases()[index]
    try:
        rows = compiled(case, arch)
    except Exception as error:
        error.add_note(f"in {case.name} for sm_{arch}")
        raise
    return report(case, rows), any(wrong for _, wrong in rows)


if __name__ == "__main__":
    from .cross_compile import main as imported_main  # the cases are of that module's classes, not of __main__'s

    sys.exit(imported_main())
