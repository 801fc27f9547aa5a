"""From logits to tokens, for a whole batch: bias, penalties, temperature, filters, the draw, and log-probabilities.

The order is vLLM's: what the grammar allows, logit_bias, min_tokens, penalties, then greedy, or temperature, min_p, top_k, top_p and the
draw. Log-probabilities are those before all of it.
A row's token depends on that row's logits, tokens, parameters, seed and position, never on the rows beside it. A row
whose logits are not finite gets an error; the other rows do not notice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .constraint import Allowed
from .counter_rng import draw, stream_keys
from .nucleus import floors, leaders
from .protocol import SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5  # a temperature this small cannot be told from greedy in float32
LEAST_LOGPROB = -9999.0  # reported in place of -inf, which JSON lacks
NOT_FINITE = "the model's logits are not finite"


class SamplingRow(NamedTuple):
    """What the sampler must know of one sequence whose next token it draws."""

    params: SamplingParams
    seed: int  # in [0, 2**64)
    position: int  # index in the sequence of the token being drawn, prompt included
    prompt_len: int
    tokens: npt.NDArray[np.int32]  # prompt and output so far
    allowed: Allowed | None = None  # by its grammar

    @property
    def banned(self) -> bool:
        """Whether tokens that end it are out of the question. A grammar has seen to that itself."""
        return self.allowed is None and len(self.tokens) - self.prompt_len < self.params.min_tokens


class Held(NamedTuple):
    """What a sequence holds, for a sampler that counts on from there."""

    place: int  # where its counts are kept
    tokens: npt.NDArray[np.int32]  # prompt and output so far
    prompt_len: int


class Drawn(NamedTuple):
    """The token of one row; `token` means nothing when there is an `error`."""

    token: int
    logprob: TokenLogprob | None = None
    error: str | None = None


class Sampler:
    """Draws the next token of every row of a batch. Keeps no state between calls."""

    def __init__(self, eos_token_ids: Sequence[int], vocab_size: int) -> None:
        self._eos = tuple(token for token in eos_token_ids if 0 <= token < vocab_size)

    def sample(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[Drawn]:
        """Draw one token for each row.

        Args:
            logits: float32 [rows, vocab] on any device, rows contiguous. Used as scratch space: overwritten.
            rows: in the order of `logits`.
        """
        if not rows:
            return []
        scored = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
        raw = _take(logits, scored) if scored else None
        self._edit(logits, rows)
        tokens, finite = _choose(logits, rows)
        result = outcomes(rows, tokens, finite)
        if raw is not None:
            tops = [rows[i].params.logprobs or 0 for i in scored]
            for i, logprob in zip(scored, _logprobs(raw, [tokens[i] for i in scored], tops), strict=True):
                if result[i].error is None:
                    result[i] = result[i]._replace(logprob=logprob)
        return result

    def _edit(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
        """Apply grammars, logit_bias, min_tokens and the penalties in place, the latter each in one operation for all rows that have it."""
        _mask(logits, rows)
        bias, banned, repeated, counted = _Cells(), _Cells(), _Cells(), _Cells()
        for i, row in enumerate(rows):
            p = row.params
            if p.logit_bias:
                bias.add(i, list(p.logit_bias), list(p.logit_bias.values()))
            if row.banned:
                banned.add(i, [*self._eos, *p.stop_token_ids], -math.inf)
            if p.repetition_penalty != 1.0:
                repeated.add(i, row.tokens, p.repetition_penalty)
            if (p.presence_penalty or p.frequency_penalty) and len(row.tokens) > row.prompt_len:
                seen, counts = np.unique(row.tokens[row.prompt_len :], return_counts=True)
                counted.add(i, seen, counts * float(np.float32(p.frequency_penalty)) + float(np.float32(p.presence_penalty)))
        # On a CPU through NumPy: few cells, not worth waking torch's threads for.
        cpu = logits.device.type == "cpu"
        matrix: Any = logits.numpy() if cpu else logits
        if bias:
            at, values = bias.on(logits.device)
            matrix[at] += values
        if banned:
            at, values = banned.on(logits.device)
            matrix[at] = values
        if repeated:  # a token that occurs twice is read twice and written twice, with the same value
            at, values = repeated.on(logits.device)
            old = matrix[at]
            matrix[at] = (np.where if cpu else torch.where)(old > 0, old / values, old * values)
        if counted:
            at, values = counted.on(logits.device)
            matrix[at] -= values


def outcomes(rows: Sequence[SamplingRow], tokens: Sequence[int], finite: Sequence[bool]) -> list[Drawn]:
    """What each row drew, or why it did not."""
    errors = [row.allowed.error if row.allowed else None for row in rows]
    errors = [error or (None if ok else NOT_FINITE) for error, ok in zip(errors, finite, strict=True)]
    return [Drawn(token) if error is None else Drawn(0, None, error) for token, error in zip(tokens, errors, strict=True)]


# What the logits of eight tokens may be at most, by the byte of their bits.
_MOST = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.inf, -np.inf).astype(np.float32)


def _mask(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Nothing is left of the tokens that a row's grammar does not allow."""
    for i, row in enumerate(rows):
        if row.allowed is not None:
            most = _MOST.take(row.allowed.words.view(np.uint8), axis=0).reshape(-1)[: logits.shape[1]]
            if logits.device.type == "cpu":
                np.minimum(logits[i].numpy(), most, out=logits[i].numpy())
            else:
                torch.minimum(logits[i], torch.from_numpy(most).to(logits.device), out=logits[i])


