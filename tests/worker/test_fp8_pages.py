"""Keys and values in e4m3: what a model computes with them, and an engine that keeps them so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreter import error, install
from tiny_models import Pages, tiny_checkpoint
from torch import Tensor

from quire import LLM, SamplingParams
from quire.kernels import reference
from quire.kernels.triton_ops import TritonOps
from quire.worker.backend import kv_dtype_of
from quire.worker.config import CacheOptions, ModelOptions
from quire.worker.linear import PlainLinear
from quire.worker.model import DecoderModel
from quire.worker.weights import open_checkpoint

FP8 = torch.float8_e4m3fn
TOKENS = [(11 * i) % 97 for i in range(24)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    install()
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def rounded_write(qkv: Tensor, positions: Tensor, cos_sin: Tensor, pages: Tensor, *rest: Any) -> Tensor:
    """The oracle's write, and then everything in the pages to the nearest e4m3."""
    q = reference.rope_and_write_kv(qkv, positions, cos_sin, pages, *rest)
    pages.copy_(pages.clamp(-448, 448).to(FP8).to(pages.dtype))
    return q


def logits(path: Path, ops: Any, dtype: torch.dtype) -> Tensor:
    """After each of TOKENS: a chunk, then one by one."""
    source = open_checkpoint(ModelOptions(str(path)))
    model = DecoderModel(source.config, source, "cpu", torch.float32, PlainLinear, ops)
    return Pages(model, 4, 16, dtype).run(TOKENS, [21, 1])


def test_a_model_computes_with_the_nearest_e4m3_values(checkpoint: Path) -> None:
    found = logits(checkpoint, TritonOps(), FP8)
    expected = logits(checkpoint, SimpleNamespace(**vars(reference) | {"rope_and_write_kv": rounded_write}), torch.float32)
    assert error(found, expected) < 2e-3  # queries meet fp8 keys in float16
    assert error(found, logits(checkpoint, reference, torch.float32)) > 1e-2  # what eight bits cost, so the line above says something


def test_an_engine_keeps_a_byte_for_each_number_and_swaps_it(checkpoint: Path) -> None:
    prompts = [[(7 * i + j) % 97 for j in range(n)] for i, n in enumerate((14, 3, 15))]
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    found = []
    for kv_pages, more in ((12, {}), (4, {"preemption": "swap", "host_memory": "1MiB", "verify_moves": True})):
        options = {"page_size": 16, "kv_pages": kv_pages, "threads": 1, "prefix_cache": False, **more}
        llm = LLM(str(checkpoint), progress=False, attention="triton", kv_dtype="fp8", **options)
        found.append([answer.outputs[0].token_ids for answer in llm.generate(prompts, params)])
        assert llm.engine.page_bytes == 2 * 2 * 2 * 16 * 16  # KV heads, layers, K and V, tokens, dimensions
    assert llm.stats().moved_bytes["in"] > 0
    assert found[0] == found[1]


def test_only_tritons_kernels_read_them() -> None:
    assert kv_dtype_of(CacheOptions(), "compiled", torch.float32) is torch.float32
    assert kv_dtype_of(CacheOptions(kv_dtype="fp8"), "triton", torch.bfloat16) is FP8
    with pytest.raises(ValueError, match="kv_dtype: fp8 pages are for Triton's kernels, and torch"):
        kv_dtype_of(CacheOptions(kv_dtype="fp8"), "torch", torch.bfloat16)
