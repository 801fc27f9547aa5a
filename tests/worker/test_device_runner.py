"""The runner of a GPU, on a CPU: Triton's kernels in the interpreter, and in place of a captured graph a recorded one.

`-m gpu` runs the same on a CUDA device, with real graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from interpreter import install
from recorded_graph import RecordedGraph
from tiny_models import tiny_checkpoint

from quire import LLM, SamplingParams
from quire.worker import backend, device_layers
from quire.worker.cuda_graphs import CudaCapture, buckets_up_to
from quire.worker.device_layers import Decoding
from quire.worker.device_runner import DeviceRunner
from quire.worker.device_sampler import DeviceSampler
from quire.worker.linear import PlainLinear
from quire.worker.runner import ModelRunner

PROMPTS = [[(7 * i + j) % 97 for j in range(n)] for i, n in enumerate((20, 3, 33))]
MIXED = [
    SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True),
    SamplingParams(max_tokens=5, seed=3, top_p=0.9, logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=4, seed=5, top_k=20, min_p=0.01, logit_bias={5: 2.0}, ignore_eos=True),
]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


def engine(path: Path, device: str, capture: Callable | None, **options) -> LLM:
    """An LLM with a `DeviceRunner`."""
    sizes = {"page_size": 16, "kv_pages": 12, "max_batch_tokens": 24, "max_running": 3, "threads": 1} | options
    with mock.patch.object(backend, "linear_factory", return_value=PlainLinear):  # as on a GPU: a CPU's own are no operations of torch
        llm = LLM(str(path), progress=False, attention="triton", device=device, dtype="float32", **sizes)
    plain = llm.engine.runner
    assert isinstance(plain, ModelRunner)
    info, kv = llm.engine.info, plain._kv
    sampler = DeviceSampler(info.eos_token_ids, info.vocab_size, sizes["max_running"], kv.pool.device)
    llm.engine.runner = DeviceRunner(
        plain._model, kv, sampler, plain._constraints, sizes["max_running"], info.max_model_len, how=Decoding(capture)
    )
    return llm


def capture_of(device: str) -> Callable:
    return CudaCapture() if device == "cuda" else RecordedGraph()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    if request.param == "cpu":
        install()
    return request.param


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list:
    return outputs(LLM(str(checkpoint), progress=False, attention="torch", device="cpu", page_size=16, kv_pages=12, threads=1), MIXED)


def outputs(llm: LLM, params: list[SamplingParams]) -> list:
    answers = [answer.outputs[0] for answer in llm.generate(PROMPTS, params)]
    return [(a.token_ids, [[t for t, _ in lp.top] for lp in a.logprobs or ()]) for a in answers]


def watched(llm: LLM) -> list[bool]:
    """Of each step to come, whether the next one is begun before it has ended."""
    runner, begun = llm.engine.runner, []
    run_ahead = runner.run_ahead

    def noted(plan, following):
        result = run_ahead(plan, following)
        begun.append(runner._ahead is not None)
        return result

    runner.run_ahead = noted
    return begun


def test_the_buckets_of_a_batch():
    assert buckets_up_to(1) == (1,)
    assert buckets_up_to(3) == (1, 2, 3)
    assert buckets_up_to(256)[-3:] == (128, 192, 256)
    assert buckets_up_to(1000)[-1] == 512


@pytest.mark.slow
def test_graphs_ahead_give_the_tokens_of_the_plain_path(checkpoint, device, expected):
    capture = capture_of(device)
    llm = engine(checkpoint, device, capture)
    runner, begun = llm.engine.runner, watched(llm)
    assert outputs(llm, MIXED) == expected
    assert begun.count(True) >= 4, "decode steps are begun ahead"
    assert set(runner._layers.graphs._graphs) <= {1, 2, 3}
    assert runner._layers.graphs._graphs


@pytest.mark.slow
def test_graphs_of_the_deterministic_mode_give_the_bits_of_its_eager_steps(checkpoint, device):
    """Also when other batches have come since a graph was made."""
    params = [replace(MIXED[1], max_tokens=3), MIXED[0], MIXED[0]]
    with_graphs, without = (engine(checkpoint, device, how, deterministic=True) for how in (capture_of(device), None))
    first, again, expected = (llm.generate(PROMPTS, params) for llm in (with_graphs, with_graphs, without))
    assert {2, 3} <= set(with_graphs.engine.runner._layers.graphs._graphs)
    assert [a.outputs[0].logprobs for a in again] == [a.outputs[0].logprobs for a in first] == [a.outputs[0].logprobs for a in expected]
    assert [a.outputs[0].token_ids for a in again] == [a.outputs[0].token_ids for a in first] == [a.outputs[0].token_ids for a in expected]


@pytest.mark.slow
def test_without_graphs_too_and_with_penalties(checkpoint, device):
    """Also where pages lack, so that sequences are preempted and come again with their output."""
    how = {"max_tokens": 16, "ignore_eos": True, "frequency_penalty": 0.6, "presence_penalty": 0.5}
    params = [SamplingParams(temperature=0.0, repetition_penalty=1.3, **how), *[SamplingParams(seed=i, **how) for i in range(2)]]
    plain = LLM(str(checkpoint), progress=False, attention="torch", device="cpu", page_size=16, kv_pages=12, threads=1)
    llm = engine(checkpoint, device, None, kv_pages=6, preemption="recompute")
    begun = watched(llm)
    assert outputs(llm, params) == outputs(plain, params)
    assert begun.count(True) >= 8, "they are begun ahead"
    assert llm.engine.scheduler.decisions.counts["recompute"] > 0


@pytest.mark.slow
def test_a_shared_prefix_is_read_once_and_the_tokens_are_the_same(checkpoint, device, monkeypatch):
    """The second prompt found the first page of the first one."""
    prompts = [[(3 * j) % 97 for j in range(34)] + [i] for i in range(2)]
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    plain = LLM(str(checkpoint), progress=False, attention="torch", device="cpu", page_size=16, kv_pages=12, threads=1)
    llm, seen = engine(checkpoint, device, capture_of(device)), []

    def always(rows: int, pages: int, page_bytes: int, graphed: bool) -> bool:
        seen.append(pages)
        return pages > 0

    monkeypatch.setattr(device_layers, "worth_sharing", always)
    assert [a.outputs[0].token_ids for a in llm.generate(prompts, params)] == [
        a.outputs[0].token_ids for a in plain.generate(prompts, params)
    ]
    assert seen.count(1) >= 3


@pytest.mark.slow
def test_warm_up_leaves_nothing_and_captures_every_bucket(checkpoint, device):
    llm = engine(checkpoint, device, capture_of(device))
    heard = []
    llm.engine.runner.warm_up(24, lambda done, total: heard.append((done, total)))
    assert heard[-1] == (len(heard), len(heard))
    assert set(llm.engine.runner._layers.graphs._graphs) == {1, 2, 3}
    assert not llm.engine.runner._table._slots


@pytest.mark.gpu
@needs_gpu
def test_a_replay_is_the_eager_step(checkpoint):
    """The same hidden states, bit for bit where a batch fills its bucket: a product of fewer rows may be added up in another order."""
    llm = engine(checkpoint, "cuda", CudaCapture(), max_running=8)
    runner = llm.engine.runner
    layers = runner._layers
    assert layers.graphs is not None
    for rows in (8, 5, 3, 1):
        plan = build_decode(rows)
        runner.reset()
        runner._move(plan)
        step = runner._table.gather(plan.rows)
        with torch.inference_mode():
            replayed = layers.graphs.run(step).clone()
            graphs, layers.graphs = layers.graphs, None
            eager = layers.compute(step).hidden
            layers.graphs = graphs
        assert torch.equal(replayed, eager) or rows not in graphs.buckets
        assert torch.allclose(replayed, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@needs_gpu
def test_serving_on_a_gpu_takes_the_device_runner_and_gives_the_tokens_of_a_cpu(checkpoint, expected):
    llm = LLM(str(checkpoint), progress=False, dtype="float32", page_size=16, kv_pages=12, max_batch_tokens=24, max_running=3)
    assert isinstance(llm.engine.runner, DeviceRunner)
    assert outputs(llm, MIXED) == expected
    assert llm.engine.startup_s["warm up"] > 0


@pytest.mark.gpu
@needs_gpu
def test_pages_in_fp8_give_the_same_tokens_with_graphs_and_without(checkpoint):
    with_graphs, without = (outputs(engine(checkpoint, "cuda", how, kv_dtype="fp8"), MIXED) for how in (CudaCapture(), None))
    assert with_graphs == without


def build_decode(rows: int):
    return device_layers.warm_plan([1] * rows, 12, 16)
