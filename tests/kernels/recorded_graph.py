"""A graph for a CPU that keeps to the rules of a CUDA graph: it repeats the operations and launches that it has seen, on the memory that
they had then, and nothing else.

Python does not run again, so whatever was computed on the host stays as it was when it was recorded. What the recorded part has allocated
belongs to the graph; all other memory has to be kept by somebody else, and a replay that finds it freed raises. Operations that wait for
the device, or ask the host for memory, cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from triton.runtime.interpreter import InterpretedFunction

WAITING = {"item", "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero", "equal", "_pin_memory"}


@dataclass(frozen=True)
class _Borrowed:
    """A tensor whose memory is not the graph's."""

    storage: StorageWeakRef
    empty: Tensor  # of its type
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise RuntimeError(f"the graph reads or writes memory that has been freed: {tuple(self.shape)} {self.empty.dtype}")
        return self.empty.new_empty(0).set_(storage, self.offset, self.shape, self.stride)


class _Step(NamedTuple):
    call: Callable[..., Any]
    args: Any
    kwargs: Any
    results: list[Tensor]  # that it has to be put into, since the call makes new ones


class RecordedGraph(TorchDispatchMode):
    """`Capture` on a CPU, with Triton's interpreter."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[_Step] = []
        self._own: dict[int, Tensor] = {}  # by storage
        self._inside = False  # of something that is one step

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        compute()  # as `CudaCapture` does
        graph = RecordedGraph()
        with torch.inference_mode(), graph.launches(), graph:
            result = compute()
        return graph.replay, result

    def launches(self) -> Any:
        """Kernels that are launched within the context are steps, too."""
        run = InterpretedFunction.run

        def noted(kernel: InterpretedFunction, *args: Any, **kwargs: Any) -> None:
            self._one(partial(run, kernel), args, kwargs, makes=False)

        return mock.patch.object(InterpretedFunction, "run", noted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._inside:
            return func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        masks = name in ("index", "index_put_") and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name in WAITING or masks:
            raise RuntimeError(f"{name} waits for the device, or allocates on the host: no graph can hold it")
        return self._one(func, args, kwargs or {}, makes=not func._schema.is_mutable)

    def replay(self) -> None:
        """Once more."""
        with torch.inference_mode():
            for step in self._steps:
                args, kwargs = tree_map(_lent, (step.args, step.kwargs))
                made = step.call(*args, **kwargs)
                for old, new in zip(step.results, _tensors(made), strict=bool(step.results)):
                    old.copy_(new)

    def _one(self, call: Callable[..., Any], args: Any, kwargs: Any, makes: bool) -> Any:
        noted = tree_map(self._noted, (args, kwargs))
        read = {_storage(t) for t in _tensors((args, kwargs))}
        self._inside = True
        try:
            made = call(*args, **kwargs)
        finally:
            self._inside = False
        new = [t for t in _tensors(made) if makes]
        views = bool(new) and all(_storage(t) in read for t in new)
        if not views:
            self._steps.append(_Step(call, *noted, new))
            self._own.update((_storage(t), t) for t in new)
        return made

    def _noted(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or _storage(value) in self._own:
            return value
        weak = StorageWeakRef(value.untyped_storage())
        return _Borrowed(weak, value.new_empty(0), value.storage_offset(), value.shape, value.stride())


def _lent(value: Any) -> Any:
    return value.tensor() if isinstance(value, _Borrowed) else value


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
