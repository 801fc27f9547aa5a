"""What a model is: the one description that the decoder is driven by, and the tensors that follow from it.

`hf_config` and `gguf_weights` make it from what a checkpoint says of itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .rope import RopeConfig, RopeKind

_HEAD = "lm_head.weight"
_RECOMPUTED = "rotary_emb.inv_freq"  # old checkpoints carry it; the table is computed from the configuration
_MOST = {"num_layers": 4096, "max_model_len": 2**24}  # these size tables before any weight confirms them
_DTYPES = ("float32", "bfloat16", "float16")


class UnsupportedModel(ValueError):
    """The model needs something that is not implemented, or its files contradict each other; the message names it."""


def in_bounds(name: str, value: int) -> int:
    """`value`, when it can be the size that `ModelConfig` calls `name`. Raises: UnsupportedModel."""
    if not 1 <= value <= _MOST.get(name, 2**31):
        raise UnsupportedModel(f"{name} is {value}")
    return value


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of the Llama family. Lengths in tokens, sizes in elements.

    Attributes:
        architecture: Hugging Face's class name.
        qkv_bias, o_bias, mlp_bias: which linears add a bias.
        qk_norm: RMSNorm of each head's query and key before rotation.
        sliding_windows: for each layer, how many keys a token sees at most (itself included), or None for all.
        max_model_len: longest sequence served.
        dtype: of the checkpoint: "float32", "bfloat16" or "float16".
        name: what the API calls it.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str
    name: str

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "max_model_len")
        for name in sizes:
            in_bounds(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModel(f"{self.num_heads} attention heads do not divide into {self.num_kv_heads} KV heads")
        if self.head_dim % 2:
            raise UnsupportedModel(f"head_dim {self.head_dim} is odd, so it cannot be rotated in pairs")
        if self.dtype not in _DTYPES:
            raise UnsupportedModel(f"weights of type {self.dtype} are not supported; these are: {', '.join(_DTYPES)}")
        if any(not 0 <= token < self.vocab_size for token in self.eos_token_ids):
            raise UnsupportedModel(f"eos_token_id {self.eos_token_ids} is outside the vocabulary of {self.vocab_size}")

    def serving(self, max_model_len: int | None, name: str | None) -> ModelConfig:
        """This model under `name`, with sequences up to `max_model_len`; None keeps what the checkpoint says.

        The checkpoint's length is the default; a rope that stretches (linear, dynamic, yarn) lets it be raised that far.

        Raises:
            UnsupportedModel: longer than the model's positions reach.
        """
        length = self.max_model_len if max_model_len is None else max_model_len
        stretches = self.rope.kind in (RopeKind.LINEAR, RopeKind.DYNAMIC, RopeKind.YARN)
        longest = max(self.max_model_len, int(self.rope.factor * self.rope.original_len)) if stretches else self.max_model_len
        if length > longest:
            raise UnsupportedModel(f"max_model_len {length} is more than the {longest} positions that the model has")
        windows = tuple(None if window is None or window >= length else window for window in self.sliding_windows)
        return replace(self, max_model_len=length, name=name or self.name, sliding_windows=windows)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the model reads, by Hugging Face name, with its shape."""
        hidden, inner = self.hidden_size, self.intermediate_size
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden), "model.norm.weight": (hidden,)}
        if not self.tie_embeddings:
            found["lm_head.weight"] = (self.vocab_size, hidden)
        linears = {
            "self_attn.q_proj": (heads, hidden, self.qkv_bias),
            "self_attn.k_proj": (kv_heads, hidden, self.qkv_bias),
            "self_attn.v_proj": (kv_heads, hidden, self.qkv_bias),
            "self_attn.o_proj": (hidden, heads, self.o_bias),
            "mlp.gate_proj": (inner, hidden, self.mlp_bias),
            "mlp.up_proj": (inner, hidden, self.mlp_bias),
            "mlp.down_proj": (hidden, inner, self.mlp_bias),
        }
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            for name in ("input_layernorm", "post_attention_layernorm"):
                found[f"{prefix}{name}.weight"] = (hidden,)
            for name in ("q_norm", "k_norm") if self.qk_norm else ():
                found[f"{prefix}self_attn.{name}.weight"] = (self.head_dim,)
            for name, (rows, columns, bias) in linears.items():
                found[f"{prefix}{name}.weight"] = (rows, columns)
                if bias:
                    found[f"{prefix}{name}.bias"] = (rows,)
        return found

    def matching(self, found: Mapping[str, tuple[int, ...]]) -> ModelConfig:
        """This model, once the checkpoint's tensors (name -> shape) prove to be its; the head is tied when there is none of its own.

        Raises:
            UnsupportedModel: a tensor is missing, has another shape, or would be ignored though the checkpoint has it.
        """
        config = replace(self, tie_embeddings=self.tie_embeddings or _HEAD not in found)
        wanted = config.shapes()
        for name, shape in wanted.items():
            if name not in found:
                raise UnsupportedModel(f"the checkpoint has no tensor {name}")
            if found[name] != shape:
                raise UnsupportedModel(f"tensor {name} has shape {list(found[name])}, the configuration says {list(shape)}")
        for name in found:
            if name not in wanted and name != _HEAD and not name.endswith(_RECOMPUTED):
                raise UnsupportedModel(f"the checkpoint's tensor {name} has no place in {self.architecture}")
        return config
