"""After the warm-up no step of a GPU compiles a kernel: whatever comes, the launches are of kinds that it has made.

Triton compiles a kernel anew for other types and constants, and for integers and pointers that are (or are not) multiples of 16. Here
nothing is launched: each launch is reduced to what it would be compiled for, and memory that nobody writes holds ones.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SIZES, random_model
from torch import Tensor
from transformers import LlamaConfig
from triton.runtime.interpreter import InterpretedFunction

from quire.worker import backend, build, device_layers
from quire.worker.device_runner import DeviceRunner
from quire.worker.engine import Engine, build_engine
from quire.worker.kv_store import KVStore, copy_with_kernel
from quire.worker.linear import PlainLinear
from quire.worker.options import engine_options
from quire.worker.protocol import GenerateRequest, SamplingParams

VOCAB = 20011  # of several parts, an odd number of them for some batches


def kind(kernel: InterpretedFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What a launch is compiled for."""
    parameters = inspect.signature(kernel.fn).parameters
    given = dict(zip(parameters, args, strict=False)) | kwargs
    unseen, unaligned = (set(kernel.kwargs[name] or ()) for name in ("do_not_specialize", "do_not_specialize_on_alignment"))
    found = [kernel.fn.__name__, given.pop("num_warps", None), given.pop("num_stages", None)]
    for name, value in given.items():
        if "constexpr" in str(parameters[name].annotation) or value is None:
            found.append((name, value))
        elif isinstance(value, Tensor):
            found.append((name, value.dtype, name in unseen | unaligned or value.data_ptr() % 16 == 0))
        elif isinstance(value, int) and name not in unseen:
            found.append((name, value == 1, name in unaligned or value % 16 == 0))
    return tuple(found)


class KernelCopies(KVStore):
    """Pages are copied by the kernel, as on a GPU."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._kernel = copy_with_kernel


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[Any, ...], int]]:
    """How often each kind of launch has happened."""
    seen: dict[tuple[Any, ...], int] = {}

    def noted(kernel: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        of = kind(kernel, args, kwargs)
        seen[of] = seen.get(of, 0) + 1

    monkeypatch.setattr(InterpretedFunction, "run", noted)
    monkeypatch.setattr(torch, "empty", torch.ones)
    monkeypatch.setattr(torch, "empty_like", torch.ones_like)
    return seen


@pytest.fixture(params=[{}, {"deterministic": True}, {"kv_dtype": "fp8"}, {"cuda_graphs": False}], ids=str)
def engine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    sizes = {**SIZES, "vocab_size": VOCAB, "max_position_embeddings": 1024, "hidden_size": 96, "head_dim": 16, "num_hidden_layers": 1}
    sizes["num_attention_heads"] = 6  # so that some numbers for each head of an odd batch end between multiples of 16 bytes
    random_model(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    monkeypatch.setattr(backend, "linear_factory", lambda *of: PlainLinear)
    monkeypatch.setattr(build, "_works_ahead", lambda rank, device: True)
    monkeypatch.setattr(build, "KVStore", KernelCopies)
    monkeypatch.setattr(device_layers, "worth_sharing", lambda rows, pages, page_bytes, graphed: pages > 0)
    monkeypatch.setattr(build, "CudaCapture", lambda: lambda compute: (compute, compute()))
    sizes = {"page_size": 16, "kv_pages": 300, "max_batch_tokens": 200, "max_running": 34} | request.param
    return build_engine(engine_options(model=str(tmp_path), attention="triton", device="cpu", dtype="float32", **sizes), b"key")


def test_no_step_after_the_warm_up_compiles_anything(launches, engine):
    assert isinstance(engine.runner, DeviceRunner)
    warm = set(launches)
    assert len(warm) > 10
    launches.clear()
    numbers = random.Random(0)
    run(engine, [numbers.randrange(1, 90) for _ in range(40)], numbers)
    run(engine, [130, 1, 150, 199, 1], numbers, n=3)
    run(engine, [40], numbers, n=3)  # they share pages with all that run
    shared = [numbers.randrange(VOCAB) for _ in range(320)]  # more than one program reads
    for i in range(3):
        rest = tuple(numbers.randrange(VOCAB) for _ in range(320))
        engine.submit(GenerateRequest(f"long-{i}", ((*shared, *rest),), SamplingParams(max_tokens=6, ignore_eos=True)))
        while i == 0 and engine.scheduler.request("long-0").sequences[0].num_output == 0:
            engine.step()
    while not engine.idle():
        engine.step()
    kv, all_heads = engine.runner._kv, slice(0, SIZES["num_key_value_heads"])
    for pages in ([5], [2, 9, 4]):  # as a migration packs and unpacks them
        assert [*kv.parts(pages, all_heads, False), *kv.landings(pages, all_heads, False)]
    assert sum(launches.values()) > 500
    assert {launch[0] for launch in launches} == {launch[0] for launch in warm} > {"_copy_kernel", "_prefill_kernel", "_choose_kernel"}
    assert not set(launches) - warm


def run(engine: Engine, prompts: list[int], numbers: random.Random, n: int = 1) -> None:
    """Requests of `n` sequences each, with prompts of so many tokens, and steps until all have ended."""
    for i, length in enumerate(prompts):
        how = SamplingParams(n=n, max_tokens=numbers.randrange(2, 24), temperature=numbers.choice((0.0, 1.0)), ignore_eos=True)
        engine.submit(GenerateRequest(f"{length}-{i}", (tuple(numbers.randrange(VOCAB) for _ in range(length)),), how))
    while not engine.idle():
        engine.step()
