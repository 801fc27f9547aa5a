"""From logits to tokens on the device, a whole batch in two launches and without a word to the host.

    1. edit    every program takes a stretch of one row: logit bias on the few cells that have one, then, in one pass, the penalties of
               what the sequence holds already, the highest logit, and the draw over all tokens:
                   argmax of logit / temperature + noise            (the Gumbel-max trick)
    2. choose  a program a row weighs the stretches. A row with top_k, top_p or min_p searches its threshold: scores are mapped to
               integers of the same order, and the interval that holds the threshold is cut in four per pass, by how many scores,
               or how much mass, lie above each cut; 16 passes over a row that the cache holds give it exactly, without a sort.
               Then it draws among the scores at or above it.

What the penalties of a sequence need to know stays on the device, so that a step need not wait until the host has heard of the token
before it: a table of counts, and the token that was drawn last, which the first launch counts in passing and the second in the table.

The noise of a token is a hash of the row's two key words and the token's id, in 32-bit arithmetic; `reference.gumbel` says which. A
row's token depends on that row alone. Sums run in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Chip, Shape, bucket_of, chip, launch_of

GREEDY_BELOW: tl.constexpr = tl.constexpr(1e-5)
CELLS: tl.constexpr = tl.constexpr(256)  # edits that a program takes at once
MOST_COUNTED: tl.constexpr = tl.constexpr(2**14 - 1)
PROGRAMS_PER_MULTIPROCESSOR = 2
FOUND = ["peaks", "peak_tokens", "draws", "draw_tokens"]


@dataclass(frozen=True, slots=True)
class SampleLaunch:
    """Parameters of the two launches. `elements`: logits that a program holds at once."""

    elements: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class SampleRows:
    """How each of S rows is drawn. All tensors on the device of the logits, contiguous.

    Attributes:
        temperature: float32 [S]; below 1e-5 is greedy.
        top_k: int32 [S]; 0 is off.
        top_p: float32 [S]; 1 is off.
        min_p: float32 [S]; log of min_p, -inf is off.
        keys: int32 [S, 2], the bits of the two key words of the row's noise (`reference.gumbel`).
        cell_starts: int32 [S + 1]; row r has the edits [cell_starts[r], cell_starts[r + 1]).
        cell_tokens: int32 [C], each token once a row.
        cell_bias: float32 [C], added first; -inf bans the token.
        penalties: float32 [S, 3], (repetition, presence, frequency); (1, 0, 0) is off. Of a token that the sequence holds
            x = x / repetition if x > 0 else x * repetition; of one that its output holds, x = x - (count * frequency + presence).
        owners: int64 [S], the place of each row's sequence in `held` and `latest`. No two the same of those that have penalties.
        uncounted: int32 [S]; 1: the last token of the sequence is `latest`, an output token that `held` lacks, and is counted now.
        held: int16 [N, V], of each sequence and token 2 * (its occurrences in the output, MOST_COUNTED at most) + (whether it is in the
            prompt). For rows that have penalties; the others' are not touched.
        latest: int64 [N], tokens.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    keys: Tensor
    cell_starts: Tensor
    cell_tokens: Tensor
    cell_bias: Tensor
    penalties: Tensor
    owners: Tensor
    uncounted: Tensor
    held: Tensor
    latest: Tensor


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _noise(token, key0, key1):
    """Gumbel noise of tokens, within 1e-6 of the exact value: -log(-log1p(-u)).

    The hardware's logarithm is coarse near 1, so log1p of small u is 2 atanh(z) with z = -u / (2 - u), as a series.
    """
    h = (_mix(token.to(tl.uint32) + 0x9E3779B9) ^ key0) * key1
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = h ^ (h >> 16)
    u = tl.clamp(h.to(tl.float32), 0.5, 4294967040.0) * 2.3283064365386963e-10
    z = u / (2.0 - u)
    w = z * z
    series = 1.0 + w * (0.33333333 + w * (0.2 + w * (0.14285714 + w * (0.11111111 + w * (0.09090909 + w * 0.07692308)))))
    exponential = tl.where(u < 0.5, 2.0 * z * series, -tl.log(tl.maximum(1.0 - u, 1e-30)))
    return -tl.log(exponential)


