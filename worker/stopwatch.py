"""What steps of an engine take, by what is in them: the measurements behind a speed profile.

The engine is the real one in this process, as `LLM` builds it. Prompts are random tokens, so nothing is found in the prefix cache.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .engine import Engine, Runner
from .plan import MemoryBytes, Moved, StepPlan, StepResult
from .protocol import GenerateRequest, SamplingParams

# (sequences, prompt tokens of each), from the cheapest to the dearest
SCENES = (
    (1, 16),
    (1, 64),
    (4, 64),
    (2, 128),
    (8, 64),
    (1, 512),
    (16, 64),
    (1, 1024),
    (4, 512),
    (32, 64),
    (1, 1900),
    (8, 512),
    (2, 1500),
    (64, 64),
)
DECODES = 8  # steps of each scene that only decode


class StepTime(NamedTuple):
    """One step, or the mean of several that are alike.

    Attributes:
        prompt_tokens: of rows that compute more than one token; `pairs` is the sum over them of the tokens that each attends to.
        decodes: rows of one token; `context` is the sum of what they attend to.
        rows: all of them.
        seconds: that the engine's step took.
    """

    prompt_tokens: float
    pairs: float
    decodes: float
    context: float
    rows: float
    seconds: float


class _Noting(Runner):
    """A runner that notes the plans which it passes on."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.plan: StepPlan | None = None

    def run(self, plan: StepPlan) -> StepResult:
        self.plan = plan
        return self._runner.run(plan)

    def run_ahead(self, plan: StepPlan, following: Callable[[], StepPlan | None]) -> StepResult:
        self.plan = plan
        return self._runner.run_ahead(plan, following)

    def reset(self) -> None:
        self._runner.reset()

    def memory_bytes(self) -> MemoryBytes:
        return self._runner.memory_bytes()

    def poll(self) -> tuple[Moved, ...]:
        return self._runner.poll()

    def watch(self, wake: Callable[[], None]) -> None:
        self._runner.watch(wake)

    def addresses(self) -> tuple[str, ...]:
        return self._runner.addresses()


def measure(engine: Engine, seconds: float, progress: Callable[[float], None]) -> list[StepTime]:
    """Plays scenes of `SCENES` that fit into the engine until `seconds` have passed, and the first three in any case.

    Args:
        engine: idle.
        progress: told of the share of the time that has passed.
    """
    noting = engine.runner = _Noting(engine.runner)
    begin_s = time.perf_counter()
    found: list[StepTime] = []
    try:
        list(_play(engine, noting, 1, 64))  # what is slow once
        for number, (sequences, prompt) in enumerate(_that_fit(engine)):
            passed = (time.perf_counter() - begin_s) / seconds
            if number >= 3 and passed >= 1:
                break
            progress(min(passed, 1.0))
            found += _play(engine, noting, sequences, prompt)
        progress(1.0)
    finally:
        engine.runner = noting._runner
    return found


def _that_fit(engine: Engine) -> Iterator[tuple[int, int]]:
    info = engine.info
    for sequences, prompt in SCENES:
        length = prompt + DECODES + 2
        if sequences <= info.max_running and length <= info.max_model_len and sequences * (length + info.page_size) <= info.pool_tokens:
            yield sequences, prompt


def _play(engine: Engine, noting: _Noting, sequences: int, prompt: int) -> Iterator[StepTime]:
    """The steps that prefill, one by one, and those that only decode all together."""
    draw = random.Random(f"{sequences}:{prompt}")
    bound = min(engine.info.vocab_size, 10_000)
    params = SamplingParams(max_tokens=DECODES + 1, temperature=0.0, ignore_eos=True)
    for i in range(sequences):
        engine.submit(GenerateRequest(f"profile-{i}", (tuple(draw.randrange(bound) for _ in range(prompt)),), params))
    decodes: list[StepTime] = []
    while not engine.idle():
        began_s = time.perf_counter()
        engine.step()
        took_s = time.perf_counter() - began_s
        if noting.plan is not None:
            step = _of(noting.plan, took_s)
            if step.prompt_tokens:
                yield step
            elif step.decodes == sequences:
                decodes.append(step)
        noting.plan = None
    if decodes:
        means = [statistics.fmean(column) for column in zip(*decodes, strict=True)]
        yield StepTime(*means)._replace(seconds=statistics.median(step.seconds for step in decodes))


def _of(plan: StepPlan, seconds: float) -> StepTime:
    chunks = [row for row in plan.rows if row.num_tokens > 1]
    decodes = [row for row in plan.rows if row.num_tokens == 1]
    pairs = sum(row.num_tokens * row.start + row.num_tokens * (row.num_tokens + 1) / 2 for row in chunks)
    context = sum(row.start + 1 for row in decodes)
    return StepTime(sum(row.num_tokens for row in chunks), pairs, len(decodes), context, len(plan.rows), seconds)
