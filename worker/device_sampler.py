"""The sampler for a GPU: the same tokens as `Sampler`, drawn by one kernel for the whole batch (`kernels.sampling`).

`begin` puts the work on the device and returns; the tokens are there for the next step before the host has seen them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..kernels.sampling import SampleRows, sample
from .counter_rng import stream_keys
from .protocol import TokenLogprob
from .sampler import Drawn, Sampler, SamplingRow, outcomes, reported
from .staging import Answer, Staging

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


class Drawing:
    """Tokens that are being drawn: `tokens` int64 [rows], on the device."""

    def __init__(
        self, rows: Sequence[SamplingRow], tokens: Tensor, finite: Tensor, scored: list[int], logprobs: tuple[Tensor, ...]
    ) -> None:
        self.tokens = tokens
        self._rows = rows
        self._scored = scored
        self._tops = [rows[i].params.logprobs or 0 for i in scored]
        self._answer = Answer(tokens, finite, *logprobs)

    def result(self) -> list[Drawn]:
        """What each row drew. Waits for the device."""
        tokens, finite, *logprobs = self._answer.wait()
        drawn = outcomes(self._rows, tokens, finite)
        if self._scored:
            for i, top, own, values, ids in zip(self._scored, self._tops, *logprobs, strict=True):
                if drawn[i].error is None:
                    best = tuple((t, reported(v)) for t, v in zip(ids[:top], values[:top], strict=True))
                    drawn[i] = drawn[i]._replace(logprob=TokenLogprob(tokens[i], reported(own), best))
        return drawn


class DeviceSampler(Sampler):
    """Draws the next token of every row of a batch. Not more than `staging.TURNS` drawings may be under way."""

    def __init__(self, eos_token_ids: Sequence[int], vocab_size: int, device: torch.device) -> None:
        super().__init__(eos_token_ids, vocab_size)
        self._staging = Staging(device)

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[Drawn]:
        """See `Sampler.sample`."""
        return self.begin(logits, rows).result() if rows else []

    def begin(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Drawing:
        """Start a draw for each row. Of a row whose last token is not known yet only the number of tokens may count: see `ahead`.

        Args:
            logits: float32 [rows, vocab], rows contiguous. Overwritten.
            rows: in the order of `logits`; at least one.
        """
        scored = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        bound = [(i, row.allowed.words) for i, row in enumerate(rows) if row.allowed is not None]
        places = [np.array(scored, np.int64), np.array([i for i, _ in bound], np.int64)]
        words = np.array([words.view(np.int32) for _, words in bound], np.int32)
        *columns, chosen, masked, bits = self._staging.upload([*sample_rows(rows, self._eos), *places, words])
        raw = logits[chosen] if scored else None
        if bound:
            logits[masked] = torch.where(_spread(bits, logits.shape[1]), logits[masked], -math.inf)
        tokens, finite = sample(logits, SampleRows(*columns))
        logprobs: tuple[Tensor, ...] = ()
        if raw is not None:
            scores = torch.log_softmax(raw, dim=1)
            most = max(rows[i].params.logprobs or 0 for i in scored)
            logprobs = (scores.gather(1, tokens[chosen][:, None])[:, 0], *scores.topk(min(most, scores.shape[1]), dim=1))
        return Drawing(rows, tokens, finite, scored, logprobs)


def _spread(words: Tensor, count: int) -> Tensor:
    """bool [G, count] of int32 [G, W]: bit `t % 32` of word `t // 32` at t."""
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=words.device)
    return (bits & 1).bool().flatten(1)[:, :count]


def sample_rows(rows: Sequence[SamplingRow], eos: Sequence[int]) -> list[Ints | Floats]:
    """The fields of `SampleRows`, on the host."""
    params = [row.params for row in rows]
    edited = {i: _cells(row, eos) for i, row in enumerate(rows) if _is_edited(row)}  # few, as a rule
    counts = np.zeros(len(rows) + 1, np.int32)
    for i, (ids, *_) in edited.items():
        counts[i + 1] = len(ids)
    return [
        np.array([p.temperature for p in params], np.float32),
        np.array([max(p.top_k, 0) for p in params], np.int32),
        np.array([p.top_p for p in params], np.float32),
        np.array([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params], np.float32),
        stream_keys([row.seed for row in rows], [row.position for row in rows]).view(np.int32),
        np.cumsum(counts, dtype=np.int32),
        *(map(np.concatenate, zip(*edited.values(), strict=True)) if edited else _NO_CELLS),
    ]


_NO_CELLS = np.zeros(0, np.int32), *(np.zeros(0, np.float32) for _ in range(3))


def _is_edited(row: SamplingRow) -> bool:
    return row.params.penalized or bool(row.params.logit_bias) or row.banned


def _cells(row: SamplingRow, eos: Sequence[int]) -> tuple[Ints, Floats, Floats, Floats]:
    """The logits of a row that are edited, each once: (tokens, bias, repetition, penalty), as `SampleRows` has them."""
    p = row.params
    banned = [*eos, *p.stop_token_ids] if row.banned else []
    said, _ = _counted(row.tokens if p.repetition_penalty != 1.0 else row.tokens[:0])
    counted = p.presence_penalty or p.frequency_penalty
    seen, counts = _counted(row.tokens[row.prompt_len :] if counted else row.tokens[:0])
    ids, _ = _counted(np.concatenate((np.array([*p.logit_bias, *banned], np.int32), seen, said)))
    bias, repetition, penalty = np.zeros(len(ids), np.float32), np.ones(len(ids), np.float32), np.zeros(len(ids), np.float32)
    bias[np.searchsorted(ids, list(p.logit_bias))] = list(p.logit_bias.values())
    bias[np.searchsorted(ids, banned)] = -math.inf
    repetition[np.searchsorted(ids, said)] = p.repetition_penalty
    penalty[np.searchsorted(ids, seen)] = counts * p.frequency_penalty + p.presence_penalty
    return ids, bias, repetition, penalty


def _counted(tokens: Ints) -> tuple[Ints, npt.NDArray[np.intp]]:
    """The different ones, sorted, and how often each occurs: `np.unique`, several times as fast for some thousands."""
    ordered = np.sort(tokens)
    starts = np.flatnonzero(np.concatenate((np.ones(min(len(ordered), 1), bool), ordered[1:] != ordered[:-1])))
    return ordered[starts], np.diff(np.append(starts, len(ordered)))
