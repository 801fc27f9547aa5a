"""The three places where a layer's result is spread over the ranks: sums after o and down, the embedding, and the head.

With one rank none of these is used but `Embedding`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import Linear
from .parallel import RankGroup
from .shard import Shard


class Embedding:
    """Rows of the table [vocab, hidden]."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


class VocabularyEmbedding:
    """The rows of the table that this rank has [vocab_rows, hidden]; every other token's row comes from another rank."""

    def __init__(self, table: Tensor, shard: Shard, group: RankGroup) -> None:
        self.table = table
        self._start = shard.vocab_start
        self._group = group

    def __call__(self, tokens: Tensor) -> Tensor:
        """int64 [T] -> [T, hidden], on every rank; exact, since all but one of the added rows are zeros."""
        at = tokens - self._start
        elsewhere = (at < 0) | (at >= self.table.shape[0])
        rows = self.table[at.masked_fill(elsewhere, 0)]
        return self._group.sum(rows.masked_fill_(elsewhere[:, None], 0))


class RowParallelLinear:
    """A linear whose inputs are spread over the ranks: each multiplies its own, and the products are added up."""

    def __init__(self, local: Linear, group: RankGroup) -> None:
        self.local = local
        self._group = group

    def __call__(self, x: Tensor) -> Tensor:
        """[T, inputs here] -> [T, outputs], on every rank."""
        return self._group.sum(self.local(x))


class VocabularyHead:
    """The head's rows that this rank has."""

    def __init__(self, local: Linear, shard: Shard, group: RankGroup) -> None:
        self.local = local
        self._shard = shard
        self._group = group

    def __call__(self, x: Tensor) -> Tensor:
        """[S, hidden] -> [S, vocab] at the leader; elsewhere the rank's own columns, which nobody reads."""
        own = self.local(x)
        parts = self._group.gather(own)
        if parts is None:
            return own
        last = self._shard.config.vocab_size - self._shard.vocab_rows * (len(parts) - 1)
        return torch.cat([*parts[:-1], parts[-1][:, :last]], dim=1)
