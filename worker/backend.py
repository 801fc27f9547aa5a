"""Which device and which kernels a model runs with: the one place where options, machine and what is installed meet.

    device   auto: CUDA where torch finds it, else the CPU
    kernels  auto: triton on CUDA where Triton is installed, compiled in float32 on a CPU that has a C compiler, else torch

The choice is made at start and named in the log; nothing falls back later. The deterministic mode takes kernels, and products, whose
results for a token do not depend on what else is in the batch, and refuses where there are none.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import cast

import torch

from ..kernels import cpu, reference
from .config import CacheOptions, ModelOptions
from .linear import FixedLinear, MakeLinear, linear_factory
from .model import Ops


def device_of(options: ModelOptions) -> torch.device:
    """Where the model runs.

    Raises:
        ValueError: there is no such device, or it cannot do what is asked.
    """
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, and torch finds no CUDA device")
    if options.quantize is not None and name != "cpu":
        raise ValueError(f"quantize: {options.quantize} runs on a CPU, not on {name}")
    return torch.device(name)


def kernels_of(options: ModelOptions, device: torch.device, dtype: torch.dtype) -> str:
    """ "triton", "compiled" or "torch".

    Raises:
        ValueError: the kernels asked for do not run here, or are not deterministic where that is asked for.
    """
    compiled = device.type == "cpu" and dtype == torch.float32 and cpu.available()
    chosen = options.attention
    if chosen == "auto":
        chosen = "compiled" if compiled else "triton" if device.type == "cuda" and find_spec("triton") else "torch"
    if chosen == "compiled" and not compiled:
        raise ValueError(f"attention: compiled kernels need a CPU, float32 and a C compiler, not {device.type} in {dtype}")
    if chosen == "triton":
        _check_triton(device)
    if options.deterministic and chosen == "torch":
        raise ValueError(f"deterministic: torch's kernels are not; {device.type} in {dtype} has no others here")
    return chosen


def kv_dtype_of(options: CacheOptions, kernels: str, dtype: torch.dtype) -> torch.dtype:
    """The type of keys and values in pages, beside activations of `dtype`.

    Raises:
        ValueError: the kernels do not read it.
    """
    if options.kv_dtype == "auto":
        return dtype
    if kernels != "triton":
        raise ValueError(f"kv_dtype: {options.kv_dtype} pages are for Triton's kernels, and {kernels} was chosen here")
    return torch.float8_e4m3fn


def ops_of(options: ModelOptions, kernels: str) -> Ops:
    """The kernels by the name that `kernels_of` gave."""
    if kernels == "triton":
        from ..kernels.triton_ops import TritonOps  # Triton is not installed everywhere

        return TritonOps(options.deterministic)
    return cast(Ops, cpu if kernels == "compiled" else reference)


def linears_of(options: ModelOptions, kernels: str, device: torch.device, dtype: torch.dtype) -> MakeLinear:
    """What makes the model's linear layers.

    Raises:
        ValueError: the quantization does not exist here.
    """
    if options.deterministic and kernels == "triton":
        if options.quantize is not None:
            raise ValueError("deterministic: quantized products run with compiled kernels only")
        return FixedLinear
    return linear_factory(device, dtype, options.quantize)


def _check_triton(device: torch.device) -> None:
    if find_spec("triton") is None:
        raise ValueError("attention: triton is not installed; pip install 'quire[gpu]' brings it")
    if device.type == "cuda":
        return
    from ..kernels.launch import INTERPRETED

    if not INTERPRETED:
        raise ValueError(
            "attention: triton needs a CUDA device; on a CPU it runs in Triton's interpreter only (TRITON_INTERPRET=1, for tests)"
        )
