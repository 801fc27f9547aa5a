"""The decision against the single reflexes, under a load that wants twice the pages that there are, on a virtual clock.

Steps and copies take what they take on two cores (`quire profile`, SmolLM2-135M), so every figure is the same in every run;
`benchmarks/preemption.py` measures the same with a model.
"""

from __future__ import annotations

import random
from itertools import islice

import pytest

from quire.worker.config import LimitOptions
from quire.worker.door import Door
from quire.worker.engine import Engine, Runner
from quire.worker.page_pool import PagePool
from quire.worker.plan import Moved, MoveKind, Sampled, StepPlan, StepResult
from quire.worker.protocol import GenerateRequest, ModelInfo, SamplingParams
from quire.worker.scheduler import Scheduler

PAGE_SIZE, VOCAB, CONCURRENCY, REQUESTS = 32, 50_000, 16, 300
PAGES_PER_S, COPY_S = 1500.0, 0.0005


class VirtualRunner(Runner):
    """Moves pages and computes steps in no time but that of its clock."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._free_s: dict[MoveKind, float] = {}  # when what stands in a queue will have ended
        self._moving: list[tuple[float, Moved]] = []

    def run(self, plan: StepPlan) -> StepResult:
        for move in plan.moves:
            begin_s = max(self._free_s.get(move.kind, 0.0), self.now_s)
            end_s = begin_s + COPY_S + len(move.pages) / PAGES_PER_S
            self._free_s[move.kind] = end_s
            self._moving.append((end_s, Moved(move.move, len(move.pages), end_s - begin_s)))
        tokens = sum(row.num_tokens for row in plan.rows)
        context = sum(row.start for row in plan.rows if row.num_tokens == 1)
        pairs = sum(row.num_tokens * (row.start + row.num_tokens / 2) for row in plan.rows if row.num_tokens > 1)
        if plan.rows:
            self.now_s += 0.0365 + 0.003 * max(tokens, 4) + 0.00065 * len(plan.rows) + 7.3e-6 * context + 1.76e-6 * pairs
        return StepResult(plan.step, tuple(Sampled(row.seq, (row.seq * 7919 + row.start) % VOCAB) for row in plan.rows if row.samples))

    def poll(self) -> tuple[Moved, ...]:
        ended = tuple(moved for end_s, moved in self._moving if end_s <= self.now_s)
        self._moving = [some for some in self._moving if some[0] > self.now_s]
        return ended

    def rest(self) -> None:
        """Until the next move has ended."""
        self.now_s = min(end_s for end_s, _ in self._moving)


def played(mode: str, lengths: list[tuple[int, ...]], pages: int) -> dict[str, float]:
    """The figures of one mode, for requests of (prompt, output) tokens, `CONCURRENCY` of them open all the time."""
    runner, draw = VirtualRunner(), random.Random(1)
    scheduler = Scheduler(PagePool(pages, PAGE_SIZE, b"key"), 512, CONCURRENCY, host_pages=1000, preemption=mode)
    door = Door(LimitOptions(), VOCAB, 8192, pages * PAGE_SIZE, CONCURRENCY)
    info = ModelInfo("none", "", 8192, VOCAB, (), 0)
    engine = Engine(scheduler, runner, door, info, CONCURRENCY, clock=lambda: runner.now_s)
    upcoming, open_requests, times_s = iter(enumerate(lengths)), 0, dict[str, list[float]]()
    while open_requests or len(times_s) < len(lengths):
        for i, (prompt, output) in islice(upcoming, CONCURRENCY - open_requests):
            params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
            engine.submit(GenerateRequest(f"{i}", (tuple(draw.randrange(VOCAB) for _ in range(prompt)),), params))
            times_s[f"{i}"] = []
            open_requests += 1
        for out in engine.step():
            times_s[out.request_id].append(runner.now_s)
            open_requests -= out.finish is not None
        if engine.resting:
            runner.rest()
    stats = engine.stats()
    assert [len(at) for at in times_s.values()] == [output for _, output in lengths]
    assert stats.pages_active == stats.pages_reserved == stats.host_pages_active == 0
    tpots_s = sorted((at[-1] - at[0]) / (len(at) - 1) for at in times_s.values())
    return {
        "tokens_per_s": stats.output_tokens / runner.now_s,
        "tpot_p99_s": tpots_s[int(0.99 * len(tpots_s))],
        "tax": stats.recomputed_tokens / (sum(map(sum, lengths)) - stats.prefix_hit_tokens + stats.recomputed_tokens),
        "moves": sum(stats.preemptions.values()) - stats.preemptions["wait"],
    }


@pytest.mark.parametrize("seed", range(3))
def test_the_decision_is_as_good_as_the_best_reflex(seed: int):
    draw = random.Random(seed)
    lengths = [tuple(min(int(draw.lognormvariate(mean, 0.8)) + 8, 500) for mean in (4.3, 3.9)) for _ in range(REQUESTS)]
    held = [-(-sum(some) // PAGE_SIZE) for some in lengths]
    pages = CONCURRENCY * sum(held) // len(held) // 2
    found = {mode: played(mode, lengths, pages) for mode in ("recompute", "swap", "decide")}
    reflexes, decide = [found["recompute"], found["swap"]], found["decide"]
    assert all(row["moves"] >= 20 for row in found.values()), found  # it was a load that presses
    assert decide["tokens_per_s"] >= 0.97 * max(row["tokens_per_s"] for row in reflexes), found
    assert decide["tpot_p99_s"] <= 1.03 * min(row["tpot_p99_s"] for row in reflexes), found
    assert decide["tax"] < 0.02 < found["recompute"]["tax"], found
