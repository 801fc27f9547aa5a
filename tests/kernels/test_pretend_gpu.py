"""The pretended GPU finds what it is there to find."""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from gpu_device import Gpu
from gpu_memory import Fault
from pretend_gpu import pretended
from triton.runtime.errors import InterpreterError


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with pretended() as one:
        yield one


@triton.jit
def _add_kernel(source, target, count, shift, BLOCK: tl.constexpr, WITHIN: tl.constexpr):  # noqa: N803
    """target[i] = source[i + shift] + 1"""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if WITHIN:
        tl.store(target + at, tl.load(source + at + shift, mask=at + shift < count, other=0.0) + 1, mask=at < count)
    else:
        tl.store(target + at, tl.load(source + at + shift) + 1)


@triton.jit
def _sum_kernel(source, target, count, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.arange(0, BLOCK)
    tl.store(target, tl.sum(tl.load(source + at, mask=at < count)))


def add(source: torch.Tensor, target: torch.Tensor, shift: int = 0, block: int = 4, within: bool = True) -> None:
    _add_kernel[(-(-len(target) // block),)](source, target, len(target), shift, BLOCK=block, WITHIN=within)


def test_it_computes(gpu):
    a = torch.arange(10, dtype=torch.float32, device="cuda")
    out = torch.empty(10, device="cuda")
    add(a, out, shift=1)
    assert a.is_cuda
    assert out.device == torch.device("cuda:0")
    assert out.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 10, 1]
    out[torch.tensor([1, 2], device="cuda")] = 0.0
    assert float(out[:3].sum()) == 2.0
    assert torch.where(out > 0, out, -math.inf).amin() == -math.inf


def test_two_devices(gpu):
    there = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="cpu and cuda:0"):
        there + torch.ones(3)
    with pytest.raises(RuntimeError, match="numpy"):
        there.numpy()
    with pytest.raises(InterpreterError, match="nothing that a GPU reaches"):
        add(torch.ones(3), there)
    with pytest.raises(NotImplementedError, match="Float8"):
        there.to(torch.float8_e4m3fn)[torch.tensor([0], device="cuda")]


def test_streams_that_do_not_wait(gpu):
    a = torch.ones(8, device="cuda")
    beside = torch.cuda.Stream()
    with torch.cuda.stream(beside), pytest.raises(Fault, match="stream 1 reads what ones on stream 0 writes"):
        a.clone()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        copy = a.clone()
        done = torch.cuda.Event()
        done.record()
    with pytest.raises(Fault, match="stream 0 writes what aten::clone on stream 1 reads"):
        a.zero_()
    a[:0].zero_()
    done.synchronize()
    a.zero_()
    assert copy.tolist() == [1.0] * 8
    del copy


def test_other_bytes_are_nobodys_concern(gpu):
    a = torch.ones(4, 8, device="cuda")
    torch.cuda.synchronize()
    beside = torch.cuda.Stream()
    with torch.cuda.stream(beside):
        a[:, ::2].fill_(2.0)
    a[:, 1::2].fill_(3.0)
    with pytest.raises(Fault, match="reads"):
        a[:, 1:3].sum()
    torch.cuda.synchronize()


@pytest.mark.parametrize("told", [True, False])
def test_a_thread_knows_only_what_it_was_told(gpu, told):
    """A lock says when the main thread has waited for the device. An event, or a queue, would also tell the other one so."""
    a, event, lock, found = torch.zeros(4, device="cuda"), threading.Event(), threading.Lock(), []

    def fill() -> None:
        with torch.cuda.stream(torch.cuda.Stream()), lock:
            if told:
                event.wait(10)
            try:
                a.fill_(1.0)
            except Fault as fault:
                found.append(str(fault))
            torch.cuda.current_stream().synchronize()

    with lock:
        thread = threading.Thread(target=fill)
        thread.start()
        a.add_(1.0)
        torch.cuda.synchronize()
        event.set()
    thread.join()
    torch.cuda.synchronize()
    assert found == ([] if told else ["aten::fill_ on stream 1 writes what aten::add_ on stream 0 writes, which nobody waited for"])


def test_memory_that_is_freed_too_early(gpu):
    beside = torch.cuda.Stream()
    a = torch.ones(8, device="cuda")
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        b = a + 1
    del a
    with pytest.raises(Fault, match="is freed that aten::add on stream 1 uses"):
        torch.cuda.synchronize()
    del b
    torch.cuda.synchronize()


def test_host_memory_that_is_filled_too_early(gpu):
    there = torch.empty(4, device="cuda")
    for pinned, waits in ((True, False), (True, True), (False, False)):
        host = torch.ones(4, pin_memory=pinned)
        there.copy_(host, non_blocking=True)
        if waits:
            torch.cuda.synchronize()
        host.fill_(2.0)
        if pinned and not waits:
            with pytest.raises(Fault, match="host memory was written"):
                torch.cuda.synchronize()
        torch.cuda.synchronize()
        assert there.tolist() == [1.0] * 4


def test_host_memory_that_is_read_too_early(gpu):
    host = torch.zeros(4, pin_memory=True).copy_(torch.ones(4, device="cuda"), non_blocking=True)
    assert 1.0 not in host.tolist()
    torch.cuda.synchronize()
    assert host.tolist() == [1.0] * 4
    plain = torch.zeros(4).copy_(torch.ones(4, device="cuda"), non_blocking=True)
    assert plain.tolist() == [1.0] * 4


def test_locked_pages(gpu):
    memory = np.ones(64, np.float32)
    cudart, at = torch.cuda.cudart(), memory.ctypes.data
    assert cudart.cudaHostRegister(at, memory.nbytes, 0) == 0
    assert cudart.cudaHostRegister(at, memory.nbytes, 0) != 0
    out = torch.empty(64, device="cuda")
    add(torch.from_numpy(memory), out)
    assert out.tolist() == [2.0] * 64
    assert cudart.cudaHostUnregister(at) == 0


def test_kernels_that_leave_their_memory(gpu):
    a, out = torch.ones(10, device="cuda"), torch.empty(10, device="cuda")
    add(a, out, block=16)
    with pytest.raises(InterpreterError, match="nothing is at this address"):
        add(a, out, block=16, within=False)


def test_programs_that_meet(gpu):
    a = torch.ones(12, device="cuda")
    add(a, a)
    with pytest.raises(InterpreterError, match="reads what another one of the launch has written"):
        add(a, a[4:])
    torch.cuda.synchronize()
    with pytest.raises(InterpreterError, match="writes what another one of the launch has read"):
        add(a, a, shift=1)


def test_numbers_that_nobody_wrote(gpu):
    assert torch.empty(3, device="cuda").isnan().all()
    out = torch.empty(1, device="cuda")
    _sum_kernel[(1,)](torch.ones(5, device="cuda"), out, 5, BLOCK=8)  # there is no `other` for the last three
    assert out.isnan().all()


def test_graphs(gpu):
    source, stream = torch.ones(4, device="cuda"), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = torch.zeros(4, device="cuda")
        add(source, out)
        twice = out * 2
    source.fill_(5.0)
    graph.replay()
    assert twice.tolist() == [12.0] * 4
    del source
    gc.collect()
    with pytest.raises(RuntimeError, match="has been freed"):
        graph.replay()
    with pytest.raises(Fault, match="no graph can hold"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        out.sum().item()


def test_what_was_waited_for(gpu):
    a = torch.ones(4, device="cuda")
    a.sum().item()
    torch.tensor([1.0], device="cuda")
    a[a > 0]
    assert [what for _, what in gpu.waits] == ["item", "a copy from the host", "index"]
    assert {thread for thread, _ in gpu.waits} == {threading.current_thread().name}
