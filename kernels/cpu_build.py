"""Compiles the C kernels for the machine they run on, once, and keeps the result in ~/.cache/quire.

The name of the cached library holds a hash of the sources, the flags, the compiler and the processor; it is moved into place
whole, so processes that start together do not meet half a file. Nothing is downloaded; no compiler means no library.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCES = ("cpu_ops.c", "cpu_linear.c", "cpu_int8.c", "cpu_attention.c")
HEADERS = ("cpu_vec.h",)
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno")
COMPILE_TIMEOUT_S = 180.0


class CannotBuild(RuntimeError):
    """No library can be had here; the message says why."""


def library_path() -> Path:
    """Where the library for this machine lies, compiled now if it is not there yet.

    Raises:
        CannotBuild: there is no C compiler, or it failed.
    """
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        raise CannotBuild("no C compiler (gcc, cc or clang) is installed")
    runtime = _openmp_runtime()
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for part in (*FLAGS, str(runtime), _processor(), _run([compiler, "--version"])):
        digest.update(part.encode() + b"\0")
    for name in (*SOURCES, *HEADERS):
        digest.update((folder / name).read_bytes() + b"\0")
    target = _cache_folder() / f"cpu-{digest.hexdigest()[:32]}.so"
    if not target.exists():
        _compile(compiler, runtime, folder, target)
    return target


def _compile(compiler: str, runtime: Path | None, folder: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [str(Path(scratch, name).with_suffix(".o")) for name in SOURCES]
        jobs = [[compiler, *FLAGS, "-c", str(folder / name), "-o", out] for name, out in zip(SOURCES, objects, strict=True)]
        for job in [subprocess.Popen(job, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for job in jobs]:
            _finish(job)
        built = Path(scratch, "library.so")
        _run([compiler, "-shared", *objects, "-o", str(built), "-lm", str(runtime) if runtime else "-fopenmp"])
        os.replace(built, target)


def _finish(job: subprocess.Popen[str]) -> None:
    try:
        _, errors = job.communicate(timeout=COMPILE_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        job.kill()
        raise CannotBuild(f"the compiler took more than {COMPILE_TIMEOUT_S:.0f} s") from error
    if job.returncode:
        raise CannotBuild(f"the compiler failed: {errors.strip()[:500]}")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(f"{command[0]}: {error}") from error
    if done.returncode:
        raise CannotBuild(f"{command[0]} failed: {done.stderr.strip()[:500]}")
    return done.stdout


def _openmp_runtime() -> Path | None:
    """The OpenMP library that torch brought along. A second one would keep a second set of threads that spin against torch's."""
    found = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    return found[0] if found else None


def _processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() + platform.machine()
    first = info.read_text().split("\n\n")[0].splitlines()
    return "\n".join(line for line in first if line.startswith(("model", "flags", "Features", "CPU p")))


def _cache_folder() -> Path:
    """A folder that nobody else can write to: in the home directory, or where that cannot be, one for this process alone."""
    wanted = Path.home() / ".cache" / "quire"
    try:
        wanted.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="quire-"))
    return wanted if os.access(wanted, os.W_OK) else Path(tempfile.mkdtemp(prefix="quire-"))


def load(path: Path) -> tuple[ctypes.CDLL, ctypes.PyDLL]:
    """The library twice: calls through the first let other Python threads run meanwhile, calls through the second do not."""
    return ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