class _Cells:
    """Places in the matrix of logits, and a value for each."""

    def __init__(self) -> None:
        self._rows: list[npt.NDArray[np.int64]] = []
        self._tokens: list[npt.NDArray[np.int64]] = []
        self._values: list[npt.NDArray[np.float32]] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, row: int, tokens: npt.ArrayLike, values: npt.ArrayLike) -> None:
        ids = np.asarray(tokens, dtype=np.int64)
        self._rows.append(np.full(len(ids), row, dtype=np.int64))
        self._tokens.append(ids)
        self._values.append(np.broadcast_to(np.asarray(values, dtype=np.float32), ids.shape))

    def on(self, device: torch.device) -> tuple[tuple[Any, Any], Any]:
        """((rows, tokens), values), as arrays for a CPU, else as tensors."""
        rows, tokens, values = (np.concatenate(part) for part in (self._rows, self._tokens, self._values))
        if device.type == "cpu":
            return (rows, tokens), values
        return (torch.from_numpy(rows).to(device), torch.from_numpy(tokens).to(device)), torch.from_numpy(values).to(device)


def _choose(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> tuple[list[int], list[bool]]:
    """A token for each row, and whether the row's logits allowed one. Overwrites the logits."""
    best, peaks = _argmax(logits)
    finite = [math.isfinite(peak) for peak in peaks.tolist()]
    drawn = [i for i, row in enumerate(rows) if finite[i] and row.params.temperature >= GREEDY_BELOW]
    if drawn:
        whole = len(drawn) == len(rows)
        scores = logits if whole else _take(logits, drawn)
        temperature = torch.tensor([rows[i].params.temperature for i in drawn], dtype=torch.float32)
        _scale(scores, peaks if whole else peaks[drawn], temperature)
        keys = stream_keys([rows[i].seed for i in drawn], [rows[i].position for i in drawn])
        for i, token in zip(drawn, draw(scores, floors(scores, [rows[i].params for i in drawn]), keys), strict=True):
            best[i] = token
    return best, finite


def _argmax(logits: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """The lowest id of the highest logit of each row, and that logit (NaN where the row has one), float32 [rows]."""
    if logits.device.type == "cpu":  # NumPy's is vectorised, torch's is not
        ids = torch.from_numpy(logits.numpy().argmax(axis=1))
    else:
        ids = logits.argmax(dim=1)
    return ids.tolist(), logits.gather(1, ids[:, None])[:, 0]


def _take(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """A copy of these rows."""
    return torch.from_numpy(logits.numpy()[rows]) if logits.device.type == "cpu" else logits[rows]


def _scale(logits: torch.Tensor, peaks: torch.Tensor, temperature: torch.Tensor) -> None:
    """logits = (logits - peak) / temperature in place; at most 0, so that no temperature overflows it upwards."""
    if logits.device.type == "cpu":  # row by row, while the row is in the cache
        with np.errstate(over="ignore"):  # down to -inf is right
            for row, peak, t in zip(logits.numpy(), peaks.numpy(), temperature.numpy(), strict=True):
                np.subtract(row, peak, out=row)
                np.divide(row, t, out=row)
    else:
        logits.sub_(peaks[:, None]).div_(temperature.to(logits.device)[:, None])


def prompt_logprobs(logits: torch.Tensor, targets: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log-probability of each target under its row of logits [n, vocab] (overwritten), with the `top` most likely tokens."""
    return _logprobs(logits, targets, [top] * len(targets))


def _logprobs(logits: torch.Tensor, targets: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    if logits.device.type == "cpu":
        scratch = np.empty(logits.shape[1], dtype=np.float32)
        return [_row_logprob(row, token, top, scratch) for row, token, top in zip(logits.numpy(), targets, tops, strict=True)]
    logprobs = torch.log_softmax(logits, dim=1)
    chosen = logprobs.gather(1, torch.tensor(list(targets), device=logits.device)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(max(tops), logits.shape[1]), dim=1)
    return [
        TokenLogprob(token, reported(own), tuple((t, reported(v)) for t, v in zip(best[:top], values_[:top], strict=True)))
        for token, own, top, best, values_ in zip(targets, chosen, tops, ids.tolist(), values.tolist(), strict=True)
    ]


def _row_logprob(scores: npt.NDArray[np.float32], token: int, top: int, scratch: npt.NDArray[np.float32]) -> TokenLogprob:
    peak = scores.max()
    if not np.isfinite(peak):
        return TokenLogprob(token, LEAST_LOGPROB, ())
    np.subtract(scores, peak, out=scores)
    norm = math.log(np.exp(scores, out=scratch).sum())
    ids = leaders(scores, top) if top else ()
    return TokenLogprob(token, reported(scores[token] - norm), tuple((int(t), reported(scores[t] - norm)) for t in ids))


def reported(logprob: float) -> float:
    return max(float(logprob), LEAST_LOGPROB) if not math.isnan(logprob) else LEAST_LOGPROB
