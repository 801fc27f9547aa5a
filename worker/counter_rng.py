"""Random numbers without state: Gumbel noise that is a function of (seed, position, token id), and the draw that uses it.

A draw is the argmax of `score + noise` (the Gumbel-max trick: token t wins with probability softmax(score)[t]). Its noise
depends on nothing but the sequence's seed, the position of the token being drawn and the token's id, so a seeded request
draws the same tokens whatever runs beside it, and after a swap, a migration or a crash. All integer arithmetic is modulo
2**32, so that a GPU kernel can repeat it bit for bit:

    mix(x)    = lowbias32 (Wellons, "Prospecting for hash functions")
    k0, k1    = mix(mix(mix(lo ^ A) + hi) + position), mix(mix(mix(hi ^ B) + lo) ^ position) | 1      seed = hi:lo
    h(t)      = tail((mix(t + A) ^ k0) * k1)            tail(x): x ^= x >> 15; x *= M2; x ^= x >> 16
    u(t)      = clamp(float32(h), 0.5, 2**32 - 2**8) / 2**32
    noise(t)  = -log(-log1p(-u))

`u` counts up from 0, where float32 is finest, so that the large noise that decides a draw has all 32 bits of the hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

_A, _B = 0x9E3779B9, 0x85EBCA6B
_M1, _M2 = 0x7FEB352D, 0x846CA68B
_MASK = 0xFFFFFFFF
_U_TOP = float(2**32 - 2**8)  # the largest float32 below 2**32

# The CPU draw looks at noise above _COMMON first: the hash alone says which tokens have it (1 in 400).
_COMMON = 6.0
_COMMON_HASH = np.uint32(-np.expm1(-np.exp(-_COMMON)) * 2**32)
_SLACK = 1e-3  # more than float32 rounding can move a noise value of this size

Words: TypeAlias = npt.NDArray[np.uint32]
Floats: TypeAlias = npt.NDArray[np.float32]


def stream_keys(seeds: Sequence[int], positions: Sequence[int]) -> Words:
    """The two key words of each draw.

    Args:
        seeds: one in [0, 2**64) for each draw.
        positions: index in its sequence of the token being drawn, at least 0.

    Returns:
        uint32 [draws, 2]; the second word is odd.
    """
    seed = np.asarray(seeds, dtype=np.uint64)
    position = np.asarray(positions, dtype=np.uint64).astype(np.uint32)
    low, high = seed.astype(np.uint32), (seed >> np.uint64(32)).astype(np.uint32)
    first = _mix(_mix(_mix(low ^ np.uint32(_A)) + high) + position)
    second = _mix(_mix(_mix(high ^ np.uint32(_B)) + low) ^ position) | np.uint32(1)
    return np.stack([first, second], axis=-1)


def gumbel(keys: Words, tokens: npt.NDArray[np.integer]) -> Floats:
    """Noise of the given token ids: keys uint32 [..., 2], tokens int [n] -> float32 [..., n]."""
    mixed = _mix(tokens.astype(np.uint32) + np.uint32(_A))
    return _noise(_tail((mixed ^ keys[..., :1]) * keys[..., 1:]))


def draw(scores: torch.Tensor, floors: torch.Tensor, keys: Words) -> list[int]:
    """One token for each row, with probability proportional to exp(score) among the scores that reach the row's floor.

    Args:
        scores: float32 [rows, vocab] on any device, at most 0, the largest of each row exactly 0; -inf is never drawn.
        floors: float32 [rows], same device; lower scores are left out (-inf keeps all, 0 the most likely tokens).
        keys: uint32 [rows, 2] from `stream_keys`.

    Returns:
        Token ids. A tie goes to the lower id.
    """
    if scores.device.type != "cpu":
        return draw_on_device(scores, floors, keys)
    matrix = scores.numpy()
    table = _token_words(matrix.shape[1])
    words = np.empty(matrix.shape[1], dtype=np.uint32)
    shifted = np.empty_like(words)
    return [_draw_row(row, floor, key, table, words, shifted) for row, floor, key in zip(matrix, floors.tolist(), keys, strict=True)]


def _draw_row(scores: Floats, floor: float, key: Words, table: Words, words: Words, shifted: Words) -> int:
    """The exact argmax of score + noise, with the logarithms of only a few tokens.

    1. Every token whose noise exceeds _COMMON (seen from its hash), and the most likely token, set a bar.
    2. Any other token has noise up to _COMMON, so it needs a score above bar - _COMMON to win.
    """
    if floor > -12.0:  # few tokens are left: hash these alone
        kept = np.flatnonzero(scores >= floor)
        return _best(scores, kept, _tail((table[kept] ^ key[0]) * key[1]))[0]
    np.bitwise_xor(table, key[0], out=words)
    np.multiply(words, key[1], out=words)
    np.right_shift(words, np.uint32(15), out=shifted)
    np.bitwise_xor(words, shifted, out=words)
    np.multiply(words, np.uint32(_M2), out=words)
    np.right_shift(words, np.uint32(16), out=shifted)
    np.bitwise_xor(words, shifted, out=words)
    loud = np.flatnonzero(words <= _COMMON_HASH)
    loud = np.append(loud[scores[loud] >= floor], scores.argmax())
    token, bar = _best(scores, loud, words[loud])
    rest = np.flatnonzero(scores >= max(floor, bar - _COMMON - _SLACK))
    if len(rest) == 0:
        return token
    other, score = _best(scores, rest, words[rest])
    return other if (score, -other) > (bar, -token) else token


def _best(scores: Floats, tokens: npt.NDArray[np.integer], words: Words) -> tuple[int, float]:
    total = scores[tokens] + _noise(words)
    peak = total.max()
    return int(tokens[total == peak].min()), float(peak)


def _noise(words: Words) -> Floats:
    u = np.clip(words.astype(np.float32), np.float32(0.5), np.float32(_U_TOP)) * np.float32(2**-32)
    noise: Floats = -np.log(-np.log1p(-u))
    return noise


def _mix(x: Words) -> Words:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(_M1)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(_M2)
    return x ^ (x >> np.uint32(16))


def _tail(x: Words) -> Words:
    x = (x ^ (x >> np.uint32(15))) * np.uint32(_M2)
    return x ^ (x >> np.uint32(16))


@lru_cache(maxsize=4)
def _token_words(vocab: int) -> Words:
    return _mix(np.arange(vocab, dtype=np.uint32) + np.uint32(_A))


@lru_cache(maxsize=4)
def _token_words_on(vocab: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(_token_words(vocab).view(np.int32)).to(device)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def draw_on_device(scores: torch.Tensor, floors: torch.Tensor, keys: Words) -> list[int]:
    """`draw` in torch operations over the whole matrix: int32 multiplies wrap, and a masked shift is a logical one."""
    words = torch.from_numpy(np.ascontiguousarray(keys).view(np.int32)).to(scores.device)
    h = (_token_words_on(scores.shape[1], scores.device) ^ words[:, :1]) * words[:, 1:]
    h = (h ^ ((h >> 15) & 0x1FFFF)) * _signed(_M2)
    h = h ^ ((h >> 16) & 0xFFFF)
    u = (h.to(torch.int64) & _MASK).to(torch.float32).clamp_(0.5, _U_TOP) * 2.0**-32
    noise = -torch.log(-torch.log1p(-u))
    total = torch.where(scores >= floors[:, None], scores + noise, float("-inf"))
    return total.argmax(dim=1).tolist()
