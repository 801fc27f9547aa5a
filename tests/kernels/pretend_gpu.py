"""A GPU for machines that have none: tensors "on cuda:0" whose numbers lie in host memory, and torch.cuda's streams, events and graphs.

    with pretended() as gpu:
        ...                 # torch.cuda.is_available(); Triton's kernels run in its interpreter

It computes at once, and keeps the book of `gpu_memory` about what a GPU would be free to do later, so what goes well here by luck is found:

- tensors of two devices in one operation, arrays of what is not in host memory, types that CUDA has no kernel for;
- streams that do not wait for one another, memory that is freed while another stream uses it, programs of a launch that meet;
- what a kernel reads or writes outside of all memory, or reads without a mask's `other`; memory that nobody has written holds NaN;
- host memory that is filled again while a copy from it may be under way (a `Fault` at the next wait), or read before a copy to it has ended
  (it holds nonsense until then);
- in a graph, whatever waits, and what `recorded_graph` knows.

`gpu.waits` is what the host's threads have waited for: (thread, what). Operations on one GPU only; no NCCL.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import gpu_tensor
import numpy as np
import torch
from gpu_device import Gpu
from gpu_memory import Clock, merge
from gpu_tensor import GPU, Factories, GpuTensor, is_gpu, pin, present
from recorded_graph import RecordedGraph
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

CONVERSIONS = "tensor", "as_tensor"  # which no mode is asked about


@contextmanager
def pretended() -> Iterator[Gpu]:
    """A GPU is there, for all threads."""
    gpu = gpu_tensor.current = Gpu()
    with ExitStack() as stack:
        for owner, name, value in _patches(gpu):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(Factories())
        try:
            yield gpu
            gpu.wait("the end", None)
        finally:
            gpu_tensor.current = None


class Stream:
    """torch.cuda.Stream"""

    def __init__(self, device: Any = None, priority: int = 0, *, number: int | None = None) -> None:
        self._gpu, self.device = present(), GPU
        self.id = self._gpu.new_stream() if number is None else number

    def synchronize(self) -> None:
        self._gpu.wait("a stream", self._gpu.memory.so_far(self.id))

    def wait_stream(self, other: Stream) -> None:
        self._gpu.memory.order(self.id, self._gpu.memory.so_far(other.id))

    def wait_event(self, event: Event) -> None:
        event.wait(self)


class Event:
    """torch.cuda.Event"""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self._gpu = present()
        self._until: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self._until = self._gpu.memory.so_far(self._gpu.stream if stream is None else stream.id)

    def wait(self, stream: Stream | None = None) -> None:
        self._gpu.memory.order(self._gpu.stream if stream is None else stream.id, self._until)

    def synchronize(self) -> None:
        self._gpu.wait("an event", self._until)


class Graph:
    """torch.cuda.CUDAGraph"""

    def __init__(self) -> None:
        self.recorded = RecordedGraph()

    def replay(self) -> None:
        with present().memory.lock:
            self.recorded.replay()


@contextmanager
def _capture(graph: Graph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global") -> Iterator[None]:
    """torch.cuda.graph"""
    gpu = present()
    gpu.wait("the start of a capture", None)
    with gpu.on(gpu.new_stream() if stream is None else stream.id):
        gpu.capturing, gpu.capturer = graph.recorded, threading.get_ident()
        try:
            yield
        finally:
            gpu.capturing = None


def _patches(gpu: Gpu) -> list[tuple[Any, str, Any]]:
    properties = SimpleNamespace(name="pretended", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30)
    cudart = SimpleNamespace(cudaHostRegister=gpu.lock_pages, cudaHostUnregister=gpu.unlock_pages)
    cuda = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "set_device": lambda device: None,
        "_lazy_init": lambda: None, "empty_cache": lambda: None, "mem_get_info": lambda device=None: (2**30, 80 * 2**30),
        "get_device_properties": lambda device=None: properties, "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "pretended", "cudart": lambda: cudart,
        "synchronize": lambda device=None: gpu.wait("the device", None), "current_stream": lambda device=None: Stream(number=gpu.stream),
        "stream": lambda stream: gpu.on(gpu.stream if stream is None else stream.id), "Stream": Stream, "Event": Event, "CUDAGraph": Graph,
        "graph_pool_handle": lambda: 0, "graph": _capture, "manual_seed_all": lambda seed: None,
    }  # fmt: skip
    found: list[tuple[Any, str, Any]] = [(torch.cuda, name, value) for name, value in cuda.items()]
    found += [(torch, name, _converted(gpu, getattr(torch, name))) for name in CONVERSIONS]
    found += [(Tensor, name, make(gpu, getattr(Tensor, name))) for name, make in _METHODS.items()]
    builder = interpreter.InterpreterBuilder
    found.append((builder, "create_masked_load", _load(gpu, builder.create_masked_load)))
    found.append((builder, "create_masked_store", _store(gpu, builder.create_masked_store)))
    found += [(threading, "Thread", _Thread), (threading, "Condition", _Condition), (queue, "SimpleQueue", _Queue)]
    run = InterpretedFunction.run
    found.append((InterpretedFunction, "run", lambda kernel, *args, **kwargs: gpu.launch(run, kernel, *args, **kwargs)))
    return found


def _say() -> Clock:
    """What this thread knows of the GPU."""
    return dict(gpu_tensor.current.memory.say()) if gpu_tensor.current is not None else {}


def _hear(clock: Clock) -> None:
    if gpu_tensor.current is not None:
        gpu_tensor.current.memory.hear(clock)


class _Thread(threading.Thread):
    """Knows what whoever starts it knows."""

    def start(self) -> None:
        self._heard = _say()
        super().start()

    def _bootstrap_inner(self) -> None:
        _hear(self._heard)
        with Factories():
            super()._bootstrap_inner()  # type: ignore[misc]


class _Queue:
    """queue.SimpleQueue; who takes something out knows what those knew who put it in."""

    def __init__(self) -> None:
        self._queue: Any = _SimpleQueue()

    def put(self, item: Any) -> None:
        self._queue.put((item, _say()))

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        item, clock = self._queue.get(block, timeout)
        _hear(clock)
        return item

    def get_nowait(self) -> Any:
        return self.get(False)

    def empty(self) -> bool:
        return bool(self._queue.empty())


class _Condition(threading.Condition):
    """Who holds it knows what those knew who held it before. Events and queues have one, too."""

    def __init__(self, lock: Any = None) -> None:
        super().__init__(lock)
        self._known: Clock = {}

    def __enter__(self) -> bool:
        entered = super().__enter__()
        _hear(self._known)
        return entered

    def __exit__(self, *args: Any) -> None:
        merge(self._known, _say())
        super().__exit__(*args)

    def wait(self, timeout: float | None = None) -> bool:
        merge(self._known, _say())
        woken = super().wait(timeout)
        _hear(self._known)
        return woken


_SimpleQueue = queue.SimpleQueue


def _converted(gpu: Gpu, make: Callable[..., Any]) -> Callable[..., Any]:
    def made(data: Any, *, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        if is_gpu(device):
            return data if isinstance(data, GpuTensor) else gpu.bring(make(data, **kwargs))
        here: Tensor = make(data, device=device, **kwargs)
        return pin(here) if pin_memory else here

    return made


def _to(gpu: Gpu, to: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def moved(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        named = [a for a in (*args, kwargs.get("device")) if isinstance(a, (str, torch.device))]
        like = [a for a in args if isinstance(a, Tensor)]
        target = named[0] if named else like[0].device if like else None
        if not is_gpu(target):
            return to(self, *args, **kwargs)
        dtype = next((a for a in (*args, kwargs.get("dtype")) if isinstance(a, torch.dtype)), like[0].dtype if like else None)
        if isinstance(self, GpuTensor):  # torch's own looks for the device's library first
            return to(self, dtype) if dtype is not None else self
        return gpu.bring(self, dtype, kwargs.get("non_blocking", False))

    return moved


_METHODS: dict[str, Callable[[Gpu, Any], Any]] = {
    "to": _to,
    "cuda": lambda gpu, old: lambda self, *_, **how: self.to(GPU, **how),
    "pin_memory": lambda gpu, old: lambda self, *_: pin(self.clone()),
    "is_pinned": lambda gpu, old: lambda self, *_: not isinstance(self, GpuTensor) and gpu.pinned(self),
    "record_stream": lambda gpu, old: lambda self, stream: None,
}


def _load(gpu: Gpu, load: Callable[..., Any]) -> Callable[..., Any]:
    def loaded(self: Any, ptrs: Any, mask: Any, other: Any, *how: Any, **more: Any) -> Any:
        gpu.reached(ptrs, mask, writes=False)
        found = load(self, ptrs, mask, other, *how, **more)
        if other is None and gpu.launching is not None:  # what a register holds then is anything
            unseen = ~np.broadcast_to(mask.data, found.data.shape).astype(bool)
            found.data.view(np.uint8).reshape(*found.data.shape, -1)[unseen] = 0xFF
        return found

    return loaded


def _store(gpu: Gpu, store: Callable[..., Any]) -> Callable[..., Any]:
    def stored(self: Any, ptrs: Any, value: Any, mask: Any, *how: Any, **more: Any) -> Any:
        gpu.reached(ptrs, mask, writes=True)
        return store(self, ptrs, value, mask, *how, **more)

    return stored
