"""The counter-based noise: its values are pinned, its statistics hold, and the CPU's short cut changes nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.worker.counter_rng import draw, draw_on_device, gumbel, stream_keys

M = 0xFFFFFFFF


def lowbias32(x: int) -> int:
    x = (x ^ (x >> 16)) * 0x7FEB352D & M
    x = (x ^ (x >> 15)) * 0x846CA68B & M
    return x ^ (x >> 16)


def plain_noise(seed: int, position: int, token: int) -> float:
    """The formula of the module's docstring, one number at a time."""
    low, high = seed & M, seed >> 32
    k0 = lowbias32((lowbias32((lowbias32(low ^ 0x9E3779B9) + high) & M) + position) & M)
    k1 = lowbias32(lowbias32((lowbias32(high ^ 0x85EBCA6B) + low) & M) ^ position) | 1
    h = (lowbias32((token + 0x9E3779B9) & M) ^ k0) * k1 & M
    h = (h ^ (h >> 15)) * 0x846CA68B & M
    h = h ^ (h >> 16)
    u = min(max(float(np.float32(h)), 0.5), 2.0**32 - 2**8) / 2**32
    return -math.log(-math.log1p(-u))


def chi_square_sigmas(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """How many standard deviations the chi-square statistic lies above what chance gives."""
    expected = counts.sum() * probabilities
    degrees = len(probabilities) - 1
    return float((((counts - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * degrees))


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31), st.integers(0, 2**18))
@settings(max_examples=300, deadline=None)
def test_noise_is_the_documented_formula(seed: int, position: int, token: int) -> None:
    got = gumbel(stream_keys([seed], [position]), np.array([token]))[0, 0]
    assert got == pytest.approx(plain_noise(seed, position, token), rel=1e-5, abs=1e-5)


PINNED_KEYS = [[2488251732, 3210455839], [515051068, 3927946329], [327398834, 1259704037]]
PINNED_NOISE = [1.233726, -0.20501, 3.264918]


def test_values_never_change() -> None:
    """Whoever changes these breaks the promise that a seed gives the same text tomorrow."""
    keys = stream_keys([0, 1, 2**64 - 1], [0, 5, 100_000])
    assert keys.tolist() == PINNED_KEYS
    assert gumbel(keys[:1], np.array([0, 1, 49151]))[0].tolist() == pytest.approx(PINNED_NOISE, abs=1e-5)


@pytest.mark.parametrize("vary", ["position", "seed", "high half of the seed"])
def test_draws_follow_the_softmax(vary: str) -> None:
    n, vocab = 60_000, 50
    scores = np.random.default_rng(1).standard_normal(vocab).astype(np.float32)
    scores -= scores.max()
    weights = np.exp(scores.astype(np.float64))
    i = np.arange(n, dtype=np.uint64)
    fixed = np.full(n, 77, dtype=np.uint64)
    seeds = {"position": fixed, "seed": i, "high half of the seed": i << np.uint64(32)}[vary]
    keys = stream_keys(seeds, i if vary == "position" else fixed)
    drawn = (gumbel(keys, np.arange(vocab)) + scores).argmax(axis=1)
    assert chi_square_sigmas(np.bincount(drawn, minlength=vocab), weights / weights.sum()) < 4
    pairs = np.bincount(drawn[:-1] * vocab + drawn[1:], minlength=vocab * vocab)  # neighbours are independent
    assert chi_square_sigmas(pairs, np.outer(weights, weights).ravel() / weights.sum() ** 2) < 4


def test_noise_has_gumbel_moments() -> None:
    noise = gumbel(stream_keys([3], [9]), np.arange(200_000))[0]
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert np.isfinite(noise).all()


@given(
    st.integers(0, 2**32),
    st.sampled_from([1, 2, 7, 1000, 5000]),
    st.sampled_from([0.0, 0.3, 3.0, 10.0]),
    st.sampled_from([-math.inf, -20.0, -6.0, -1.0, 0.0]),
)
@settings(max_examples=150, deadline=None)
def test_the_short_cut_finds_the_true_winner(seed: int, vocab: int, spread: float, floor: float) -> None:
    scores = np.random.default_rng(seed).standard_normal((3, vocab)).astype(np.float32) * np.float32(spread)
    scores -= scores.max(axis=1, keepdims=True)
    keys = stream_keys([seed, seed + 1, 5], [1, 2, 3])
    total = np.where(scores >= floor, scores + gumbel(keys, np.arange(vocab)), -np.inf)
    floors = torch.full((3,), floor)
    expected = total.argmax(axis=1).tolist()
    assert draw(torch.from_numpy(scores), floors, keys) == expected
    assert draw_on_device(torch.from_numpy(scores), floors, keys) == expected


def test_scores_below_the_floor_never_win() -> None:
    """So many of them that in one draw of six the best of their noise would win."""
    scores = torch.full((64, 50_000), -12.6)
    scores[:, 123] = 0.0
    assert draw(scores, torch.full((64,), -12.5), stream_keys(range(64), [1] * 64)) == [123] * 64


def test_a_row_draws_the_same_alone_and_in_a_batch() -> None:
    scores = torch.randn(16, 4099, generator=torch.Generator().manual_seed(0))
    scores -= scores.amax(dim=1, keepdim=True)
    floors = torch.tensor([-math.inf, -2.0] * 8)
    keys = stream_keys(range(16), range(100, 116))
    together = draw(scores, floors, keys)
    assert together == [draw(scores[i : i + 1].clone(), floors[i : i + 1], keys[i : i + 1])[0] for i in range(16)]
