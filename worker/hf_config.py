"""Reads a Hugging Face config.json, in the form of transformers 5 and the one before, without transformers (slow to import).

Whatever would change the computation and is not implemented is refused by name here, before a weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .generation_config import HUGGING_FACE, Defaults, read_defaults
from .model_config import ModelConfig, UnsupportedModel, in_bounds
from .rope import RopeConfig, RopeKind, yarn_attention_factor

_GENERATION = "generation_config.json"
# What transformers assumes where a config.json is silent.
_COMMON = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "head_dim": None, "tie_word_embeddings": False, "sliding_window": None}
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"num_key_value_heads": None, "max_position_embeddings": 2048},
    "MistralForCausalLM": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "Qwen2ForCausalLM": _QWEN,
    "Qwen3ForCausalLM": {**_QWEN, "head_dim": 128},
}
# Keys of other models of the family that would change the result, with the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
}


def read_config(directory: Path) -> ModelConfig:
    """The model in `directory` (config.json, generation_config.json); `name` is the directory's.

    Raises:
        UnsupportedModel: something in config.json is not implemented, missing or not a number.
    """
    return parse_config(read_json(directory / "config.json"), _generation_config(directory), directory.name)


def read_generation_defaults(directory: Path) -> Defaults:
    """The defaults of sampling parameters in generation_config.json; none without the file. Raises: ValueError."""
    return read_defaults(_generation_config(directory), HUGGING_FACE, _GENERATION)


def _generation_config(directory: Path) -> dict[str, Any]:
    path = directory / _GENERATION
    return read_json(path) if path.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file. Raises: UnsupportedModel."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UnsupportedModel(f"{path.name} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UnsupportedModel(f"{path.name} is not a JSON object")
    return found


def parse_config(raw: Mapping[str, Any], generation: Mapping[str, Any], name: str) -> ModelConfig:
    """`read_config` on values already parsed."""
    architecture = (raw.get("architectures") or [f"model_type {raw.get('model_type')}"])[0]
    if architecture not in _ARCHITECTURES:
        raise UnsupportedModel(f"architecture {architecture} is not supported; these are: {', '.join(_ARCHITECTURES)}")
    config = {**_COMMON, **_ARCHITECTURES[architecture], **raw}
    for key, neutral in _NEUTRAL.items():
        if config.get(key) not in neutral:
            raise UnsupportedModel(f"{key} = {json.dumps(config[key])[:200]} is not supported")
    if config["sliding_window"] is not None:
        _int(config, "sliding_window")
    if config["hidden_act"] not in ("silu", "swish"):
        raise UnsupportedModel(f"hidden_act = {config['hidden_act']} is not supported, only silu is")
    num_layers, num_heads, hidden_size = (_int(config, key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    in_bounds("num_layers", num_layers)
    attention_bias = bool(config.get("attention_bias")) and architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    max_len = _int(config, "max_position_embeddings")
    return ModelConfig(
        architecture=architecture,
        vocab_size=_int(config, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads if config["num_key_value_heads"] is None else _int(config, "num_key_value_heads"),
        head_dim=hidden_size // max(num_heads, 1) if config["head_dim"] is None else _int(config, "head_dim"),
        intermediate_size=_int(config, "intermediate_size"),
        rms_norm_eps=float(config["rms_norm_eps"]),
        rope=_rope(config, max_len),
        tie_embeddings=bool(config["tie_word_embeddings"]),
        qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
        o_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias")) and architecture == "LlamaForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_windows=_sliding_windows(config, architecture, num_layers),
        max_model_len=max_len,
        eos_token_ids=_token_ids("eos_token_id", generation, config),
        bos_token_id=next(iter(_token_ids("bos_token_id", generation, config)), None),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        name=name,
    )


def _int(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UnsupportedModel(f"{key} = {value!r} in config.json is not a whole number")
    return value


def _token_ids(key: str, *places: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids under `key` in the first place that has any."""
    for place in places:
        value = place.get(key)
        if value is not None:
            return tuple(int(token) for token in (value if isinstance(value, list) else [value]))
    return ()


def _sliding_windows(config: Mapping[str, Any], architecture: str, num_layers: int) -> tuple[int | None, ...]:
    window, layer_types = config["sliding_window"], config.get("layer_types")
    if architecture.startswith("Qwen"):
        if not config.get("use_sliding_window"):
            window = None
        if layer_types is None:
            first = _int(config, "max_window_layers")
            layer_types = ["full_attention"] * min(first, num_layers) + ["sliding_attention"] * (num_layers - first)
        if len(layer_types) != num_layers or not set(layer_types) <= {"full_attention", "sliding_attention"}:
            raise UnsupportedModel(f"layer_types = {json.dumps(layer_types)[:200]} is not supported")
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    if window is not None and architecture != "MistralForCausalLM":
        raise UnsupportedModel(f"sliding_window in {architecture} is not supported")
    if layer_types is not None and len(set(layer_types)) > 1:
        raise UnsupportedModel(f"layer_types in {architecture} are not supported")
    return (window,) * num_layers


def _rope(config: Mapping[str, Any], max_len: int) -> RopeConfig:
    """Both forms: `rope_parameters` (transformers 5), and `rope_theta` beside `rope_scaling` (before)."""
    raw: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if any(isinstance(value, dict) for value in raw.values()):
        raise UnsupportedModel("rope_parameters for each layer type are not supported")
    if raw.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UnsupportedModel(f"partial_rotary_factor = {raw['partial_rotary_factor']} is not supported")
    theta = float(raw.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    kind = raw.get("rope_type") or raw.get("type") or "default"
    original_len = int(config.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings") or max_len)
    try:
        match kind:
            case "default":
                return RopeConfig(theta)
            case "linear":
                return RopeConfig(theta, RopeKind.LINEAR, float(raw["factor"]), max_len)
            case "dynamic":
                return RopeConfig(theta, RopeKind.DYNAMIC, float(raw["factor"]), max_len)
            case "llama3":
                low, high = float(raw["low_freq_factor"]), float(raw["high_freq_factor"])
                return RopeConfig(theta, RopeKind.LLAMA3, float(raw["factor"]), original_len, low, high)
            case "yarn":
                return _yarn(raw, theta, original_len, max_len)
    except KeyError as missing:
        raise UnsupportedModel(f"rope type {kind} without {missing.args[0]}") from None
    raise UnsupportedModel(f"rope type {kind} is not supported")


def _yarn(raw: Mapping[str, Any], theta: float, original_len: int, max_len: int) -> RopeConfig:
    factor = float(raw.get("factor") or max_len / original_len)
    attention_factor = raw.get("attention_factor")
    if attention_factor is None:
        attention_factor = yarn_attention_factor(factor, raw.get("mscale"), raw.get("mscale_all_dim"))
    return RopeConfig(
        theta,
        RopeKind.YARN,
        factor,
        original_len,
        beta_fast=float(raw.get("beta_fast") or 32),
        beta_slow=float(raw.get("beta_slow") or 1),
        truncate=bool(raw.get("truncate", True)),
        attention_factor=float(attention_factor),
    )
