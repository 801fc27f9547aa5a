"""What a step costs on the host, without a model: plan, apply, and the frames' bytes.

    python benchmarks/host_overhead.py

On a GPU this is what decides how busy the device is kept. The goal is 1 ms a step at 64 running sequences and 3 ms at 256.
Every sequence decodes one token a step, gets a new page every 32 steps, and its full pages are hashed and indexed.
"""

import argparse
import json
import statistics
import time

from quire.worker.config import LimitOptions
from quire.worker.door import Door
from quire.worker.engine import Engine, Runner
from quire.worker.page_pool import PagePool
from quire.worker.plan import Sampled, StepPlan, StepResult
from quire.worker.protocol import Frame, GenerateRequest, ModelInfo, SamplingParams, pack_frame
from quire.worker.scheduler import Scheduler

PAGE_SIZE, PROMPT_TOKENS, VOCAB = 32, 512, 50_000
GOALS_MS = {64: 1.0, 256: 3.0}


class NoModel(Runner):
    """Answers every sampling row with a token at once."""

    def run(self, plan: StepPlan) -> StepResult:
        return StepResult(plan.step, tuple(Sampled(row.seq, (row.seq * 7919 + row.start) % VOCAB) for row in plan.rows if row.samples))


def engine_with(running: int, steps: int) -> Engine:
    """An engine in which `running` sequences decode and nothing is left to prefill."""
    output_tokens = steps + running  # the first sequences decode while the last are prefilled
    pages = running * (2 + (PROMPT_TOKENS + output_tokens) // PAGE_SIZE)
    scheduler = Scheduler(PagePool(pages, PAGE_SIZE, b"key"), 8192, running)
    door = Door(LimitOptions(), VOCAB, 8192, pages * PAGE_SIZE, running)
    engine = Engine(scheduler, NoModel(), door, ModelInfo("none", "", 8192, VOCAB, (), 0), 0)
    for i in range(running):
        prompt = tuple((i * 31 + j) % VOCAB for j in range(PROMPT_TOKENS))
        engine.submit(GenerateRequest(f"cmpl-{i:032x}", (prompt,), SamplingParams(max_tokens=output_tokens, seed=i)))
    while any(len(s.tokens) - s.num_computed > 1 for s in scheduler.running) or scheduler.waiting:
        engine.step()
    return engine


def measure(running: int, steps: int) -> dict[str, float]:
    """Median and 99th percentile of a step's host time, and the medians of its parts, in milliseconds."""
    engine = engine_with(running, steps)
    parts: dict[str, list[float]] = {"plan": [], "apply": [], "frame": []}
    for number in range(steps):
        t0 = time.perf_counter()
        plan = engine.scheduler.plan()
        t1 = time.perf_counter()
        result = engine.runner.run(plan)
        t2 = time.perf_counter()
        outputs = engine.scheduler.apply(result)
        t3 = time.perf_counter()
        pack_frame(Frame("replica-0", 1, number, tuple(outputs)))
        t4 = time.perf_counter()
        for name, seconds in (("plan", t1 - t0), ("apply", t3 - t2), ("frame", t4 - t3)):
            parts[name].append(seconds * 1e3)
        if len(outputs) != running:
            raise RuntimeError(f"{len(outputs)} of {running} sequences advanced")
    totals = sorted(map(sum, zip(*parts.values(), strict=True)))
    medians = {f"{name}_ms": statistics.median(values) for name, values in parts.items()}
    return {"running": running, "p50_ms": statistics.median(totals), "p99_ms": totals[int(len(totals) * 0.99)], **medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="steps measured at each size")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    print(f"{'running':>8} {'p50 ms':>8} {'p99 ms':>8} {'plan':>7} {'apply':>7} {'frame':>7} {'goal ms':>8}")
    rows = []
    for running, goal_ms in GOALS_MS.items():
        row = measure(running, args.steps)
        rows.append(row | {"goal_ms": goal_ms})
        figures = " ".join(f"{row[k]:7.3f}" for k in ("plan_ms", "apply_ms", "frame_ms"))
        print(f"{running:>8} {row['p50_ms']:8.3f} {row['p99_ms']:8.3f} {figures} {goal_ms:8.1f}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
