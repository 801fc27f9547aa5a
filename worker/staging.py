"""How a step's numbers cross between host and device: one copy each way, through pinned memory, so that neither waits for the other.

On a CPU the two are the same memory, and the same calls copy once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ALIGNMENT = 16  # of every array: kernels are compiled for pointers that are multiples of it, and others would be compiled anew
TURNS = 2  # steps that may be under way: the buffer of step k is filled again for step k + 2, when k's tokens are there
SMALLEST_BYTES = 64 * 1024

Array = npt.NDArray[Any]


class Staging:
    """The way from the host. Used at most once a step, by a caller that has at most `TURNS` steps under way and waits for each of them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [_host_bytes(SMALLEST_BYTES, device) for _ in range(TURNS)]
        self._turn = 0

    def upload(self, arrays: Sequence[Array], into: Tensor | None = None) -> list[Tensor]:
        """The arrays on the device, each at a multiple of ALIGNMENT bytes.

        Args:
            arrays: of any type.
            into: uint8, the device memory where they go (`size_of` says how much they need); new memory by default. Arrays of the same
                shapes lie at the same places every time.
        """
        starts, size = _layout(arrays)
        host = self._next_buffer(size)
        view = host.numpy()
        for array, start in zip(arrays, starts, strict=True):
            view[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        target = torch.empty(size, dtype=torch.uint8, device=self._device) if into is None else into[:size]
        target.copy_(host[:size], non_blocking=True)
        return views(target, arrays)

    def _next_buffer(self, size: int) -> Tensor:
        self._turn = (self._turn + 1) % TURNS
        if len(self._buffers[self._turn]) < size:
            self._buffers[self._turn] = _host_bytes(2 * size, self._device)
        return self._buffers[self._turn]


def size_of(arrays: Sequence[Array]) -> int:
    """Bytes that `upload` takes for them."""
    return _layout(arrays)[1]


def views(memory: Tensor, arrays: Sequence[Array]) -> list[Tensor]:
    """Where `upload` puts the arrays in `memory`, as tensors of their types and shapes."""
    starts, _ = _layout(arrays)
    return [
        memory[start : start + array.nbytes].view(_TYPES[array.dtype.name]).view(array.shape)
        for array, start in zip(arrays, starts, strict=True)
    ]


class Mark:
    """How far the device's work has been given to it when this is made."""

    def __init__(self, device: torch.device) -> None:
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> None:
        """Until it has come so far."""
        if self._event is not None:
            self._event.synchronize()


class Answer:
    """Tensors of the device on their way to the host."""

    def __init__(self, *tensors: Tensor) -> None:
        device = tensors[0].device
        self._host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=device.type == "cuda").copy_(t, non_blocking=True) for t in tensors]
        self._there = Mark(device)

    def wait(self) -> list[Any]:
        """Their values as lists, when all that was asked of the device before them is done."""
        self._there.wait()
        return [t.tolist() for t in self._host]


_TYPES = {"int16": torch.int16, "int32": torch.int32, "int64": torch.int64, "float32": torch.float32}


def _layout(arrays: Sequence[Array]) -> tuple[list[int], int]:
    starts, end = [], 0
    for array in arrays:
        starts.append(end)
        end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    return starts, end


def _host_bytes(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
