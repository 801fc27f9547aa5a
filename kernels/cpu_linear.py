"""Linear layers of the compiled CPU path: how weights are packed, and the products. `cpu.available()` must be true.

Both forms give a token the same bits whatever else is in the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu_library import Library, library

INT8_GROUP = 64  # inputs that share a scale, as in cpu_int8.c
INT8_WORK_BYTES = 72  # for each token and group: 64 inputs, a scale, a sum


class Int8Weight(NamedTuple):
    """A weight in 8 bits: packed uint8 [panels, inputs / 4, panel, 4], and the outputs' scales float32 [outputs]."""

    packed: Tensor
    scale: Tensor


def pack(weight: Tensor) -> Tensor:
    """weight [outputs, inputs] float32 -> [panels, inputs, panel], the last panel padded with zeros."""
    panel = _required().panel
    outputs, inputs = weight.shape
    panels = -(-outputs // panel)
    return F.pad(weight, (0, 0, 0, panels * panel - outputs)).view(panels, panel, inputs).transpose(1, 2).contiguous()


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """x [T, inputs] float32 times what `pack` made, plus bias [outputs] -> [T, outputs]."""
    x = x.contiguous()
    tokens, inputs = x.shape
    out = x.new_empty(tokens, outputs)
    bias_at = None if bias is None else bias.data_ptr()
    _required().linear(x.data_ptr(), packed.data_ptr(), bias_at, out.data_ptr(), tokens, outputs, inputs, torch.get_num_threads())
    return out


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [outputs, inputs] ~ q * scale[:, None]: q int8 in [-127, 127], scale float32 [outputs] (the largest weight / 127)."""
    scale = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def pack_int8(weight: Tensor) -> Int8Weight:
    """weight [outputs, inputs] float32, quantised and packed with 128 added; padding stands for zero."""
    panel = _required().panel
    quantized, scale = quantize(weight)
    outputs, inputs = weight.shape
    panels, padded_inputs = -(-outputs // panel), -(-inputs // INT8_GROUP) * INT8_GROUP
    padded = F.pad(quantized, (0, padded_inputs - inputs, 0, panels * panel - outputs)).view(torch.uint8) ^ 128
    return Int8Weight(padded.view(panels, panel, padded_inputs // 4, 4).transpose(1, 2).contiguous(), scale)


def linear_int8(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """x [T, inputs] float32, quantised by INT8_GROUP inputs of a token, times the weight, plus bias [outputs] -> [T, outputs]."""
    x = x.contiguous()
    tokens, inputs = x.shape
    outputs = weight.scale.shape[0]
    out = x.new_empty(tokens, outputs)
    work = torch.empty(tokens * -(-inputs // INT8_GROUP) * INT8_WORK_BYTES, dtype=torch.uint8)
    bias_at = None if bias is None else bias.data_ptr()
    _required().linear_int8(
        x.data_ptr(), weight.packed.data_ptr(), weight.scale.data_ptr(), bias_at, out.data_ptr(), work.data_ptr(),
        tokens, outputs, inputs, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _required() -> Library:
    lib = library()
    if lib is None:
        raise RuntimeError("the compiled CPU kernels are not available")
    return lib
