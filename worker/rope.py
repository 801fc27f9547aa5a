"""Rotary position embedding: how fast each pair of a head's dimensions turns, and the table of cosines and sines.

Angles are computed in float32 step by step as the models were trained (transformers' modeling_rope_utils), not more precisely.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor


class RopeKind(StrEnum):
    """How the frequencies are stretched beyond the length of the first training."""

    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    YARN = "yarn"
    LLAMA3 = "llama3"
    DIVISORS = "divisors"  # the checkpoint lists what each frequency is divided by (GGUF's form of llama3)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary parameters; which ones count depends on `kind`.

    Attributes:
        theta: base of the frequencies.
        factor: how much the context is stretched.
        original_len: context length of the first training, in tokens (of every kind that stretches).
        low_freq_factor, high_freq_factor: where llama3's blend between stretched and plain frequencies lies.
        beta_fast, beta_slow: turns within `original_len` between which yarn blends.
        truncate: whether yarn rounds the borders of that blend to whole dimensions.
        attention_factor: what cosines and sines are multiplied by (yarn).
        divisors: head_dim / 2 numbers for `RopeKind.DIVISORS`.
    """

    theta: float = 10_000.0
    kind: RopeKind = RopeKind.DEFAULT
    factor: float = 1.0
    original_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    divisors: tuple[float, ...] = ()


def cos_sin_table(rope: RopeConfig, head_dim: int, max_len: int, device: torch.device | str = "cpu") -> Tensor:
    """float32 [max_len, head_dim]: row p holds cos(p * frequency) for each of the head_dim / 2 frequencies, then the sines."""
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32), frequencies(rope, head_dim, max_len))
    return (torch.cat((angles.cos(), angles.sin()), dim=-1) * rope.attention_factor).to(device)


def frequencies(rope: RopeConfig, head_dim: int, max_len: int) -> Tensor:
    """float32 [head_dim / 2], in radians a token. `max_len` is the longest sequence served; only `DYNAMIC` looks at it."""
    plain = 1.0 / _powers(rope.theta, head_dim)
    match rope.kind:
        case RopeKind.DEFAULT:
            return plain
        case RopeKind.LINEAR:
            return plain / rope.factor
        case RopeKind.DIVISORS:
            return plain / torch.tensor(rope.divisors)
        case RopeKind.DYNAMIC:
            return _dynamic(rope, head_dim, max_len)
        case RopeKind.YARN:
            return _yarn(rope, head_dim)
        case RopeKind.LLAMA3:
            return _llama3(rope, plain)


def _powers(theta: float, head_dim: int) -> Tensor:
    return torch.pow(theta, torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def _dynamic(rope: RopeConfig, head_dim: int, max_len: int) -> Tensor:
    """The base grows with the longest sequence served. transformers lets it grow with each sequence, which would make stored
    keys depend on what came after them; up to `original_len` tokens, the default limit, there is no difference."""
    longest = max(max_len, rope.original_len)
    growth = rope.factor * longest / rope.original_len - (rope.factor - 1)
    return 1.0 / _powers(rope.theta * growth ** (head_dim / (head_dim - 2)), head_dim)


def _yarn(rope: RopeConfig, head_dim: int) -> Tensor:
    """YaRN (arXiv 2309.00071): fast dimensions keep their frequency, slow ones are divided by `factor`, a ramp lies between."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(rope.original_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # keeps the ramp's slope finite
    stretched_share = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    powers = _powers(rope.theta, head_dim)
    return 1.0 / (rope.factor * powers) * stretched_share + 1.0 / powers * (1 - stretched_share)


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """YaRN's correction of the attention temperature: 0.1 * ln(factor) + 1, or the ratio of two such when a model names them."""

    def term(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return term(mscale) / term(mscale_all_dim) if mscale and mscale_all_dim else term(1.0)


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Long waves are divided by `factor`, short ones kept, and those between are blended by how many fit `original_len`."""
    waves = rope.original_len / (2 * math.pi / plain)
    kept_share = (waves - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - kept_share) * plain / rope.factor + kept_share * plain
    return torch.where(kept_share < 0, plain / rope.factor, torch.where(kept_share > 1, plain, blended))
