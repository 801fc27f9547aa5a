"""The decoder against transformers: each model of the family, each rope, in one go, in chunks and token by token."""

import weakref
from pathlib import Path

import pytest
import torch
from tiny_models import SIZES, Pages, load, random_model
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from quire.kernels import reference
from quire.worker.config import ModelOptions
from quire.worker.linear import Linear
from quire.worker.model import DecoderModel
from quire.worker.text.source import ModelNotFound, resolve_model
from quire.worker.weights import open_checkpoint

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama, every head its own KV": LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
    "llama, tied head": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama, linear rope": LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    "llama, dynamic rope": LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
    "llama, yarn rope": LlamaConfig(**SIZES, rope_parameters=YARN | {"rope_theta": 1e4}),
    "llama, llama3 rope": LlamaConfig(**SIZES, rope_parameters=LLAMA3 | {"rope_theta": 500_000.0}),
    "mistral": MistralConfig(**SIZES, sliding_window=None, head_dim=12),
    "mistral, sliding window": MistralConfig(**SIZES, sliding_window=7),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, some layers slide": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen3, biases and layer types": Qwen3Config(
        **SIZES,
        head_dim=16,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
}
TOKENS = [int(t) for t in torch.randint(97, (45,), generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_logits_equal_transformers(config: PretrainedConfig, tmp_path: Path) -> None:
    expected_of = random_model(config)
    expected_of.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = expected_of(torch.tensor([TOKENS])).logits[0]
    model = load(tmp_path)
    for chunks in ([45], [7, 13, 1, 5], [1]):
        logits = Pages(model).run(TOKENS, chunks)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_sequences_in_one_step_do_not_see_each_other(tmp_path: Path) -> None:
    random_model(MODELS["mistral, sliding window"]).save_pretrained(tmp_path)
    model = load(tmp_path)
    first, second, third = TOKENS[:20], TOKENS[20:33], TOKENS[33:]
    together = Pages(model)
    pieces = [
        together.step(first=first[:18], second=second[:5]),
        together.step(first=first[18:19], second=second[5:6], third=third),
        together.step(first=first[19:], second=second[6:]),
    ]
    for name, tokens in (("first", first), ("second", second), ("third", third)):
        expected = Pages(model).run(tokens, [len(tokens)])
        got = torch.cat([piece[name] for piece in pieces if name in piece])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_dynamic_rope_beyond_the_trained_length_is_transformers_at_that_length(tmp_path: Path) -> None:
    """transformers rescales with the sequence; Quire for the longest that it serves. For a sequence of just that length they agree."""
    expected_of = random_model(
        LlamaConfig(**SIZES | {"max_position_embeddings": 24}, rope_parameters=MODELS["llama, dynamic rope"].rope_parameters)
    )
    expected_of.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = expected_of(torch.tensor([TOKENS])).logits[0]
    logits = Pages(load(tmp_path, max_model_len=45)).run(TOKENS, [45])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_loading_reports_every_byte_and_keeps_no_linear_that_was_packed(tmp_path: Path) -> None:
    expected_of = random_model(MODELS["llama"])
    expected_of.save_pretrained(tmp_path)
    heard: list[tuple[int, int]] = []
    originals: list[weakref.ref[torch.Tensor]] = []

    def pack(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        originals.append(weakref.ref(weight))
        return lambda x: x

    checkpoint = open_checkpoint(ModelOptions(str(tmp_path)))
    model = DecoderModel(checkpoint.config, checkpoint, "cpu", torch.float32, pack, reference, lambda *now: heard.append(now))
    total = sum(weight.nbytes for weight in expected_of.parameters())
    assert heard[-1] == (total, total)
    assert [done for done, _ in heard] == sorted({done for done, _ in heard})
    assert len(originals) == 4 * model.config.num_layers + 1
    assert all(original() is None for original in originals)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return resolve_model("smollm2")
    except ModelNotFound as missing:
        pytest.skip(str(missing))


def test_smollm2_equals_transformers_reading_the_same_gguf(smollm2: Path) -> None:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )
    expected_of = LlamaForCausalLM(config).eval()
    weights = load_gguf_checkpoint(str(smollm2), return_tensors=True, model_to_load=expected_of)["tensors"]
    assert expected_of.load_state_dict(weights, strict=False).missing_keys in ([], ["lm_head.weight"])
    expected_of.tie_weights()
    tokens = [
        1,
        9690,
        198,
        2683,
        359,
        253,
        5356,
        5646,
        11173,
        3365,
        3511,
        308,
        34519,
        28,
        7018,
        411,
        407,
        19712,
        8182,
        2,
        198,
        1,
        4093,
        198,
    ]
    with torch.no_grad():
        expected = expected_of(torch.tensor([tokens])).logits[0]
    pages = Pages(load("smollm2"), pages=4, page_size=32)
    torch.testing.assert_close(pages.run(tokens, [17, 6, 1]), expected, atol=1e-3, rtol=0)
    assert pages.model.config.eos_token_ids == (2,)
