"""Which heads go where: every head of every target rank exactly once, and from a rank that holds it."""

from __future__ import annotations

from collections import Counter

import pytest

from quire.worker.reslice import Share, heads_of, shares


def test_between_replicas_of_other_degrees() -> None:
    assert shares(4, 1, 1) == (Share(0, 0, 0, 0, 4),)
    assert shares(4, 1, 2) == (Share(0, 0, 0, 0, 2), Share(0, 1, 2, 0, 2))
    assert shares(4, 4, 2) == (Share(0, 0, 0, 0, 1), Share(1, 0, 0, 1, 1), Share(2, 1, 0, 0, 1), Share(3, 1, 0, 1, 1))
    # Three heads over three ranks, and whole.
    assert shares(3, 3, 1) == (Share(0, 0, 0, 0, 1), Share(1, 0, 0, 1, 1), Share(2, 0, 0, 2, 1))
    # Two heads, each of them on two of four ranks: these share the work.
    assert shares(2, 4, 2) == (Share(0, 0, 0, 0, 1), Share(3, 1, 0, 0, 1))
    assert shares(2, 4, 4) == (Share(0, 0, 0, 0, 1), Share(1, 1, 0, 0, 1), Share(2, 2, 0, 0, 1), Share(3, 3, 0, 0, 1))


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("source_tp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("target_tp", [1, 2, 3, 4, 8])
def test_each_head_arrives_once(kv_heads: int, source_tp: int, target_tp: int) -> None:
    if any(kv_heads % tp and tp % kv_heads for tp in (source_tp, target_tp)):
        with pytest.raises(ValueError, match=f"{kv_heads} KV heads do not divide by"):
            shares(kv_heads, source_tp, target_tp)
        return
    found: Counter[tuple[int, int]] = Counter()
    for share in shares(kv_heads, source_tp, target_tp):
        held = heads_of(kv_heads, share.source, source_tp)
        wanted = heads_of(kv_heads, share.target, target_tp)
        for i in range(share.heads):
            assert held[share.source_start + i] == wanted[share.target_start + i]
            found[share.target, share.target_start + i] += 1
    assert found == {(rank, i): 1 for rank in range(target_tp) for i in range(len(heads_of(kv_heads, 0, target_tp)))}
