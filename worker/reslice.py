"""Which KV heads travel from which rank to which, when a page moves between replicas of other tensor-parallel degrees. Pure.

A page's heads are cut over the ranks as `shard` cuts them: evenly, or, with fewer heads than ranks, so that several ranks hold the same
one. Both ends of a link compute the same shares from the same three numbers, so nothing about heads has to be said on it.
"""

from __future__ import annotations

from typing import NamedTuple


class Share(NamedTuple):
    """Heads [source_start, source_start + heads) of the source rank's part are [target_start, ...) of the target rank's part."""

    source: int  # rank
    target: int  # rank
    source_start: int
    target_start: int
    heads: int


def heads_of(kv_heads: int, rank: int, tp: int) -> range:
    """The heads that a rank holds."""
    first = rank * kv_heads // tp
    return range(first, first + max(kv_heads // tp, 1))


def shares(kv_heads: int, source_tp: int, target_tp: int) -> tuple[Share, ...]:
    """Everything that travels, each head of each target rank once, by target and then by head.

    Of several source ranks that hold a head, those whose number is the target's, modulo the holders', send it: so they share the work.

    Raises:
        ValueError: heads are not cut into so many parts.
    """
    for tp in (source_tp, target_tp):
        if tp < 1 or (kv_heads % tp and tp % kv_heads):
            raise ValueError(f"{kv_heads} KV heads do not divide by {tp} ranks")
    found: list[Share] = []
    for target in range(target_tp):
        wanted = heads_of(kv_heads, target, target_tp)
        at = wanted.start
        while at < wanted.stop:
            holders = [rank for rank in range(source_tp) if at in heads_of(kv_heads, rank, source_tp)]
            source = holders[target % len(holders)]
            held = heads_of(kv_heads, source, source_tp)
            heads = min(held.stop, wanted.stop) - at
            found.append(Share(source, target, at - held.start, at - wanted.start, heads))
            at += heads
    return tuple(found)
