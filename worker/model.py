"""The decoder, for every model of the Llama family: embedding, layers of attention and MLP, final norm, head.

It is driven by `ModelConfig` alone; what differs between the models (biases, q/k norm, windows, tied head) is data. How a
linear is stored and multiplied is `make_linear`'s business, how attention reads pages that of `ops`, and which part of the
weights a rank has `Shard`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.layout import AttentionBatch
from .kv_store import KVStore
from .linear import Linear, MakeLinear, tensors_of
from .model_config import ModelConfig
from .parallel import RankGroup
from .parallel_layers import Embedding, RowParallelLinear, VocabularyEmbedding, VocabularyHead
from .rope import cos_sin_table
from .shard import Shard
from .weights import Checkpoint

Progress = Callable[[int, int], None]  # bytes of weights done, bytes in all


class Ops(Protocol):
    """The kernels; `quire.kernels.reference` says what each computes."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...

    def rope_and_write_kv(
        self,
        qkv: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        pages: Tensor,
        slots: Tensor,
        num_heads: int,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Tensor: ...

    def paged_attention(self, q: Tensor, pages: Tensor, batch: AttentionBatch, scale: float, sliding_window: int | None) -> Tensor: ...

    def silu_mul(self, gate_up: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor
    qkv: Linear  # rows of q, k and v in one product
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_norm: Tensor
    gate_up: Linear  # rows of gate and up in one product
    down: Linear
    sliding_window: int | None


class DecoderModel:
    """Weights on one device, and the forward pass over a step's tokens."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        device: torch.device | str,
        dtype: torch.dtype,
        make_linear: MakeLinear,
        ops: Ops,
        progress: Progress | None = None,
        group: RankGroup | None = None,
    ) -> None:
        """Reads every weight, or this rank's part; a linear's original copy is dropped as soon as `make_linear` has packed it.

        `group` are the ranks that share the model; None when there is only this one. All run the same calls in the same order.

        Raises:
            UnsupportedModel: the model does not divide by the ranks; nothing has been read.
        """
        self.config = config
        self.shard = Shard(config, group.rank, group.size) if group else Shard(config)
        self._ops = ops
        self._scale = config.head_dim**-0.5
        loader = _Loader(checkpoint, self.shard, torch.device(device), dtype, make_linear, progress, group)
        table = loader.vocabulary("model.embed_tokens.weight")
        self._embedding = VocabularyEmbedding(table, self.shard, group) if group else Embedding(table)
        self._layers = [loader.layer(index) for index in range(config.num_layers)]
        self._final_norm = loader.tensor("model.norm.weight")
        head = make_linear(table if config.tie_embeddings else loader.vocabulary("lm_head.weight"), None)
        self._head = VocabularyHead(head, self.shard, group) if group else head
        self._cos_sin = cos_sin_table(config.rope, config.head_dim, config.max_model_len, device)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, positions: Tensor, batch: AttentionBatch, kv: KVStore) -> Tensor:
        """Compute T tokens and store their keys and values.

        Args:
            tokens: int64 [T].
            positions: int64 [T].
            batch: whose tokens they are, and where their pages lie.
            kv: written at `batch.slots`, read through `batch.block_tables`.

        Returns:
            [T, hidden], before the final norm; `logits` takes the rows that are needed.
        """
        ops, config = self._ops, self.config
        stream = self._embedding(tokens)
        x = ops.rms_norm(stream, self._layers[0].input_norm, config.rms_norm_eps)
        for index, layer in enumerate(self._layers):
            if index:
                x, stream = ops.add_rms_norm(x, stream, layer.input_norm, config.rms_norm_eps)
            pages = kv.layer(index)
            q = ops.rope_and_write_kv(
                layer.qkv(x),
                positions,
                self._cos_sin,
                pages,
                batch.slots,
                self.shard.num_heads,
                layer.q_norm,
                layer.k_norm,
                config.rms_norm_eps,
            )
            attended = ops.paged_attention(q, pages, batch, self._scale, layer.sliding_window)
            x, stream = ops.add_rms_norm(layer.o(attended.flatten(1)), stream, layer.post_norm, config.rms_norm_eps)
            x = layer.down(ops.silu_mul(layer.gate_up(x)))
        return x + stream

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token. Rows of `forward`'s result [S, hidden] -> float32 [S, vocab]; of several ranks only the leader's."""
        return self._head(self._ops.rms_norm(hidden, self._final_norm, self.config.rms_norm_eps)).float()

    def weight_bytes(self) -> int:
        """Memory that the weights take on this rank as they are kept: packed, and a tied table twice where packing copies it."""
        return sum({id(t) if t.is_mkldnn else t.data_ptr(): t.nbytes for t in self._tensors()}.values())

    def _tensors(self) -> Iterator[Tensor]:
        yield from (self._embedding.table, self._final_norm)
        yield from tensors_of(self._head)
        for layer in self._layers:
            yield from (t for t in (layer.input_norm, layer.q_norm, layer.k_norm, layer.post_norm) if t is not None)
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
                yield from tensors_of(linear)


class _Loader:
    """Takes a rank's tensors from a checkpoint to the device, layer by layer, and counts."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        shard: Shard,
        device: torch.device,
        dtype: torch.dtype,
        make_linear: MakeLinear,
        progress: Progress | None,
        group: RankGroup | None,
    ) -> None:
        self.checkpoint = checkpoint
        self.shard = shard
        self.device = device
        self.dtype = dtype
        self.make_linear = make_linear
        self.progress = progress
        self.group = group
        self.shapes = shard.shapes()
        self.done_bytes = 0
        self.total_bytes = sum(map(prod, self.shapes.values())) * dtype.itemsize

    def tensor(self, name: str) -> Tensor:
        found = self.checkpoint.tensor(name, self.dtype, self.shard.part(name)).to(self.device)
        self.done_bytes += found.nbytes
        if self.progress is not None:
            self.progress(self.done_bytes, self.total_bytes)
        return found

    def optional(self, name: str) -> Tensor | None:
        return self.tensor(name) if name in self.shapes else None

    def vocabulary(self, name: str) -> Tensor:
        """The rank's rows of embedding or head; the last rank's are filled up with zeros."""
        rows = self.tensor(name)
        missing = self.shard.vocab_rows - rows.shape[0]
        return F.pad(rows, (0, 0, 0, missing)) if missing else rows

    def linear(self, *names: str) -> Linear:
        """The linears `names`, which read the same input, as one: their rows one after the other."""
        weight = self._joined([self.tensor(f"{name}.weight") for name in names])
        biased = f"{names[0]}.bias" in self.shapes
        return self.make_linear(weight, self._joined([self.tensor(f"{name}.bias") for name in names]) if biased else None)

    def summed(self, name: str) -> Linear:
        """A linear whose inputs the ranks share out."""
        local = self.linear(name)
        return RowParallelLinear(local, self.group) if self.group else local

    @staticmethod
    def _joined(parts: list[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def layer(self, index: int) -> _Layer:
        prefix = f"model.layers.{index}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        return _Layer(
            input_norm=self.tensor(f"{prefix}input_layernorm.weight"),
            qkv=self.linear(f"{attention}q_proj", f"{attention}k_proj", f"{attention}v_proj"),
            q_norm=self.optional(f"{attention}q_norm.weight"),
            k_norm=self.optional(f"{attention}k_norm.weight"),
            o=self.summed(f"{attention}o_proj"),
            post_norm=self.tensor(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self.linear(f"{mlp}gate_proj", f"{mlp}up_proj"),
            down=self.summed(f"{mlp}down_proj"),
            sliding_window=self.checkpoint.config.sliding_windows[index],
        )
