"""How long what has died stays down before it is started again. Pure: times are arguments."""

from __future__ import annotations

FIRST_S = 0.5
MOST_S = 30.0
HEALTHY_S = 60.0


class Backoff:
    """Delays of 0.5, 1, 2, ... 30 seconds, without end; from the first again after a minute of health."""

    def __init__(self) -> None:
        self._next_s = FIRST_S

    def delay_s(self, healthy_s: float) -> float:
        """The delay after a death that followed on `healthy_s` seconds of health."""
        if healthy_s >= HEALTHY_S:
            self._next_s = FIRST_S
        delay_s = self._next_s
        self._next_s = min(2 * delay_s, MOST_S)
        return delay_s
