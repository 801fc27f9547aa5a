"""Frequencies and tables against transformers' own, for each way of stretching them."""

from typing import Any

import pytest
import torch
from tiny_models import SIZES
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from quire.worker.hf_config import parse_config
from quire.worker.rope import RopeConfig, RopeKind, cos_sin_table, frequencies

HEAD_DIM = 128
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512},
    "yarn, all its options": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "truncate": False,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
    },
    "yarn, attention factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.7, "original_max_position_embeddings": 512},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024},
}


def transformers_config(name: str) -> LlamaConfig:
    parameters = {"rope_type": name, "rope_theta": 50_000.0} | KINDS[name]
    return LlamaConfig(**SIZES | {"max_position_embeddings": 2048}, head_dim=HEAD_DIM, rope_parameters=parameters)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
def test_tables_equal_transformers(name: str, form: str) -> None:
    config = transformers_config(name)
    raw = config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    if form == "rope_scaling":  # as transformers 4 wrote it
        old = dict(raw.pop("rope_parameters"))
        raw |= {"rope_theta": old.pop("rope_theta"), "rope_scaling": None if name == "default" else {"type": old.pop("rope_type"), **old}}
    rope = parse_config(raw, {}, "m").rope
    embedding = LlamaRotaryEmbedding(config)
    cos, sin = embedding(torch.zeros(1), torch.arange(2048)[None])
    table = cos_sin_table(rope, HEAD_DIM, 2048)
    torch.testing.assert_close(table[:, : HEAD_DIM // 2], cos[0, :, : HEAD_DIM // 2], atol=2e-4, rtol=0)
    torch.testing.assert_close(table[:, HEAD_DIM // 2 :], sin[0, :, : HEAD_DIM // 2], atol=2e-4, rtol=0)
    torch.testing.assert_close(frequencies(rope, HEAD_DIM, 2048), embedding.inv_freq, atol=0, rtol=1e-6)


def test_dynamic_grows_with_the_longest_sequence_served() -> None:
    config = transformers_config("dynamic")
    embedding = LlamaRotaryEmbedding(config)
    rope = RopeConfig(50_000.0, RopeKind.DYNAMIC, 2.0, 2048)
    embedding(torch.zeros(1), torch.arange(3000)[None])
    torch.testing.assert_close(frequencies(rope, HEAD_DIM, 3000), embedding.inv_freq, atol=0, rtol=1e-6)
    torch.testing.assert_close(frequencies(rope, HEAD_DIM, 100), frequencies(RopeConfig(50_000.0), HEAD_DIM, 100), atol=0, rtol=1e-6)


def test_divisors_divide() -> None:
    plain = frequencies(RopeConfig(), 4, 10)
    divided = frequencies(RopeConfig(kind=RopeKind.DIVISORS, divisors=(1.0, 8.0)), 4, 10)
    assert divided.tolist() == [plain[0].item(), plain[1].item() / 8]
