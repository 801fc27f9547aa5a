"""The linear layers: how a weight is kept and multiplied on each device.

On a CPU in float32 the compiled kernel keeps weights in panels and no second copy; without a compiler oneDNN's packed form
takes its place, and without oneDNN `F.linear`. Elsewhere cuBLAS (through `F.linear`) is the right tool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import cpu, cpu_linear

Linear = Callable[[Tensor], Tensor]
"""[T, inputs] -> [T, outputs]"""

MakeLinear = Callable[[Tensor, Tensor | None], Linear]
"""(weight [outputs, inputs], bias [outputs] or None) -> the layer. The weight need not be kept by the caller."""

ONEDNN_BATCH_HINT = 8  # tokens for which oneDNN chooses its packed form


class PlainLinear:
    """`F.linear` with the weight as it came."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class FixedLinear:
    """Triton's product with tiles that no batch changes, for the deterministic mode on a GPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        from ..kernels.fixed_matmul import fixed_matmul  # Triton is there only where there is a GPU

        self._product = fixed_matmul
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._product(x, self.weight, self.bias)
        return y


class CompiledLinear:
    """float32 on a CPU: a token's result is the same bits in every batch."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.outputs = weight.shape[0]
        self.packed = cpu_linear.pack(weight)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return cpu_linear.linear(x, self.packed, self.bias, self.outputs)


class Int8Linear:
    """Weights and inputs in 8 bits on a CPU: a token's result is the same bits in every batch."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = cpu_linear.pack_int8(weight)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return cpu_linear.linear_int8(x, self.weight, self.bias)


class OneDnnLinear:
    """float32 on a CPU that has no compiler."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ONEDNN_BATCH_HINT)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


def tensors_of(linear: Linear) -> Iterator[Tensor]:
    """The tensors that a linear of this module keeps, or that the one inside it does."""
    for value in vars(getattr(linear, "local", linear)).values():
        yield from (t for t in (value if isinstance(value, tuple) else (value,)) if isinstance(t, Tensor))


def linear_factory(device: torch.device | str, dtype: torch.dtype, quantize: str | None) -> MakeLinear:
    """What makes a model's linear layers.

    Args:
        device: where they run.
        dtype: of weights and activations.
        quantize: None, or "int8".

    Raises:
        ValueError: the quantization does not exist, or not for this device, dtype or machine.
    """
    fp32_on_cpu = torch.device(device).type == "cpu" and dtype is torch.float32
    if quantize == "int8":
        if not fp32_on_cpu:
            raise ValueError("quantize=int8 works on a CPU with dtype float32")
        if not cpu.available():
            raise ValueError("quantize=int8 needs a C compiler (gcc, cc or clang) on this machine")
        return Int8Linear
    if quantize is not None:
        raise ValueError(f"quantize={quantize!r} is unknown (int8)")
    if not fp32_on_cpu:
        return PlainLinear
    if cpu.available():
        return CompiledLinear
    return OneDnnLinear if torch._C._has_mkldnn else PlainLinear
