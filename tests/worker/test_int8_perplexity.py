"""What --quantize int8 costs in quality: perplexity of SmolLM2 on the sonnets, against float32 with the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from quire.kernels import cpu
from quire.kernels.layout import attention_batch
from quire.worker.config import ModelOptions
from quire.worker.kv_store import KVStore, PageShape
from quire.worker.linear import linear_factory
from quire.worker.model import DecoderModel
from quire.worker.text.source import ModelNotFound, resolve_model
from quire.worker.text.tokenizer import load_tokenizer
from quire.worker.weights import open_checkpoint

CHUNK, CHUNKS, PAGE = 512, 4, 32
ALLOWED = 0.02


@pytest.mark.first
@pytest.mark.slow
@pytest.mark.skipif(not cpu.available(), reason="there is no C compiler here")
def test_int8_keeps_the_perplexity(data_file: Callable[[str], Path], record_property: Callable[[str, object], None]) -> None:
    text = data_file("prompts/shakespeare_sonnets.txt").read_text()
    try:
        path = resolve_model("smollm2")
    except ModelNotFound as error:
        pytest.skip(str(error))
    tokens = torch.tensor(load_tokenizer(path).encode(text))
    chunks = tokens[: len(tokens) // CHUNK * CHUNK].view(-1, CHUNK)
    chunks = chunks[:: len(chunks) // CHUNKS][:CHUNKS]
    full, eight = (perplexity(chunks, quantize) for quantize in (None, "int8"))
    record_property("perplexity", {"float32": full, "int8": eight})
    print(f"perplexity: float32 {full:.3f}, int8 {eight:.3f} ({eight / full - 1:+.2%})")
    assert eight < full * (1 + ALLOWED)


def perplexity(chunks: torch.Tensor, quantize: str | None) -> float:
    checkpoint = open_checkpoint(ModelOptions())
    config = checkpoint.config
    model = DecoderModel(config, checkpoint, "cpu", torch.float32, linear_factory("cpu", torch.float32, quantize), cpu)
    checkpoint.close()
    pages = list(range(CHUNK // PAGE))
    kv = KVStore(PageShape(config.num_kv_heads, config.num_layers, PAGE, config.head_dim, torch.float32), len(pages), "cpu")
    batch = attention_batch([(0, CHUNK, pages)], PAGE)
    lost = torch.tensor(0.0)
    for tokens in chunks:
        logits = model.logits(model.forward(tokens, torch.arange(CHUNK), batch, kv))
        lost += F.cross_entropy(logits[:-1], tokens[1:])
    return math.exp(float(lost) / len(chunks))
