"""Which tokens min_p, top_k and top_p leave, as one number for each row: the lowest score that stays.

All three keep the upper end of a row's distribution, so what is left is exactly the tokens at or above a floor, and
tokens with equal scores stay or go together. min_p and top_k apply first; top_p is a share of the mass they leave.
A sort of the whole vocabulary is avoided: the candidates are the tokens near the top, and more only where these do not
hold the nucleus. A row's floor depends on that row alone.

Scores here are float32 [rows, vocab], at most 0, the largest of each row exactly 0 (logits over the temperature, less
their maximum).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from .protocol import SamplingParams

_REACHES = (-5.0, -9.0, -14.0, -math.inf)  # how far below the top the candidates go; the last is the whole row
_CANDIDATES = 1024  # on a GPU
_UNIT = float(2**40)  # probabilities as integers: sums are exact, whatever order a GPU adds them in


def floors(scores: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """The floor of each row: float32 [rows] on the scores' device; -inf where nothing is cut."""
    if scores.device.type != "cpu":
        return floors_on_device(scores, params)
    scratch = np.empty(scores.shape[1], dtype=np.float32)
    return torch.tensor([_floor(row, p, scratch) for row, p in zip(scores.numpy(), params, strict=True)], dtype=torch.float32)


def leaders(scores: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.intp]:
    """Ids of the `count` highest of one row's scores (all, when it has fewer), best first, ties by id."""
    for reach in _REACHES:
        ids = np.flatnonzero(scores >= reach)
        if len(ids) >= count:
            break
    return ids[np.argsort(-scores[ids], kind="stable")[:count]]


def _floor(scores: npt.NDArray[np.float32], params: SamplingParams, scratch: npt.NDArray[np.float32]) -> float:
    lowest = math.log(params.min_p) if params.min_p > 0 else -math.inf
    if params.top_k <= 0 and params.top_p >= 1:
        return lowest
    mass = None
    reaches = iter(_REACHES)
    while True:  # ends: the last reach takes the whole row
        low = max(lowest, next(reaches))
        kept = scores.compress(scores >= low)
        whole = low == lowest  # nothing that may stay is missing
        if params.top_k > 0:
            if len(kept) < params.top_k and not whole:
                continue
            if len(kept) > params.top_k:
                kept = kept.compress(kept >= np.partition(kept, -params.top_k)[-params.top_k])
            whole = True
        if params.top_p >= 1:
            return float(kept.min())
        here = float(np.exp(kept).sum())
        if mass is None:
            left = scores if lowest == -math.inf else scores.compress(scores >= lowest)
            mass = here if whole else float(np.exp(left, out=scratch[: len(left)]).sum())
        if not whole and here < params.top_p * mass:
            continue
        kept.sort()
        running = np.exp(kept[::-1]).cumsum(dtype=np.float64)
        place = int(np.searchsorted(running, params.top_p * mass))
        return float(kept[::-1][min(place, len(kept) - 1)])


def floors_on_device(scores: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """`floors` in torch operations over the whole batch."""
    device, vocab = scores.device, scores.shape[1]
    lowest = torch.tensor([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params], dtype=torch.float32).to(device)
    cut = [row for row, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
    if not cut:
        return lowest
    result = lowest.clone()
    pending = torch.tensor(cut).to(device)
    top_k = torch.tensor([p.top_k if p.top_k > 0 else vocab for p in params]).to(device).clamp_(max=vocab)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64).to(device)
    for width in (min(_CANDIDATES, vocab), vocab):
        found, fits = _floors_among(scores[pending], lowest[pending], top_k[pending], top_p[pending], width)
        result[pending[fits]] = found[fits]
        pending = pending[~fits]
        if len(pending) == 0:
            break
    return result


def _floors_among(
    scores: torch.Tensor, lowest: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Floors [rows] found among the `width` highest scores of each row, and whether each of them is final."""
    values, ids = scores.topk(width, dim=1)
    last = values[:, -1]
    whole = torch.full_like(last, width == scores.shape[1], dtype=torch.bool)
    kth = values.gather(1, (top_k - 1).clamp(max=width - 1)[:, None])[:, 0]
    low = torch.where(top_k <= width, torch.maximum(lowest, kth), lowest)
    inside = whole | (last < low)  # every token that min_p and top_k leave is a candidate
    mass = (torch.softmax(scores, dim=1).gather(1, ids).double() * _UNIT).round().long()
    mass = torch.where(values >= low[:, None], mass, 0)
    running = mass.cumsum(dim=1)
    total = torch.where(inside, running[:, -1], int(_UNIT))
    wanted = (total.double() * top_p).ceil().long()
    place = (running < wanted[:, None]).sum(dim=1).clamp(max=width - 1)
    floor = torch.maximum(values.gather(1, place[:, None])[:, 0], low)
    floor = torch.where(top_p < 1, floor, low)
    # With neither min_p nor top_k the mass they leave is known (1) before all of it is seen.
    known = inside | (torch.isneginf(lowest) & (top_k >= scores.shape[1]))
    return floor, whole | (known & (inside | (last < floor)) & (running[:, -1] >= wanted))
