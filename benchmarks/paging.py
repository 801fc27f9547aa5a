"""How much KV memory paging wastes, and how many requests run at once, against contiguous preallocation.

    python benchmarks/paging.py --trace AzureLLMInferenceTrace_conv.csv.gz --png paging.png

The lengths are those of the Azure conversation trace (Azure/AzurePublicDataset, data/AzureLLMInferenceTrace_conv.csv,
CC-BY-4.0; cite Patel et al., Splitwise, ISCA 2024), in its order, all queued at once. The engine's own scheduler and page
pool serve them twice on the same memory: in pages of 32 tokens, and in one page per request of the maximum length, which is
what a system without paging reserves. Only the arithmetic of the model is left out: it does not change where memory lies.

Waste is the share of allocated slots that hold no token, averaged over all steps.
"""

import argparse
import csv
import gzip
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from quire.worker.config import LimitOptions
from quire.worker.door import Door
from quire.worker.engine import Engine, Runner
from quire.worker.page_pool import PagePool
from quire.worker.plan import Sampled, StepPlan, StepResult
from quire.worker.protocol import GenerateRequest, ModelInfo, SamplingParams
from quire.worker.scheduler import Scheduler

VOCAB = 50_000
WASTE_GOAL, CONCURRENCY_GOAL = 0.04, 2.0


class NoModel(Runner):
    """Answers every sampling row with the same token."""

    def run(self, plan: StepPlan) -> StepResult:
        return StepResult(plan.step, tuple(Sampled(row.seq, 1) for row in plan.rows if row.samples))


class Usage(NamedTuple):
    """One run, step by step."""

    running: list[int]
    allocated_slots: list[int]
    used_slots: list[int]
    preemptions: int

    def waste(self) -> float:
        return 1 - sum(self.used_slots) / sum(self.allocated_slots)

    def mean_running(self) -> float:
        """Over the steps in which the queue was never empty: the ends would flatter whoever runs fewer."""
        return sum(self.running) / len(self.running)


def lengths(trace: Path, longest: int, count: int) -> list[tuple[int, int]]:
    """(prompt tokens, output tokens) of the first `count` requests that fit in `longest`."""
    with gzip.open(trace, "rt") if trace.suffix == ".gz" else trace.open() as file:
        rows = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    fitting = [(i, o) for i, o in rows if i > 0 and o > 0 and i + o <= longest]
    print(f"{trace.name}: {len(rows)} requests, {len(fitting)} of them within {longest} tokens; the first {count} are used")
    return fitting[:count]


def serve(requests: list[tuple[int, int]], pool_tokens: int, page_size: int, longest: int, label: str) -> Usage:
    """Serve all requests from a pool of `pool_tokens`, and record every step while some of them wait."""
    pool = PagePool(pool_tokens // page_size, page_size, b"key", prefix_cache=False)
    scheduler = Scheduler(pool, 2048, 2048)
    door = Door(LimitOptions(), VOCAB, longest, pool_tokens, 2048 + len(requests))
    engine = Engine(scheduler, NoModel(), door, ModelInfo("none", "", longest, VOCAB, (), 0), len(requests))
    for i, (prompt_len, output_len) in enumerate(requests):
        engine.submit(GenerateRequest(str(i), ((2,) * prompt_len,), SamplingParams(max_tokens=output_len)))
    usage = Usage([], [], [], 0)
    with tqdm(total=len(requests), desc=label, unit="req", file=sys.stderr) as bar:
        while scheduler.waiting:
            ended = sum(o.finish is not None for o in engine.step())
            bar.update(ended)
            usage.running.append(len(scheduler.running))
            usage.allocated_slots.append(sum(len(s.pages) for s in scheduler.running) * page_size)
            usage.used_slots.append(sum(s.num_computed for s in scheduler.running))
        bar.update(bar.total - bar.n)
    return usage._replace(preemptions=sum(scheduler.decisions.counts.values()))


def draw(paged: Usage, contiguous: Usage, pool_tokens: int, path: str) -> None:
    """Two panels: what the pool holds over time, and how many requests run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for usage, name, colour in ((paged, "pages of 32 tokens", "tab:blue"), (contiguous, "contiguous, maximum length", "tab:orange")):
        steps = [100 * i / len(usage.running) for i in range(len(usage.running))]
        left.plot(steps, [100 * used / pool_tokens for used in usage.used_slots], color=colour, label=name)
        right.plot(steps, usage.running, color=colour, label=name)
    left.set(title="KV slots that hold a token", ylabel="% of the pool", ylim=(0, 100))
    right.set(title="Requests that run at once", ylabel="requests", ylim=(0, None))
    for axis in (left, right):
        axis.set_xlabel("progress through the trace, %")
        axis.grid(alpha=0.3)
        axis.legend(loc="center right")
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = Path(os.environ.get("QUIRE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser.add_argument("--trace", type=Path, default=data / "traces" / "AzureLLMInferenceTrace_conv.csv.gz")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--pool-tokens", type=int, default=262_144, help="KV memory of both runs, in tokens")
    parser.add_argument("--page-size", type=int, default=32)
    parser.add_argument("--longest", type=int, default=8192, help="the model's context, which contiguous preallocation reserves")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--png", help="draw both runs into this file")
    args = parser.parse_args()
    if not args.trace.exists():
        parser.error(f"{args.trace}: not there; get AzureLLMInferenceTrace_conv.csv from Azure/AzurePublicDataset and name it with --trace")
    requests = lengths(args.trace, args.longest, args.requests)
    paged = serve(requests, args.pool_tokens, args.page_size, args.longest, "paged")
    contiguous = serve(requests, args.pool_tokens, args.longest, args.longest, "contiguous")
    ratio = paged.mean_running() / contiguous.mean_running()
    print(f"pool of {args.pool_tokens} tokens           KV waste   running at once   preemptions")
    for name, usage in ((f"pages of {args.page_size} tokens", paged), (f"one page of {args.longest} per request", contiguous)):
        print(f"{name:<30} {usage.waste():9.2%} {usage.mean_running():17.1f} {usage.preemptions:13d}")
    print(f"waste of paging: {paged.waste():.2%} (goal: under {WASTE_GOAL:.0%})")
    print(f"requests at once: {ratio:.1f} times as many as contiguous (goal: {CONCURRENCY_GOAL:g})")
    if args.json:
        figures = {"requests": len(requests), "pool_tokens": args.pool_tokens, "waste": paged.waste(), "concurrency_ratio": ratio}
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")
    if args.png:
        draw(paged, contiguous, args.pool_tokens, args.png)
    return 0 if paged.waste() < WASTE_GOAL and ratio >= CONCURRENCY_GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
