"""The device of `pretend_gpu`: how operations, copies and launches are carried out, and entered in the book."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from gpu_memory import Clock, Fault, Memory, Operation, Region, Which
from gpu_tensor import GPU, Factories, GpuTensor, inner_of, is_gpu, pin
from recorded_graph import WAITING, RecordedGraph, _storage
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle

FP8 = torch.float8_e4m3fn, torch.float8_e5m2
MOVES = set(
    "copy_ _to_copy clone view as_strided slice select expand permute transpose t unsqueeze squeeze unbind split detach alias empty_like"
    " new_empty new_empty_strided _unsafe_view _reshape_alias".split()
)  # what CUDA does with any type
EMPTY = {"empty_like", "new_empty", "new_empty_strided", "empty"}


class _Landing(NamedTuple):
    """A copy to host memory that the host does not know to have ended."""

    by: Operation
    there: Tensor
    numbers: Tensor


class _Takeoff(NamedTuple):
    """A copy from pinned host memory that the host does not know to have ended."""

    by: Operation
    source: Tensor
    numbers: Tensor


class Gpu:
    """The one there is."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.waits: list[tuple[str, str]] = []
        self.capturing: RecordedGraph | None = None
        self.capturer: int | None = None  # its thread
        self._local = threading.local()
        self._streams = 0
        self._landings: list[_Landing] = []
        self._takeoffs: list[_Takeoff] = []
        self._pinned: dict[int, int] = {}  # locked host memory: start -> bytes
        self._anchors: dict[int, _Anchor] = {}  # of that memory
        self.launching: Operation | None = None

    # --- streams and waits ---

    @property
    def stream(self) -> int:
        """The number of this thread's present one; 0 is the default stream."""
        return getattr(self._local, "stream", 0)

    def new_stream(self) -> int:
        """Its number."""
        self._streams += 1
        return self._streams

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        """What this thread asks for inside is for that stream."""
        before, self._local.stream = self.stream, stream
        try:
            yield
        finally:
            self._local.stream = before

    def wait(self, what: str, until: Clock | None) -> None:
        """The host waits for that, or for everything."""
        if self._captures():
            raise Fault(f"{what} waits for the device, which no graph can hold")
        with self.memory.lock:
            self.waits.append((threading.current_thread().name, what))
            if until is None:
                self.memory.wait_for_all()
            else:
                self.memory.wait(until)
            for landing in self._landings[:]:
                if self.memory.ended(landing.by):
                    self._landings.remove(landing)
                    with torch.inference_mode():  # which may have been on where it was made
                        landing.there.copy_(landing.numbers)
            for takeoff in self._takeoffs[:]:
                if self.memory.ended(takeoff.by):
                    self._takeoffs.remove(takeoff)
                    if not torch.equal(_raw(takeoff.source), _raw(takeoff.numbers)):
                        raise Fault("host memory was written while a copy from it may have been under way")
            if self.memory.faults:
                raise self.memory.faults.pop()

    def _wait_here(self, what: str) -> None:
        self.wait(what, self.memory.so_far(self.stream))

    def _captures(self) -> bool:
        return self.capturing is not None and self.capturer == threading.get_ident()

    # --- operations ---

    def dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation of torch's with a tensor of this GPU."""
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with Factories():
                return func.decompose(*args, **kwargs)  # inference mode leaves that to whoever dispatches
        name = func._schema.name.removeprefix("aten::")
        if name == "_to_copy" and torch.device(kwargs.get("device") or GPU).type == "cpu":
            return self._download(args[0].inner, None, kwargs)
        if name == "copy_" and not isinstance(args[0], GpuTensor):
            return self._download(args[1].inner, args[0], {"non_blocking": args[2] if len(args) > 2 else kwargs.get("non_blocking", False)})
        if name == "copy_" and not isinstance(args[1], GpuTensor):
            return self._upload(args[1], args[0], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if name == "_local_scalar_dense":
            self._wait_here("item")
            return func(args[0].inner)
        if name == "is_pinned":
            return False
        if name == "_pin_memory":
            raise Fault("memory of a GPU cannot be pinned")
        if kwargs.get("device") is not None and not is_gpu(kwargs["device"]):  # something like it, for the host
            return func(*tree_map(inner_of, args), **kwargs)
        self._inspect(name, args, kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
        inner = tree_map(inner_of, (args, kwargs))
        made = self.perform(partial(self.compute, func), *inner[0], makes=not func._schema.is_mutable, **inner[1])
        own = {id(inner_of(t)): t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
        return tree_map(lambda x: own[id(x)] if id(x) in own else GpuTensor(x) if isinstance(x, Tensor) else x, made)

    def _inspect(self, name: str, args: Any, kwargs: Any) -> None:
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        here = [t for t in tensors if not isinstance(t, GpuTensor) and t.dim() > 0]
        indices = [i for i in args[1] if i is not None] if name in ("index", "index_put_") else []
        if any(isinstance(i, GpuTensor) and i.dtype in (torch.bool, torch.uint8) for i in indices) or name in WAITING:
            self._wait_here(name)
        if here and all(any(t is i for i in indices) for t in here):
            self._wait_here(f"{name} by numbers of the host")
        elif here:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found at least two, cpu and cuda:0")
        if name not in MOVES and any(t.dtype in FP8 for t in tensors):
            raise NotImplementedError(f"'{name}' not implemented for 'Float8_e4m3fn'")

    def perform(self, call: Callable[..., Any], *args: Any, makes: bool = False, **kwargs: Any) -> Any:
        """Something that the device does: now, or whenever the graph that is being captured is replayed."""
        with self.memory.lock:
            if self.capturing is not None and self._captures():
                return self.capturing._one(call, args, kwargs, makes)
            return call(*args, **kwargs)

    def make(self, factory: Any, *args: Any, **kwargs: Any) -> GpuTensor:
        """A new tensor."""
        numbers, name = factory(*args, **kwargs), factory._schema.name.removeprefix("aten::")
        found = self.allocate(numbers.shape, numbers.dtype)
        if self.capturing is not None and self._captures():
            self.capturing._own[_storage(found)] = found
        if not name.startswith("empty"):
            self.perform(partial(self.set, name, numbers), found)
        return GpuTensor(found)

    def set(self, name: str, numbers: Tensor, tensor: Tensor) -> None:
        """Numbers that a kernel makes by itself."""
        self._touch(self.memory.issue(self.stream, name), tensor, True)
        tensor.copy_(numbers)

    def compute(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """An operation on what tensors of the GPU stand for."""
        name = func._schema.name
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        made = func(*args, **kwargs)
        fresh = [t for t in _tensors(made) if t.untyped_storage().data_ptr() not in given or not t.numel()]
        if _tensors(made) and not fresh and not func._schema.is_mutable:
            return made  # views
        by, empty = self.memory.issue(self.stream, name), name.removeprefix("aten::") in EMPTY
        arguments = func._schema.arguments
        for argument, value in [*zip(arguments, args, strict=False), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(value) if writes or not empty else ():
                if tensor.dim() or self._reaches(tensor):  # numbers of the host may be given as tensors without axes
                    self._touch(by, tensor, writes)
        if not fresh:
            return made
        return tree_map(lambda x: self._own(x, by, name) if isinstance(x, Tensor) else x, made)

    def _own(self, made: Tensor, by: Operation, name: str) -> Tensor:
        """A result in the GPU's memory."""
        found = self.allocate(made.shape, made.dtype, made.stride())
        if name.removeprefix("aten::") not in EMPTY:
            found.copy_(made)
            self._touch(by, found, True)
        return found

    def allocate(self, shape: Any, dtype: torch.dtype, stride: Any = None) -> Tensor:
        """Memory of the GPU, not written."""
        stride = stride if stride is not None else torch.empty(shape, device="meta").stride()
        span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if 0 not in tuple(shape) else 0
        memory = self.memory.allocate(span * dtype.itemsize, self.stream)
        if not span:
            return torch.empty(shape, dtype=dtype)
        return torch.from_numpy(memory).view(dtype).as_strided(tuple(shape), tuple(stride))

    def _touch(self, by: Operation, tensor: Tensor, writes: bool) -> None:
        if tensor.numel() and not self._captures():  # what a graph holds is not done before a replay
            region = self.memory.region(tensor.data_ptr(), by.name)
            self.memory.touch(by, region, _bytes_of(tensor, region), writes)

    def _reaches(self, tensor: Tensor) -> bool:
        try:
            self.memory.region(tensor.data_ptr(), "")
        except Fault:
            return False
        return True

    # --- between host and device ---

    def pinned(self, tensor: Tensor) -> bool:
        """Whether copies from this host memory, and to it, need not wait."""
        at = tensor.data_ptr()
        return getattr(tensor.untyped_storage(), "_pretends_pinned", False) or any(s <= at < s + n for s, n in self._pinned.items())

    def lock_pages(self, at: int, size: int, _: int) -> int:
        """cudaHostRegister"""
        if any(s < at + size and at < s + n for s, n in self._pinned.items()):
            return 712  # cudaErrorHostMemoryAlreadyRegistered
        self._pinned[at] = size
        self._anchors[at] = _Anchor()
        self.memory.reach(at, size, 0, self._anchors[at])
        return 0

    def unlock_pages(self, at: int) -> int:
        """cudaHostUnregister"""
        self._pinned.pop(at)
        self._anchors.pop(at)
        return 0

    def _download(self, source: Tensor, there: Tensor | None, kwargs: Any) -> Tensor:
        asynchronous = kwargs.get("non_blocking", False)
        if there is None:
            there = torch.empty_like(source, dtype=kwargs.get("dtype"), device="cpu")
            if asynchronous:
                pin(there)
        with self.memory.lock:
            by = self.memory.issue(self.stream, "a copy to the host")
            self._touch(by, source, False)
            if self._reaches(there):
                self._touch(by, there, True)
            if asynchronous and self.pinned(there):
                self._landings.append(_Landing(by, there, source.clone()))
                _raw(there).fill_(0xA5)
                return there
            self._wait_here("a copy to the host")
            return there.copy_(source)

    def _upload(self, source: Tensor, there: GpuTensor, asynchronous: bool) -> Tensor:
        with self.memory.lock:
            by = self.memory.issue(self.stream, "a copy from the host")
            if self._reaches(source):
                self._touch(by, source, False)
            self._touch(by, there.inner, True)
            if source.dim():
                if asynchronous and self.pinned(source):
                    self._takeoffs.append(_Takeoff(by, source, source.clone()))
                else:
                    self._wait_here("a copy from the host")
            there.inner.copy_(source)
        return there

    def bring(self, source: Tensor, dtype: torch.dtype | None = None, non_blocking: bool = False) -> GpuTensor:
        """A tensor of the host, here."""
        there = GpuTensor(self.allocate(source.shape, dtype or source.dtype, torch.empty_like(source, device="meta").stride()))
        self._upload(source, there, non_blocking)
        return there

    # --- launches ---

    def launch(self, run: Callable[..., Any], kernel: InterpretedFunction, *args: Any, **kwargs: Any) -> None:
        """A kernel, in the interpreter, which does one at a time."""
        inner = tree_map(inner_of, (args, kwargs))
        self.perform(partial(self._interpret, run, kernel), *inner[0], **inner[1])

    def _interpret(self, run: Callable[..., Any], kernel: InterpretedFunction, *args: Any, **kwargs: Any) -> None:
        self.launching = self.memory.issue(self.stream, kernel.fn.__name__)
        try:
            run(kernel, *args, **kwargs)
        finally:
            self.launching = None

    def reached(self, pointers: TensorHandle, mask: TensorHandle, writes: bool) -> None:
        """A program of the kernel that runs touches these."""
        if self.launching is None or self._captures():
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        at = np.unique(pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].astype(np.int64))
        x, y, z = interpreter.interpreter_builder.grid_idx
        _, ny, nz = interpreter.interpreter_builder.grid_dim
        while len(at):
            region = self.memory.region(int(at[0]), self.launching.name)
            inside = at[at <= region.base + region.size - size]
            if not len(inside):
                raise Fault(f"{self.launching.name}: the last bytes of this address are outside of its memory")
            which = ((inside - region.base)[:, None] + np.arange(size)).reshape(-1)
            self.memory.touch(self.launching, region, which, writes, (x * ny + y) * nz + z + 1)
            at = at[len(inside) :]


class _Anchor:
    """Lives as long as something that cannot be asked."""


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _raw(tensor: Tensor) -> Tensor:
    return (tensor if tensor.is_contiguous() else tensor.contiguous()).view(-1).view(torch.uint8)


def _bytes_of(tensor: Tensor, region: Region) -> Which:
    """Where a tensor lies."""
    first, size = tensor.data_ptr() - region.base, tensor.element_size()
    if tensor.is_contiguous():
        return slice(first, first + tensor.numel() * size)
    places = np.zeros((), np.int64)
    for count, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = (places[..., None] + np.arange(count) * stride) if stride else places
    return (first + places.reshape(-1, 1) * size + np.arange(size)).reshape(-1)
