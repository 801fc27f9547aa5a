"""Which kernels a model runs with, and the engine on Triton's kernels from prompt to tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_checkpoint

from quire import LLM, SamplingParams
from quire.kernels import cpu, launch, reference
from quire.kernels.triton_ops import TritonOps
from quire.worker import backend
from quire.worker.config import ModelOptions

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_what_auto_means(monkeypatch):
    options = ModelOptions()
    assert backend.kernels_of(options, CUDA, torch.bfloat16) == "triton"
    assert backend.kernels_of(options, CPU, torch.bfloat16) == "torch"
    monkeypatch.setattr(backend.cpu, "available", lambda: True)
    assert backend.kernels_of(options, CPU, torch.float32) == "compiled"
    monkeypatch.setattr(backend.cpu, "available", lambda: False)
    assert backend.kernels_of(options, CPU, torch.float32) == "torch"
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    assert backend.kernels_of(options, CUDA, torch.float16) == "torch"


@pytest.mark.parametrize(("attention", "device", "dtype", "said"), [
    ("compiled", CUDA, torch.bfloat16, "compiled kernels need a CPU"),
    ("compiled", CPU, torch.float16, "compiled kernels need a CPU"),
])  # fmt: skip
def test_kernels_that_do_not_run_here_are_refused(attention, device, dtype, said):
    with pytest.raises(ValueError, match=said):
        backend.kernels_of(ModelOptions(attention=attention), device, dtype)


def test_triton_on_a_cpu_is_for_the_interpreter(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        backend.kernels_of(ModelOptions(attention="triton"), CPU, torch.float32)
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed"):
        backend.kernels_of(ModelOptions(attention="triton"), CUDA, torch.float32)


def test_ops_by_name():
    assert backend.ops_of(ModelOptions(), "compiled") is cpu
    assert backend.ops_of(ModelOptions(), "torch") is reference
    assert isinstance(backend.ops_of(ModelOptions(), "triton"), TritonOps)


def test_the_engine_on_triton_gives_the_tokens_of_torch(tmp_path: Path):
    """Prefill in chunks, decode, mixed steps, a shared prefix, and a pool so small that a sequence is preempted."""
    tiny_checkpoint(tmp_path)
    prompts = [[(7 * i + j) % 97 for j in range(n)] for i, n in enumerate((20, 3, 33))]
    prompts.append([*prompts[2][:32], 5])
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    tokens, preempted = {}, {}
    for attention in ("torch", "triton"):
        llm = LLM(
            str(tmp_path),
            progress=False,
            attention=attention,
            page_size=16,
            kv_pages=6,
            max_batch_tokens=24,
            threads=1,
            preemption="recompute",
        )
        tokens[attention] = [answer.outputs[0].token_ids for answer in llm.generate(prompts, params)]
        preempted[attention] = sum(llm.engine.stats().preemptions.values())
    assert tokens["triton"] == tokens["torch"]
    assert preempted["triton"] == preempted["torch"]
