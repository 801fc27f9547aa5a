"""What of a model one tensor-parallel rank holds: which heads, which rows or columns of which tensor.

q, k, v, gate and up are cut by rows (outputs), o and down by columns (inputs), embedding and head by the vocabulary. Norms are
whole on every rank. With fewer KV heads than ranks each rank holds the one that its query heads read, so several hold the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .model_config import ModelConfig, UnsupportedModel

_VOCABULARY = ("embed_tokens", "lm_head")
_ROW_PARALLEL = ("o_proj", "down_proj")  # their outputs are sums over the ranks


class Part(NamedTuple):
    """The indices [start, stop) of a tensor's dimension `dim`; all of the others."""

    dim: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of `size` ranks that share `config`'s model.

    Raises:
        UnsupportedModel: the model does not divide by `size`; names `tp`.
    """

    config: ModelConfig
    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        model, size = self.config, self.size
        for what, count in (("attention heads", model.num_heads), ("elements of the MLP", model.intermediate_size)):
            if count % size:
                raise UnsupportedModel(f"tp: {count} {what} do not divide by {size} ranks")
        if model.num_kv_heads % size and size % model.num_kv_heads:
            raise UnsupportedModel(f"tp: {model.num_kv_heads} KV heads divide by {size} ranks neither, nor {size} by them")
        if (size - 1) * self.vocab_rows >= model.vocab_size:
            raise UnsupportedModel(f"tp: a vocabulary of {model.vocab_size} leaves nothing to the last of {size} ranks")

    @property
    def num_heads(self) -> int:
        """Query heads here."""
        return self.config.num_heads // self.size

    @property
    def num_kv_heads(self) -> int:
        """KV heads here, those included that other ranks hold too."""
        return max(self.config.num_kv_heads // self.size, 1)

    @property
    def vocab_rows(self) -> int:
        """Rows of embedding and head on every rank; the last one's may end with padding."""
        return -(-self.config.vocab_size // self.size)

    @property
    def vocab_start(self) -> int:
        """The token id of the first such row."""
        return self.rank * self.vocab_rows

    def part(self, name: str) -> Part | None:
        """What this rank holds of the tensor that Hugging Face calls `name`; None for all of it."""
        if self.size == 1:
            return None
        _, module, kind = ("", *name.split("."))[-3:]
        head_dim = self.config.head_dim
        inner = self.config.intermediate_size // self.size
        match module:
            case "q_proj":
                return self._nth(0, self.num_heads * head_dim)
            case "k_proj" | "v_proj":
                first = self.rank * self.config.num_kv_heads // self.size * head_dim
                return Part(0, first, first + self.num_kv_heads * head_dim)
            case "gate_proj" | "up_proj":
                return self._nth(0, inner)
            case "o_proj" if kind == "weight":
                return self._nth(1, self.num_heads * head_dim)
            case "down_proj" if kind == "weight":
                return self._nth(1, inner)
            case _ if module in _VOCABULARY:
                return Part(0, self.vocab_start, min(self.vocab_start + self.vocab_rows, self.config.vocab_size))
        return None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that this rank reads, by Hugging Face name, with the shape of its part."""
        found = {}
        for name, shape in self.config.shapes().items():
            if self.rank and name.endswith(".bias") and name.split(".")[-2] in _ROW_PARALLEL:
                continue  # the sum over the ranks has it once
            part = self.part(name)
            found[name] = shape if part is None else (*shape[: part.dim], part.stop - part.start, *shape[part.dim + 1 :])
        return found

    def _nth(self, dim: int, count: int) -> Part:
        return Part(dim, self.rank * count, (self.rank + 1) * count)
