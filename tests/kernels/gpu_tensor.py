"""The tensors of `pretend_gpu`, and what it takes to make torch speak of a device that it has no library for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

if TYPE_CHECKING:
    from gpu_device import Gpu

GPU = torch.device("cuda:0")

current: Gpu | None = None


def present() -> Gpu:
    """The one that is pretended."""
    assert current is not None, "the pretended GPU is gone"
    return current


def is_gpu(device: Any) -> bool:
    """Whether an argument of torch's names it."""
    return device is not None and not isinstance(device, int) and torch.device(device).type == "cuda"


class GpuTensor(Tensor):
    """A tensor on the pretended GPU; `inner` is where its numbers are."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> GpuTensor:
        with torch.inference_mode(False):  # so that views of it can be made in either mode
            made: GpuTensor = Tensor._make_wrapper_subclass(
                cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=GPU
            )
        made.inner = inner
        return made

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __repr__(self) -> str:
        return f"GpuTensor({self.inner!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    # torch's own look for the device's library first

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __invert__(self) -> Tensor:
        return torch.bitwise_not(self)

    def copy_(self, source: Tensor, non_blocking: bool = False) -> GpuTensor:
        present().dispatch(torch.ops.aten.copy_.default, (self, source, non_blocking), {})
        return self

    def __getitem__(self, key: Any) -> Any:
        with _Indexing(self, key) as inner:
            return inner.outer(self.inner[tree_map(inner_of, key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        with _Indexing(self, key, value):
            self.inner[tree_map(inner_of, key)] = inner_of(value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return present().dispatch(func, args, kwargs or {})


class _Indexing(TorchDispatchMode):
    """What torch makes of brackets. It looks for a device's library first, so it gets the numbers, and they become tensors here again."""

    def __init__(self, *tensors: Any) -> None:
        super().__init__()
        self._outer = {id(t.inner): t for t in tree_flatten(tensors)[0] if isinstance(t, GpuTensor)}

    def outer(self, value: Any) -> Any:
        return self._outer.get(id(value), value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_map(self.outer, (args, kwargs or {}))
        if not any(isinstance(t, GpuTensor) for t in tree_flatten(given)[0]):
            return func(*args, **(kwargs or {}))
        made = present().dispatch(func, *given)
        self._outer.update((id(t.inner), t) for t in tree_flatten(made)[0] if isinstance(t, GpuTensor))
        return tree_map(inner_of, made)


class Factories(TorchDispatchMode):
    """Makes tensors here, and pinned ones on the host, whoever asks for them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(t, GpuTensor) for t in tree_flatten((args, kwargs))[0]):
            return func(*args, **kwargs)
        if kwargs.get("pin_memory"):
            return pin(func(*args, **(kwargs | {"pin_memory": None})))
        return present().make(func, *args, **(kwargs | {"device": None})) if is_gpu(kwargs.get("device")) else func(*args, **kwargs)


def pin(tensor: Tensor) -> Tensor:
    """Pretend that this host memory is pinned."""
    tensor.untyped_storage()._pretends_pinned = True
    return tensor


def inner_of(value: Any) -> Any:
    """What a tensor of the GPU stands for; anything else as it is."""
    return value.inner if isinstance(value, GpuTensor) else value
