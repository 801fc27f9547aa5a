"""Page maps with fewer cells than pages, for whoever draws them. Pure."""

from __future__ import annotations

_RANK = "fcrmsa"  # in a cell of several pages the most frequent state shows; among equals the one that is used more


def cells(states: str, most: int) -> str:
    """At most so many states, in page order: each is that of as many pages as it takes (`cluster.admin.PageMaps` says which there are)."""
    each = max(-(-len(states) // most), 1)
    return "".join(_shown(states[start : start + each]) for start in range(0, len(states), each))


def _shown(states: str) -> str:
    return max(_RANK, key=lambda state: (states.count(state), _RANK.index(state)))
