"""A GGUF file as a checkpoint: its metadata as a `ModelConfig`, its tensors dequantised under Hugging Face's names.

llama.cpp stores the rows of q and k of a `llama` model in another order (it rotates neighbouring dimensions, not halves);
they are put back. Sizes are held against the file before anything is read.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .generation_config import GGUF, Defaults, read_defaults
from .model_config import ModelConfig, UnsupportedModel, in_bounds
from .rope import RopeConfig, RopeKind, yarn_attention_factor
from .shard import Part
from .text.gguf_header import GgufError, GgufHeader, TensorInfo, read_header

# GGML type number -> (name, elements in a block, bytes in a block); from ggml's type table.
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    30: ("BF16", 1, 2),
    8: ("Q8_0", 32, 34),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    12: ("Q4_K", 256, 144),
    14: ("Q6_K", 256, 210),
}
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_DIVISORS = "rope_freqs.weight"
# Metadata of the same architectures that would change the result, with the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "{arch}.expert_count": (0, 1),
    "{arch}.attn_logit_softcapping": (0.0,),
    "{arch}.final_logit_softcapping": (0.0,),
    "{arch}.logit_scale": (1.0,),
    "{arch}.residual_scale": (1.0,),
    "{arch}.embedding_scale": (1.0,),
    "{arch}.attention.scale": (),
    "{arch}.attention.sliding_window_pattern": (),
    "split.count": (0, 1),
}
_PIECE_ELEMENTS = 2**17  # dequantised at once: the intermediate arrays stay in the CPU's cache, and two threads share the pieces


class GgufCheckpoint:
    """One GGUF file, memory-mapped."""

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        """Raises: UnsupportedModel."""
        self.path = path
        try:
            header = read_header(path)
        except GgufError as error:
            raise UnsupportedModel(str(error)) from None
        self._infos = {_hugging_face_name(info.name): info for info in header.tensors.values() if info.name != _ROPE_DIVISORS}
        for info in header.tensors.values():
            _check_size(info, header.file_bytes)
        self._data = np.memmap(path, np.uint8, mode="r")
        config = _config(header, set(self._infos), self._divisors(header), path.stem)
        self.config = config.matching({name: info.shape for name, info in self._infos.items()})
        self._metadata = header.metadata
        self._interleaved = header.metadata["general.architecture"] == "llama"

    def tensor(self, name: str, dtype: torch.dtype, part: Part | None = None) -> Tensor:
        """See `Checkpoint.tensor`; a part of q or k is whole heads."""
        found = self._read(self._infos[name], part)
        if self._interleaved and (".q_proj." in name or ".k_proj." in name):
            found = _halves(found, found.shape[0] // self.config.head_dim)
        return found.to(dtype)

    def sampling_defaults(self) -> Defaults:
        """See `Checkpoint.sampling_defaults`. The file's numbers have 32 bits: 0.95 is to be 0.95, as in the file that it was made from."""
        told = {key: self._metadata[key] for key in GGUF.values() if key in self._metadata}
        exact = {key: float(str(np.float32(value))) if isinstance(value, float) else value for key, value in told.items()}
        return read_defaults(exact, GGUF, self.path.name)

    def close(self) -> None:
        """See `Checkpoint.close`."""
        del self._data

    def _divisors(self, header: GgufHeader) -> tuple[float, ...]:
        info = header.tensors.get(_ROPE_DIVISORS)
        return () if info is None else tuple(self._read(info, None).tolist())

    def _read(self, info: TensorInfo, part: Part | None) -> Tensor:
        """The tensor, or the part of it, as float32. Of rows only the blocks that the part touches are dequantised."""
        _, block, block_bytes = _TYPES[info.type_id]
        columns = info.shape[-1]
        rows = prod(info.shape) // columns
        raw = self._data[info.offset : info.offset + rows * columns // block * block_bytes].reshape(rows, columns // block, block_bytes)
        if part is None:
            return _dequantised(raw, info.type_id).view(info.shape)
        if part.dim < len(info.shape) - 1:
            return _dequantised(raw[part.start : part.stop], info.type_id).view(-1, columns)
        first = part.start // block
        whole = _dequantised(raw[:, first : -(-part.stop // block)], info.type_id)
        cut = whole[:, part.start - first * block : part.stop - first * block]
        return cut.reshape(*info.shape[:-1], part.stop - part.start)


def _dequantised(raw: npt.NDArray[np.uint8], type_id: int) -> Tensor:
    """Blocks as they lie in the file [rows, blocks, bytes of a block] -> float32 [rows, columns]."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    _, block, _ = _TYPES[type_id]
    kind = GGMLQuantizationType(type_id)
    rows, blocks, block_bytes = raw.shape
    if kind == GGMLQuantizationType.F32:
        return torch.from_numpy(raw.reshape(rows, -1).view(np.float32).copy())
    out = np.empty((rows, blocks * block), np.float32)
    flat, cells = raw.reshape(-1), out.reshape(-1)  # of a part by columns, `flat` is a copy
    piece = _PIECE_ELEMENTS // block  # blocks

    def dequantise(first: int) -> None:
        some = flat[first * block_bytes : (first + piece) * block_bytes]
        cells[first * block : (first + piece) * block] = dequantize(some, kind)  # one long row: its fast case

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(dequantise, range(0, rows * blocks, piece)))
    return torch.from_numpy(out)


def _hugging_face_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None or match[2] not in _IN_LAYER:
        raise UnsupportedModel(f"tensor {name} is not supported")
    return f"model.layers.{match[1]}.{_IN_LAYER[match[2]]}.{match[3]}"


def _check_size(info: TensorInfo, file_bytes: int) -> None:
    if info.type_id not in _TYPES:
        supported = ", ".join(name for name, _, _ in _TYPES.values())
        raise UnsupportedModel(f"tensor {info.name} is of type {_type_name(info.type_id)}; supported are {supported}")
    name, block, block_bytes = _TYPES[info.type_id]
    if info.shape[-1] % block:
        raise UnsupportedModel(f"tensor {info.name} has rows of {info.shape[-1]}, not whole blocks of {name}")
    if info.offset + prod(info.shape) // block * block_bytes > file_bytes:
        raise UnsupportedModel(f"tensor {info.name} runs past the end of the file")


def _type_name(type_id: int) -> str:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(type_id).name if type_id in GGMLQuantizationType.__members__.values() else str(type_id)


def _halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head from (pair, half) order to (half, pair) order. [heads * D, ...] -> the same shape."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _config(header: GgufHeader, names: set[str], divisors: tuple[float, ...], name: str) -> ModelConfig:
    metadata = header.metadata
    arch = metadata.get("general.architecture")
    if arch not in _ARCHITECTURES:
        raise UnsupportedModel(f"architecture {arch} is not supported in GGUF; these are: {', '.join(_ARCHITECTURES)}")
    for pattern, neutral in _NEUTRAL.items():
        key = pattern.format(arch=arch)
        if key in metadata and metadata[key] not in neutral:
            raise UnsupportedModel(f"{key} = {str(metadata[key])[:200]} is not supported")

    def whole(key: str, default: int | None = None) -> int:
        value = metadata.get(f"{arch}.{key}", default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise UnsupportedModel(f"{arch}.{key} = {str(value)[:200]} is not a whole number")
        return value

    hidden, heads, layers = whole("embedding_length"), whole("attention.head_count"), in_bounds("num_layers", whole("block_count"))
    head_dim = whole("attention.key_length", hidden // max(heads, 1))
    if whole("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModel(f"{arch}.attention.value_length differs from the key length, which is not supported")
    if whole("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModel(f"{arch}.rope.dimension_count: rotating a part of a head is not supported")
    window = whole("attention.sliding_window", 0)
    if window and arch != "llama":
        raise UnsupportedModel(f"{arch}.attention.sliding_window is not supported")
    if divisors and len(divisors) != head_dim // 2:
        raise UnsupportedModel(f"{_ROPE_DIVISORS} has {len(divisors)} numbers for heads of {head_dim}")
    if f"{arch}.attention.layer_norm_rms_epsilon" not in metadata:
        raise UnsupportedModel(f"{arch}.attention.layer_norm_rms_epsilon is missing")
    tokens = (metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot"))
    embedding = header.tensors.get("token_embd.weight")
    return ModelConfig(
        architecture=_ARCHITECTURES[arch],
        vocab_size=embedding.shape[0] if embedding else whole("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=whole("feed_forward_length"),
        rms_norm_eps=float(metadata[f"{arch}.attention.layer_norm_rms_epsilon"]),
        rope=_rope(metadata, arch, whole("context_length"), divisors),
        tie_embeddings="lm_head.weight" not in names,
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in names,
        o_bias="model.layers.0.self_attn.o_proj.bias" in names,
        mlp_bias="model.layers.0.mlp.gate_proj.bias" in names,
        qk_norm="model.layers.0.self_attn.q_norm.weight" in names,
        sliding_windows=(window or None,) * layers,
        max_model_len=whole("context_length"),
        eos_token_ids=tuple(dict.fromkeys(token for token in tokens if token is not None)),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        dtype=_dtype({_TYPES[info.type_id][0] for info in header.tensors.values() if len(info.shape) > 1}),
        name=name,
    )


def _dtype(types: set[str]) -> str:
    """The type in which a GPU holds these weights: the file's, or bfloat16 for quantised ones (float16's range may be too small)."""
    if types == {"F32"}:
        return "float32"
    return "float16" if types <= {"F32", "F16"} else "bfloat16"


def _rope(metadata: dict[str, Any], arch: str, max_len: int, divisors: tuple[float, ...]) -> RopeConfig:
    scaling = f"{arch}.rope.scaling."
    theta = float(metadata.get(f"{arch}.rope.freq_base", 10_000.0))
    kind = metadata.get(f"{scaling}type", "none")
    factor = float(metadata.get(f"{scaling}factor", 1.0))
    original_len = int(metadata.get(f"{scaling}original_context_length", max_len))
    if divisors:
        if kind not in ("none", "llama3"):
            raise UnsupportedModel(f"{scaling}type = {kind} together with {_ROPE_DIVISORS} is not supported")
        return RopeConfig(theta, RopeKind.DIVISORS, divisors=divisors)
    match kind:
        case "none":
            return RopeConfig(theta)
        case "linear":
            return RopeConfig(theta, RopeKind.LINEAR, factor, max_len)
        case "yarn":
            return RopeConfig(
                theta,
                RopeKind.YARN,
                factor,
                original_len,
                beta_fast=float(metadata.get(f"{scaling}yarn_beta_fast", 32.0)),
                beta_slow=float(metadata.get(f"{scaling}yarn_beta_slow", 1.0)),
                attention_factor=yarn_attention_factor(factor) * float(metadata.get(f"{scaling}yarn_attn_factor", 1.0)),
            )
    raise UnsupportedModel(f"{scaling}type = {kind} is not supported")
