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
INT8_WORK_BYTES = 136  # for each token and group: 64 inputs, in 16 bits at most, a scale, a sum


class Int8Weight(NamedTuple):
    """A weight in 8 bits, packed: bytes uint8 [panels, inputs / 4, panel, 4] and scales float32 [panels, groups, panel]."""

    packed: Tensor
    scale: Tensor
    outputs: int


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


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, inputs] ~ q * scale, each INT8_GROUP inputs of a row apart: q int8 [N, groups, INT8_GROUP] in [-127, 127], with zeros
    in place of what the last group lacks, and scale float32 [N, groups] (the largest of the group / 127)."""
    groups = F.pad(x, (0, -x.shape[1] % INT8_GROUP)).view(x.shape[0], -1, INT8_GROUP)
    scale = groups.abs().amax(2) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0)
    return (groups * inverse[:, :, None]).round().clamp(-127, 127).to(torch.int8), scale


def pack_int8(weight: Tensor) -> Int8Weight:
    """weight [outputs, inputs] float32, quantised and packed with 128 added to the bytes; padding stands for zero."""
    panel = _required().panel
    outputs = weight.shape[0]
    panels = -(-outputs // panel)
    quantized, scale = quantize(F.pad(weight, (0, 0, 0, panels * panel - outputs)))
    shifted = quantized.view(torch.uint8) ^ 128
    packed = shifted.view(panels, panel, -1, 4).transpose(1, 2).contiguous()
    return Int8Weight(packed, scale.view(panels, panel, -1).transpose(1, 2).contiguous(), outputs)


def linear_int8(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """x [T, inputs] float32, quantised by INT8_GROUP inputs of a token, times the weight, plus bias [outputs] -> [T, outputs]."""
    x = x.contiguous()
    tokens, inputs = x.shape
    out = x.new_empty(tokens, weight.outputs)
    work = torch.empty(tokens * -(-inputs // INT8_GROUP) * INT8_WORK_BYTES, dtype=torch.uint8)
    bias_at = None if bias is None else bias.data_ptr()
    _required().linear_int8(
        x.data_ptr(), weight.packed.data_ptr(), weight.scale.data_ptr(), bias_at, out.data_ptr(), work.data_ptr(),
        tokens, weight.outputs, inputs, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _required() -> Library:
    lib = library()
    if lib is None:
        raise RuntimeError("the compiled CPU kernels are not available")
    return lib
