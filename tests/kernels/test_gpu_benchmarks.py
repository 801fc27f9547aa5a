"""The benchmarks for a GPU: without one they say so; every call that they time goes into a graph of a pretended one, at a tiny shape."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch
from interpreter import install
from pretend_gpu import pretended
from torch.nn.attention import flex_attention

from quire.kernels.attention_tile import Scores

SIZES = {
    "kernels": {
        "HEADS": 4,
        "KV_HEADS": 2,
        "DIM": 16,
        "PAGE": 16,
        "HIDDEN": 64,
        "INNER": 64,
        "VOCAB": 500,
        "SCORES": Scores(0.25),
        "DECODES": [(2, 40)],
        "PREFILLS": [(2, 10, 0), (1, 5, 20)],
        "SHARED": [(2, 32, 10)],
        "TOKENS": [3],
        "POOL": 4,
        "COPIED": [2],
        "SAMPLED": [2],
    },
    "tune": {
        "MODELS": [(4, 2, 16)],
        "PAGES": [16],
        "CONTEXT": 32,
        "VOCAB": 500,
        "WIDTHS": [64],
        "ROWS": [1, 2],
        "CHUNKS": [4],
        "TOKENS": [3],
        "POOL": (8, 2, 2, 2, 16, 16),
        "COPIED": 2,
    },
}


@pytest.fixture
def script(request: pytest.FixtureRequest, root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script of that name as a module, its shapes tiny; a call that it times is captured, and replayed once."""
    install()
    monkeypatch.syspath_prepend(root / "benchmarks")  # where a script finds its neighbours
    spec = importlib.util.spec_from_file_location(f"{request.param}_benchmark", root / "benchmarks" / f"{request.param}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in SIZES[request.param].items():
        monkeypatch.setattr(module, name, value)

    def captured(call: Callable[[], object]) -> float:
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        torch.cuda.synchronize()
        return 1.0

    def once(call: Callable[[], object]) -> float:
        call()
        return 1.0

    monkeypatch.setattr(module.gpu, "time_ms", captured)
    monkeypatch.setattr(module.gpu, "time_eager_ms", once)
    torch.manual_seed(0)
    with pretended():
        yield module
    sys.modules.pop("gpu", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(root: Path) -> None:
    done = subprocess.run([sys.executable, str(root / "benchmarks/kernels.py")], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "this benchmark needs a CUDA device; torch finds none"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, about torch
@pytest.mark.parametrize("script", ["kernels"], indirect=True)
def test_every_kernel_is_timed(script: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = script.packed_peers
    monkeypatch.setattr(script, "packed_peers", lambda *shape: peers(*shape)[:1])  # FlexAttention would be compiled
    monkeypatch.setattr(flex_attention, "create_block_mask", lambda *of, device: None)
    rows = [script.measured(figure, 1e9, 1e12) for group in script.GROUPS.values() for figure in group()]
    ours = {path.stem for path in (root / "kernels").glob("*.py") if "@triton.jit" in path.read_text()}
    assert ours - {"attention_tile"} <= {row["kernel"].removeprefix("add_") for row in rows}
    assert all(row["us"] > 0 and row["of_limit"] > 0 for row in rows)
    assert [row["peers_us"].keys() for row in rows if row["kernel"] == "paged_decode"] == [{"sdpa": 0}.keys(), {}.keys()]


@pytest.mark.parametrize("script", ["tune"], indirect=True)
def test_every_kernel_is_tuned(script: ModuleType) -> None:
    for kernel, tasks in script.KERNELS.items():
        for task in islice(tasks(kernel, False), 2):
            assert task.shape.kernel == kernel
            task.call(task.rule)
            task.call(task.candidates[0])
