"""Finds stop strings in a text that arrives in pieces: one Aho-Corasick automaton for all of a request's stop strings.

A node stands for a prefix of some stop string. After any text the automaton is in the node of the longest suffix of the
text that is such a prefix; that suffix is what must be held back, because the next character may complete a stop string.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache


class StopStrings:
    """The automaton of a set of stop strings. Immutable once built, so streams share it; node 0 is the empty prefix.

    Attributes:
        found: by node, the longest stop string that ends here, or None.
        held: by node, how many characters may still become a stop string (that of a completed one that no other extends: less).
        starts: the characters that a stop string can begin with.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.found: list[str | None] = [None]
        self._next: list[dict[str, int]] = [{}]
        depth = [0]
        for stop in stops:
            node = 0
            for char in stop:
                if char not in self._next[node]:
                    self._next[node][char] = len(self._next)
                    self._next.append({})
                    self.found.append(None)
                    depth.append(depth[node] + 1)
                node = self._next[node][char]
            if node:
                self.found[node] = stop
        self._fail = [0] * len(depth)  # the longest proper suffix that is a node
        waiting = deque(self._next[0].values())
        while waiting:
            node = waiting.popleft()
            for char, child in self._next[node].items():
                self._fail[child] = self.step(self._fail[node], char)
                waiting.append(child)
            self.found[node] = self.found[node] or self.found[self._fail[node]]
        self.held = [self._held(node, depth) for node in range(len(depth))]
        self.starts = frozenset(self._next[0])

    def step(self, node: int, char: str) -> int:
        """The node after one more character."""
        while True:
            following = self._next[node].get(char)
            if following is not None:
                return following
            if node == 0:
                return 0
            node = self._fail[node]

    def _held(self, node: int, depth: list[int]) -> int:
        while node and not self._next[node]:
            node = self._fail[node]
        return depth[node]


@lru_cache(maxsize=256)
def stop_strings(stops: tuple[str, ...]) -> StopStrings:
    """The automaton of `stops`, shared by the streams of a request."""
    return StopStrings(stops)