@triton.jit
def _score(logit, peak, temperature):
    """As the host computes it, so that equal logits are equal scores."""
    return tl.div_rn(logit - peak, temperature)


@triton.jit
def _better(value, token, best, best_token):
    """The higher of two, the lower token where they are equal; -inf never wins."""
    wins = (value > best) | ((value == best) & (token < best_token))
    return tl.where(wins, value, best), tl.where(wins, token, best_token)


@triton.jit
def _order(x):
    """Integers in the order of the floats (no NaN)."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _penalties(penalties, row):
    """(repetition, presence, frequency, whether any is on)"""
    repetition = tl.load(penalties + 3 * row)
    presence = tl.load(penalties + 3 * row + 1)
    frequency = tl.load(penalties + 3 * row + 2)
    return repetition, presence, frequency, (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0)


@triton.jit
def _counted(held, once_more):
    return tl.where(once_more & (held >> 1 < MOST_COUNTED), held + 2, held)


@triton.jit
def _penalized(x, held, repetition, presence, frequency):
    """Logits of tokens of which so much is held. The sum is rounded once, as on the host."""
    count = held.to(tl.int32) >> 1
    x = tl.where(held > 0, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
    less = count.to(tl.float64) * frequency.to(tl.float64) + presence.to(tl.float64)
    return tl.where(count > 0, x - less.to(tl.float32), x)


# Not on the alignment of what a stretch found: the halves of one tensor, which begin anywhere.
@triton.jit(do_not_specialize_on_alignment=FOUND)
def _edit_kernel(
    logits, temperature, keys, cell_starts, cell_tokens, cell_bias, penalties, owners, uncounted, held, latest,
    peaks, peak_tokens, draws, draw_tokens, vocab, stretch, stride, stride_held, BLOCK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    begin = part * stretch
    end = tl.minimum(begin + stretch, vocab)
    base = logits + row.to(tl.int64) * stride
    last_cell = tl.load(cell_starts + row + 1)
    for first in range(tl.load(cell_starts + row), last_cell, CELLS):
        cell = first + tl.arange(0, CELLS)
        token = tl.load(cell_tokens + cell, mask=cell < last_cell, other=-1)
        mine = (token >= begin) & (token < end)
        x = tl.load(base + token, mask=mine, other=0.0) + tl.load(cell_bias + cell, mask=mine, other=0.0)
        tl.store(base + token, x, mask=mine)
    tl.debug_barrier()  # other threads of this program read what was stored

    t = tl.load(temperature + row)
    drawn = t >= GREEDY_BELOW
    key0 = tl.load(keys + 2 * row).to(tl.uint32, bitcast=True)
    key1 = tl.load(keys + 2 * row + 1).to(tl.uint32, bitcast=True)
    repetition, presence, frequency, penalized = _penalties(penalties, row)
    owner = tl.load(owners + row)
    newest = tl.where(tl.load(uncounted + row) > 0, tl.load(latest + owner), -1)
    peak, peak_token = float("-inf"), 2**31 - 1
    best, best_token = float("-inf"), 2**31 - 1
    broken = 0
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(base + token, mask=token < end, other=float("-inf"))
        if penalized:
            of_token = tl.load(held + owner * stride_held + token, mask=token < end, other=0)
            of_token = _counted(of_token, token == newest)
            x = _penalized(x, of_token, repetition, presence, frequency)
            tl.store(base + token, x, mask=(token < end) & (of_token > 0))
        broken += tl.sum(tl.where(x == x, 0, 1), 0)
        value, at = tl.max(x, 0, return_indices=True)
        peak, peak_token = _better(value, start + at, peak, peak_token)
        if drawn:
            value, at = tl.max(x / t + _noise(token, key0, key1), 0, return_indices=True)
            best, best_token = _better(value, start + at, best, best_token)
    place = row * tl.num_programs(1) + part
    tl.store(peaks + place, tl.where(broken > 0, float("nan"), peak))
    tl.store(peak_tokens + place, peak_token)
    tl.store(draws + place, best)
    tl.store(draw_tokens + place, best_token)


@triton.jit
def _above(base, vocab, peak, t, floor, cut0, cut1, cut2, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """How many scores, or how much mass, lie at or above each of three cuts. What lies below `floor` does not count."""
    above0 = tl.zeros((BLOCK,), tl.float32)
    above1 = tl.zeros((BLOCK,), tl.float32)
    above2 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        score = _score(tl.load(base + token, mask=token < vocab, other=float("-inf")), peak, t)
        order = _order(score)
        weight = tl.where((token < vocab) & (order >= floor), 1.0, 0.0)
        if MASS:
            weight *= tl.exp(score)
        above0 += tl.where(order >= cut0, weight, 0.0)
        above1 += tl.where(order >= cut1, weight, 0.0)
        above2 += tl.where(order >= cut2, weight, 0.0)
    return tl.sum(above0, 0), tl.sum(above1, 0), tl.sum(above2, 0)


@triton.jit
def _threshold(base, vocab, peak, t, floor, wanted, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The highest order with `wanted` scores (or so much mass) at or above it, of what lies above `floor`; else `floor`."""
    low = floor
    high = floor * 0 + 1  # above the order of 0.0, the highest score
    while high - low > 1:
        step = tl.maximum((high - low) // 4, 1)
        cut0, cut1, cut2 = low + step, tl.minimum(low + 2 * step, high), tl.minimum(low + 3 * step, high)
        above0, above1, above2 = _above(base, vocab, peak, t, floor, cut0, cut1, cut2, MASS, BLOCK)
        high = tl.where(above0 < wanted, cut0, tl.where(above1 < wanted, cut1, tl.where(above2 < wanted, cut2, high)))
        low = tl.where(above2 >= wanted, cut2, tl.where(above1 >= wanted, cut1, tl.where(above0 >= wanted, cut0, low)))
    return low


@triton.jit(do_not_specialize_on_alignment=FOUND)
def _choose_kernel(
    logits, temperature, top_k, top_p, min_p, keys, penalties, owners, uncounted, held, latest,
    peaks, peak_tokens, draws, draw_tokens, tokens, finite, vocab, stride, stride_held,
    PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    part = tl.arange(0, BLOCK_PARTS)
    there = part < PARTS
    of_part = tl.load(peaks + row * PARTS + part, mask=there, other=float("-inf"))
    number = of_part == of_part
    peak, at = tl.max(tl.where(number, of_part, float("-inf")), 0, return_indices=True)
    whole = (tl.sum(tl.where(number, 0, 1), 0) == 0) & (tl.abs(peak) < float("inf"))
    chosen = tl.load(peak_tokens + row * PARTS + at)
    t = tl.load(temperature + row)
    if whole & (t >= GREEDY_BELOW):
        kept = tl.load(top_k + row)
        share = tl.load(top_p + row)
        lowest = tl.load(min_p + row)
        if (kept > 0) | (share < 1.0) | (lowest > float("-inf")):
            base = logits + row.to(tl.int64) * stride
            floor = _order(lowest)
            if kept > 0:
                floor = _threshold(base, vocab, peak, t, floor, kept.to(tl.float32), False, BLOCK)
            if share < 1.0:
                mass, _, _ = _above(base, vocab, peak, t, floor, floor, floor, floor, True, BLOCK)
                floor = _threshold(base, vocab, peak, t, floor, share * mass, True, BLOCK)
            key0 = tl.load(keys + 2 * row).to(tl.uint32, bitcast=True)
            key1 = tl.load(keys + 2 * row + 1).to(tl.uint32, bitcast=True)
            best, best_token = float("-inf"), 2**31 - 1
            for start in range(0, vocab, BLOCK):
                token = start + tl.arange(0, BLOCK)
                score = _score(tl.load(base + token, mask=token < vocab, other=float("-inf")), peak, t)
                noisy = tl.where((token < vocab) & (_order(score) >= floor), score + _noise(token, key0, key1), float("-inf"))
                value, at_value = tl.max(noisy, 0, return_indices=True)
                best, best_token = _better(value, start + at_value, best, best_token)
            chosen = best_token
        else:
            _, at_draw = tl.max(tl.load(draws + row * PARTS + part, mask=there, other=float("-inf")), 0, return_indices=True)
            chosen = tl.load(draw_tokens + row * PARTS + at_draw)
    tl.store(tokens + row, tl.where(whole, chosen, 0).to(tl.int64))
    tl.store(finite + row, whole)
    _, _, _, penalized = _penalties(penalties, row)
    if penalized & (tl.load(uncounted + row) > 0):
        owner = tl.load(owners + row)
        of_token = held + owner * stride_held + tl.load(latest + owner)
        tl.store(of_token, _counted(tl.load(of_token), True))


def sample_rule(shape: Shape, on: Chip) -> SampleLaunch:
    """Sixteen logits a thread of eight warps."""
    return SampleLaunch(elements=4096, num_warps=8)


def sample(logits: Tensor, rows: SampleRows, launch: SampleLaunch | None = None) -> tuple[Tensor, Tensor]:
    """Draws a token for each row.

    Args:
        logits: float32 [S, V], rows without gaps; overwritten where `rows` edits them.
        rows: how.
        launch: parameters other than the table's.

    Returns:
        (int64 [S] tokens, bool [S]: the row's logits were finite at their highest and held no NaN; if not, its token is 0).

    Raises:
        ValueError: the logits are not float32, have gaps, or are not as many rows as `rows` describes.
    """
    if logits.dtype is not torch.float32 or logits.stride(1) != 1 or len(rows.temperature) != len(logits):
        raise ValueError(f"logits must be float32 [{len(rows.temperature)}, V] without gaps, not {logits.dtype} {tuple(logits.shape)}")
    count, vocab = logits.shape
    tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
    finite = torch.empty(count, dtype=torch.bool, device=logits.device)
    if count == 0:
        return tokens, finite
    on = chip(logits.device)
    if launch is None:
        launch = launch_of(SampleLaunch, sample_rule, Shape("sampling", "float32", bucket=bucket_of(count)), on)
    block = min(launch.elements, triton.next_power_of_2(vocab))
    blocks = triton.cdiv(vocab, block)
    # By bucket: the number of parts is compiled in.
    parts = max(1, min(blocks, triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * on.multiprocessors, bucket_of(count))))
    stretch = triton.cdiv(blocks, parts) * block
    parts = triton.cdiv(vocab, stretch)
    best = torch.empty(2, count, parts, dtype=torch.float32, device=logits.device)
    at = torch.empty(2, count, parts, dtype=torch.int32, device=logits.device)
    _edit_kernel[(count, parts)](
        logits, rows.temperature, rows.keys, rows.cell_starts, rows.cell_tokens, rows.cell_bias,
        rows.penalties, rows.owners, rows.uncounted, rows.held, rows.latest, best[0], at[0], best[1], at[1],
        vocab, stretch, logits.stride(0), rows.held.stride(0), BLOCK=block, num_warps=launch.num_warps,
    )  # fmt: skip
    _choose_kernel[(count,)](
        logits, rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.keys,
        rows.penalties, rows.owners, rows.uncounted, rows.held, rows.latest, best[0], at[0], best[1], at[1], tokens, finite,
        vocab, logits.stride(0), rows.held.stride(0),
        PARTS=parts, BLOCK_PARTS=triton.next_power_of_2(parts), BLOCK=block, num_warps=launch.num_warps,
    )  # fmt: skip
    return tokens, finite
