"""config.json: what each architecture makes of it, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import SIZES
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from quire.worker.hf_config import parse_config, read_config
from quire.worker.model_config import ModelConfig, UnsupportedModel


def written(directory: Path, config: PretrainedConfig, architecture: str) -> ModelConfig:
    """As transformers saves a config, which leaves out some of the defaults."""
    config.architectures = [architecture]
    config.save_pretrained(directory)
    return read_config(directory)


@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_defaults_are_transformers(config: type[PretrainedConfig], tmp_path: Path) -> None:
    name = config.__name__.replace("Config", "ForCausalLM")
    expected = config()
    for found in (written(tmp_path, config(), name), parse_config(minimal(name, expected), {}, "m")):
        assert found.num_kv_heads == expected.num_key_value_heads
        assert found.head_dim == (getattr(expected, "head_dim", None) or expected.hidden_size // expected.num_attention_heads)
        assert found.max_model_len == expected.max_position_embeddings
        assert found.rms_norm_eps == expected.rms_norm_eps
        assert found.rope.theta == expected.rope_parameters["rope_theta"]
        assert found.tie_embeddings is expected.tie_word_embeddings is False
        assert found.sliding_windows == (expected.sliding_window if name.startswith("Mistral") else None,) * found.num_layers


def minimal(name: str, config: PretrainedConfig) -> dict[str, Any]:
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return {"architectures": [name]} | {key: getattr(config, key) for key in needed}


def llama(**changes: Any) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], **SIZES, **changes}


@pytest.mark.parametrize(
    ("raw", "generation", "eos", "bos"),
    [
        (llama(eos_token_id=2, bos_token_id=1), {}, (2,), 1),
        (llama(eos_token_id=[4, 5]), {}, (4, 5), None),
        (llama(eos_token_id=2), {"eos_token_id": [7, 8], "bos_token_id": 0}, (7, 8), 0),
        (llama(eos_token_id=2), {"eos_token_id": None}, (2,), None),
        (llama(), {}, (), None),
    ],
)
def test_end_of_sequence_ids(raw: dict[str, Any], generation: dict[str, Any], eos: tuple[int, ...], bos: int | None) -> None:
    found = parse_config(raw, generation, "m")
    assert (found.eos_token_ids, found.bos_token_id) == (eos, bos)


@pytest.mark.parametrize(("key", "value"), [("dtype", "bfloat16"), ("torch_dtype", "bfloat16")])
def test_the_type_of_the_weights_has_two_names(key: str, value: str) -> None:
    assert parse_config(llama(**{key: value}), {}, "m").dtype == "bfloat16"


def test_windows_by_layer() -> None:
    qwen = {**llama(), "architectures": ["Qwen2ForCausalLM"], "sliding_window": 9, "max_window_layers": 2}
    assert parse_config(qwen, {}, "m").sliding_windows == (None, None, None)
    assert parse_config(qwen | {"use_sliding_window": True}, {}, "m").sliding_windows == (None, None, 9)
    found = parse_config(qwen | {"use_sliding_window": True, "max_window_layers": 0}, {}, "m")
    assert found.sliding_windows == (9, 9, 9)
    assert found.serving(9, None).sliding_windows == (None, None, None)  # nothing slides within nine tokens
    assert found.serving(10, None).sliding_windows == (9, 9, 9)


def test_lengths_reach_as_far_as_the_rope_stretches() -> None:
    def longest(**rope: Any) -> ModelConfig:
        return parse_config(llama(rope_parameters={"rope_theta": 1e4, **rope}), {}, "m")

    assert longest(rope_type="linear", factor=2.0).serving(None, None).max_model_len == 64
    assert longest(rope_type="linear", factor=2.0).serving(128, None).max_model_len == 128
    yarn = longest(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
    assert yarn.serving(128, None).max_model_len == 128
    for config in (yarn, longest(rope_type="dynamic", factor=2.0)):
        with pytest.raises(UnsupportedModel, match="129 is more than the 128"):
            config.serving(129, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "architecture MixtralForCausalLM is not supported"),
        ({"architectures": None, "model_type": "gemma"}, "architecture model_type gemma"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu"),
        ({"quantization_config": {"quant_method": "awq"}}, 'quantization_config = {"quant_method": "awq"}'),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope type longrope is not supported"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "rope type llama3 without low_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters for each layer type"),
        ({"sliding_window": 8}, "sliding_window in LlamaForCausalLM"),
        ({"hidden_size": "32"}, "hidden_size = '32'"),
        ({"hidden_size": None}, "hidden_size = None"),
        ({"num_key_value_heads": 3}, "4 attention heads do not divide into 3 KV heads"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"num_hidden_layers": 10**9}, "num_layers is 1000000000"),
        ({"max_position_embeddings": 2**40}, "max_model_len is 1099511627776"),
        ({"eos_token_id": 97}, r"eos_token_id \(97,\) is outside the vocabulary of 97"),
        ({"torch_dtype": "float8_e4m3fn"}, "weights of type float8_e4m3fn"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        parse_config(llama(**changes), {}, "m")


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "MistralForCausalLM"])
def test_layer_types_that_are_not_known_are_refused(architecture: str) -> None:
    raw = llama(layer_types=["full_attention", "chunked_attention", "full_attention"]) | {"architectures": [architecture]}
    with pytest.raises(UnsupportedModel, match="layer_types"):
        parse_config(raw, {}, "m")


@pytest.mark.parametrize(("text", "message"), [("{", "config.json is not JSON"), ("[1]", "config.json is not a JSON object")])
def test_config_that_is_not_an_object(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedModel, match=message):
        read_config(tmp_path)


def test_name_is_the_directorys(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(llama()))
    assert read_config(tmp_path / "mine").name == "mine"
