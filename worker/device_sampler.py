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

from ..kernels.sampling import MOST_COUNTED, SampleRows, sample
from .counter_rng import stream_keys
from .protocol import TokenLogprob
from .sampler import Drawn, Held, Sampler, SamplingRow, outcomes, reported
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
    """Draws the next token of every row of a batch. Not more than `staging.TURNS` drawings may be under way.

    How often a sequence with penalties holds each token is counted on the device (`SampleRows.held`): it is told once (`learn`), and the
    tokens that are drawn later never leave the device. A draw may be repeated, for a row of a step that was dropped.

    Args:
        eos_token_ids, vocab_size: of the model.
        places: sequences known at once.
        device: where.
    """

    def __init__(self, eos_token_ids: Sequence[int], vocab_size: int, places: int, device: torch.device) -> None:
        super().__init__(eos_token_ids, vocab_size)
        self._staging, self._learning = Staging(device), Staging(device)
        self._held = torch.zeros(places, vocab_size, dtype=torch.int16, device=device)
        self._counted = [0] * places  # tokens of each sequence

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[Drawn]:
        """See `Sampler.sample`."""
        if not rows:
            return []
        self.learn([Held(i, row.tokens, row.prompt_len) for i, row in enumerate(rows) if row.params.penalized])
        return self.begin(logits, rows, range(len(rows)), torch.zeros(len(rows), dtype=torch.int64, device=logits.device)).result()

    def learn(self, sequences: Sequence[Held]) -> None:
        """Sequences are new at their places. At most once a step."""
        if not sequences:
            return
        places = np.array([s.place for s in sequences], np.int64)
        vocab_size = self._held.shape[1]
        ids, values = zip(*(_held(s, vocab_size) for s in sequences), strict=True)
        cells = np.concatenate([place * vocab_size + some for place, some in zip(places, ids, strict=True)])
        rows, at, held = self._learning.upload([places, cells, np.concatenate(values)])
        self._held.index_fill_(0, rows, 0)
        self._held.view(-1).index_copy_(0, at, held)
        for s in sequences:
            self._counted[s.place] = len(s.tokens)

    def begin(self, logits: Tensor, rows: Sequence[SamplingRow], places: Sequence[int], latest: Tensor) -> Drawing:
        """Start a draw for each row. Of a row whose last token is not known yet only the number of tokens may count: see `ahead`.

        Args:
            logits: float32 [rows, vocab], rows contiguous. Overwritten.
            rows: in the order of `logits`; at least one.
            places: of their sequences, whose latest tokens are `latest[place]`, int64 on the device.
        """
        scored = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        bound = [(i, row.allowed.words) for i, row in enumerate(rows) if row.allowed is not None]
        some = [np.array(scored, np.int64), np.array([i for i, _ in bound], np.int64)]
        words = np.array([words.view(np.int32) for _, words in bound], np.int32)
        columns = [*sample_rows(rows, self._eos), np.array(places, np.int64), self._count(rows, places)]
        *on_device, chosen, masked, bits = self._staging.upload([*columns, *some, words])
        raw = logits[chosen] if scored else None
        if bound:
            logits[masked] = torch.where(_spread(bits, logits.shape[1]), logits[masked], -math.inf)
        tokens, finite = sample(logits, SampleRows(*[*on_device, self._held, latest]))
        logprobs: tuple[Tensor, ...] = ()
        if raw is not None:
            scores = torch.log_softmax(raw, dim=1)
            most = max(rows[i].params.logprobs or 0 for i in scored)
            logprobs = (scores.gather(1, tokens[chosen][:, None])[:, 0], *scores.topk(min(most, scores.shape[1]), dim=1))
        return Drawing(rows, tokens, finite, scored, logprobs)

    def _count(self, rows: Sequence[SamplingRow], places: Sequence[int]) -> Ints:
        """1 for each row with penalties that has gained a token since it was drawn for last; the device counts it."""
        gained = np.zeros(len(rows), np.int32)
        for i, (row, place) in enumerate(zip(rows, places, strict=True)):
            if row.params.penalized:
                gained[i] = len(row.tokens) > self._counted[place]
                self._counted[place] = len(row.tokens)
        return gained


def _held(of: Held, vocab_size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int16]]:
    """The different tokens of a sequence, and for each what `SampleRows.held` says."""
    prompt, output = (np.bincount(tokens, minlength=vocab_size) for tokens in np.split(of.tokens, [of.prompt_len]))
    values = 2 * np.minimum(output, MOST_COUNTED.value) + (prompt > 0)
    ids = np.flatnonzero(values)
    return ids, values[ids].astype(np.int16)


def _spread(words: Tensor, count: int) -> Tensor:
    """bool [G, count] of int32 [G, W]: bit `t % 32` of word `t // 32` at t."""
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=words.device)
    return (bits & 1).bool().flatten(1)[:, :count]


def sample_rows(rows: Sequence[SamplingRow], eos: Sequence[int]) -> list[Ints | Floats]:
    """The first fields of `SampleRows`, on the host."""
    params = [row.params for row in rows]
    biased = {i: _cells(row, eos) for i, row in enumerate(rows) if row.params.logit_bias or row.banned}  # few, as a rule
    counts = np.zeros(len(rows) + 1, np.int32)
    for i, (ids, _) in biased.items():
        counts[i + 1] = len(ids)
    return [
        np.array([p.temperature for p in params], np.float32),
        np.array([max(p.top_k, 0) for p in params], np.int32),
        np.array([p.top_p for p in params], np.float32),
        np.array([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params], np.float32),
        stream_keys([row.seed for row in rows], [row.position for row in rows]).view(np.int32),
        np.cumsum(counts, dtype=np.int32),
        *(map(np.concatenate, zip(*biased.values(), strict=True)) if biased else (np.zeros(0, np.int32), np.zeros(0, np.float32))),
        np.array([(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params], np.float32),
    ]


def _cells(row: SamplingRow, eos: Sequence[int]) -> tuple[Ints, Floats]:
    """The logits of a row that get a bias, each once: (tokens, bias)."""
    bias = row.params.logit_bias | (dict.fromkeys((*eos, *row.params.stop_token_ids), -math.inf) if row.banned else {})
    return np.array(list(bias), np.int32), np.array(list(bias.values()), np.float32)
