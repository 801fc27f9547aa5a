"""What steps of an engine take, by what is in them: the measurements behind a speed profile.

The engine is the real one in this process, as `LLM` builds it. Prompts are random tokens, so nothing is found in the prefix cache.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import zip_longest
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
# (sequences that decode, tokens of each of BESIDE prompts that come meanwhile, one by one), played after the scene of the same place
MIXES = ((2, 96), (4, 192), (8, 128), (16, 256), (12, 32), (24, 128), (6, 480), (32, 64))
BESIDE = 4


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


_Play = Callable[[Engine, "_Noting", int, int], Iterator[StepTime]]


class _Noting(Runner):
    """A runner that notes the plans which it passes on."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._plan: StepPlan | None = None

    def take(self) -> StepPlan | None:
        """The latest plan that has not been taken."""
        plan, self._plan = self._plan, None
        return plan

    def run(self, plan: StepPlan) -> StepResult:
        self._plan = plan
        return self._runner.run(plan)

    def run_ahead(self, plan: StepPlan, following: Callable[[], StepPlan | None]) -> StepResult:
        self._plan = plan
        return self._runner.run_ahead(plan, following)

    def prepare(self, grammar: str) -> None:
        self._runner.prepare(grammar)

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
    """Plays scenes of `SCENES` and `MIXES` that fit into the engine until `seconds` have passed, and the first three in any case.

    Args:
        engine: idle.
        progress: told of the share of the time that has passed.
    """
    noting = engine.runner = _Noting(engine.runner)
    begin_s = time.perf_counter()
    found: list[StepTime] = []
    try:
        list(_play(engine, noting, 1, 63))  # what is slow once
        for number, (play, sequences, prompt) in enumerate(_that_fit(engine)):
            passed = (time.perf_counter() - begin_s) / seconds
            if number >= 3 and passed >= 1:
                break
            progress(min(passed, 1.0))
            found += play(engine, noting, sequences, prompt)
        progress(1.0)
    finally:
        engine.runner = noting._runner
    return found


def _that_fit(engine: Engine) -> Iterator[tuple[_Play, int, int]]:
    info = engine.info
    for scene, mix in zip_longest(SCENES, MIXES):
        for play, one in ((_play, scene), (_mix, mix)):
            if one is None:
                continue
            sequences, prompt = one
            length, rows = prompt + DECODES + 2 * BESIDE + 2, sequences + (play is _mix)
            if rows <= info.max_running and length <= info.max_model_len and rows * (length + info.page_size) <= info.pool_tokens:
                yield play, sequences, prompt


def _play(engine: Engine, noting: _Noting, sequences: int, prompt: int) -> Iterator[StepTime]:
    """The steps that prefill, one by one, and those that only decode all together."""
    for i in range(sequences):
        engine.submit(_request(engine, f"{sequences}x{prompt}-{i}", prompt, DECODES + 1))
    decodes: list[StepTime] = []
    while not engine.idle():
        step = _step(engine, noting)
        if step is not None and step.prompt_tokens:
            yield step
        elif step is not None and step.decodes == sequences:
            decodes.append(step)
    if decodes:
        means = [statistics.fmean(column) for column in zip(*decodes, strict=True)]
        yield StepTime(*means)._replace(seconds=statistics.median(step.seconds for step in decodes))


def _mix(engine: Engine, noting: _Noting, sequences: int, prompt: int) -> Iterator[StepTime]:
    """The steps that prefill while `sequences` decode."""
    for i in range(sequences):
        engine.submit(_request(engine, f"{sequences}+{prompt}-{i}", 2, 2 * BESIDE + DECODES))
    waiting = BESIDE
    while not engine.idle():
        step = _step(engine, noting)
        if step is None:
            continue
        if step.prompt_tokens and step.decodes == sequences:
            yield step
        elif step.decodes == sequences and waiting:
            engine.submit(_request(engine, f"{sequences}+{prompt}-beside-{waiting}", prompt, 1))
            waiting -= 1


def _request(engine: Engine, name: str, prompt: int, tokens: int) -> GenerateRequest:
    """A prompt that no other has had, and so many tokens after it."""
    draw = random.Random(name)
    bound = min(engine.info.vocab_size, 10_000)
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return GenerateRequest(name, (tuple(draw.randrange(bound) for _ in range(prompt)),), params)


def _step(engine: Engine, noting: _Noting) -> StepTime | None:
    """One step; None where it had nothing to run."""
    began_s = time.perf_counter()
    engine.step()
    took_s = time.perf_counter() - began_s
    plan = noting.take()
    return None if plan is None else _of(plan, took_s)


def _of(plan: StepPlan, seconds: float) -> StepTime:
    chunks = [row for row in plan.rows if row.num_tokens > 1]
    decodes = [row for row in plan.rows if row.num_tokens == 1]
    pairs = sum(row.num_tokens * row.start + row.num_tokens * (row.num_tokens + 1) / 2 for row in chunks)
    context = sum(row.start + 1 for row in decodes)
    return StepTime(sum(row.num_tokens for row in chunks), pairs, len(decodes), context, len(plan.rows), seconds)
