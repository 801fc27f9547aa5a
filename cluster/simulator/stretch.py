"""Steps of a simulated replica that follow one another without a decision between them, and the time that they take.

A step that prefills stands alone. Steps that only decode are alike but for the context, which grows by one token for each sequence:

    the k-th takes first_s + k * growth_s,  so the first j of them take j * first_s + growth_s * j * (j - 1) / 2
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Stretch:
    """`steps` steps from `start_s` on."""

    start_s: float
    steps: int
    first_s: float
    growth_s: float = 0.0

    def end_s(self, steps: int | None = None) -> float:
        """When so many steps have ended; all of them by default."""
        j = self.steps if steps is None else steps
        return self.start_s + j * self.first_s + self.growth_s * (j * (j - 1) // 2)

    def done(self, now_s: float) -> int:
        """Steps that have ended by then, fewer than all of them: the last one's end is for whoever waits for it."""
        if self.steps == 1 or now_s < self.start_s + self.first_s:
            return 0
        a, b, x = self.first_s - self.growth_s / 2, self.growth_s / 2, now_s - self.start_s
        j = int(x / a if b == 0 else (math.sqrt(a * a + 4 * b * x) - a) / (2 * b))
        j = min(max(j, 0), self.steps - 1)
        while j < self.steps - 1 and self.end_s(j + 1) <= now_s:
            j += 1
        while j > 0 and self.end_s(j) > now_s:
            j -= 1
        return j

    def drop(self, steps: int) -> None:
        """The first of them are over."""
        self.start_s = self.end_s(steps)
        self.first_s += steps * self.growth_s
        self.steps -= steps
