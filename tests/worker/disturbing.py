"""What tests do to an engine between its steps."""

from __future__ import annotations

import random

from quire.worker.engine import Engine


def swap_at_random(engine: Engine, draw: random.Random, often: float) -> None:
    """Between two steps: somebody who runs goes to host memory, or to disk, if there is room."""
    scheduler = engine.scheduler
    for s in [s for s in scheduler.running if s.num_computed and draw.random() < often]:
        if s.params.prompt_logprobs is not None:
            continue
        contents = scheduler.contents(s)
        if scheduler.disk.holds(len(contents)) and draw.random() < 0.5:
            scheduler._suspend(s)
        elif scheduler.host.lacks(contents) is not None:
            scheduler._swap_out(s)
