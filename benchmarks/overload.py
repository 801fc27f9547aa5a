"""As many requests as the server can take, and three times as many: what is served in time, and what the rest hear, and how soon.

    python benchmarks/overload.py                  3 to 4 minutes with SmolLM2-135M on two cores
    python benchmarks/overload.py --seconds 10     a first look
    python benchmarks/overload.py --json overload.json

It starts `quire serve`, measures its capacity in a closed loop, and then sends requests at random times (Poisson), first at that rate and
then at three times that, each with `deadline_ms` of half the SLO. Goals: requests that get their first token within `--slo-ms` are at 3x
at least 90 % of those at 1x; everybody else gets 429 with Retry-After, at once; nobody hears of the deadline later than it was;
and the memory of the server's processes stays flat. Prompts are random tokens, so that nothing is cached.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from load_calls import Call, Served, make_call, percentile, run, serving
from tqdm import tqdm

TENANT = "one"
GOODPUT_GOAL, GROWTH_GOAL = 0.9, 1.1
ANSWER_S = 30.0  # after the last arrival, for the answers
LATE_S = 1.0  # that an answer may take beyond the deadline: the server is busy


async def capacity(server: Served, options: argparse.Namespace) -> float:
    """Requests a second, with twice as many open as can run."""
    draw, ends_s = random.Random("capacity"), []
    begin_s = time.perf_counter()
    until_s = begin_s + options.capacity_s

    async def one_after_another() -> None:
        while time.perf_counter() < until_s:
            call = await run(server.url, make_call(draw, TENANT, options.input, options.output))
            if call.status == 200 and call.end_s is not None and call.end_s <= until_s:
                ends_s.append(call.end_s)

    async with asyncio.TaskGroup() as group:
        for _ in range(2 * options.max_running):
            group.create_task(one_after_another())
    warm_s = options.capacity_s / 3  # the start, in which the batch fills
    return sum(end_s > begin_s + warm_s for end_s in ends_s) / (options.capacity_s - warm_s)


async def play(server: Served, per_s: float, options: argparse.Namespace, label: str) -> dict[str, Any]:
    """Poisson arrivals at `per_s`."""
    draw = random.Random("arrivals")
    calls: list[Call] = []
    tasks: list[asyncio.Task[Call]] = []
    memory = [server.resident_mib()]
    begin_s = time.perf_counter()
    due_s = begin_s + draw.expovariate(per_s)
    with tqdm(total=int(options.seconds), desc=label, unit="s", file=sys.stderr) as bar:
        while due_s < begin_s + options.seconds:
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            calls.append(make_call(draw, TENANT, options.input, options.output, options.slo_ms // 2))
            tasks.append(asyncio.create_task(run(server.url, calls[-1])))
            due_s += draw.expovariate(per_s)
            if int(due_s - begin_s) > bar.n:
                bar.update(min(int(due_s - begin_s), bar.total) - bar.n)
                memory.append(await asyncio.to_thread(server.resident_mib))
    _, late = await asyncio.wait(tasks, timeout=ANSWER_S)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    return figures(calls, len(late), memory, options)


def figures(calls: list[Call], unanswered: int, memory: list[float], options: argparse.Namespace) -> dict[str, Any]:
    """Of one rate."""
    refused = [call for call in calls if call.status == 429]
    expired = [call for call in calls if call.status == 504]
    ttfts_s = [call.ttft_s for call in calls if call.ttft_s is not None]
    in_time = sum(ttft_s <= options.slo_ms / 1000 for ttft_s in ttfts_s)
    milliseconds: Callable[[list[Call]], list[float]] = lambda some: [1000 * (c.end_s - c.sent_s) for c in some if c.end_s is not None]  # noqa: E731
    return {
        "requests": len(calls),
        "statuses": dict(Counter(str(call.status) for call in calls)),
        "failed": sum(bool(call.error) for call in calls),
        "unanswered": unanswered,
        "goodput_per_s": in_time / options.seconds,
        "ttft_p50_ms": 1000 * percentile(ttfts_s, 0.5),
        "ttft_p99_ms": 1000 * percentile(ttfts_s, 0.99),
        "without_retry_after": sum(call.retry_after_s is None for call in refused),
        "retry_after_s": [percentile([c.retry_after_s or 0.0 for c in refused], share) for share in (0.0, 0.5, 1.0)],
        "refused_p50_ms": percentile(milliseconds(refused), 0.5),
        "refused_p99_ms": percentile(milliseconds(refused), 0.99),
        "expired_most_ms": percentile(milliseconds(expired), 1.0),
        "memory_first_mib": max(memory[: max(1, len(memory) // 4)]),
        "memory_most_mib": max(memory),
    }


async def measure(server: Served, options: argparse.Namespace) -> dict[str, Any]:
    for _ in range(2):  # what is slow once
        await run(server.url, make_call(random.Random(0), TENANT, options.input, options.output))
    print(f"measuring the capacity for {options.capacity_s:g} s", file=sys.stderr)
    per_s = await capacity(server, options)
    if not per_s:
        raise RuntimeError(f"no request ended: {server.log}")
    found: dict[str, Any] = {"capacity_per_s": per_s}
    for times in (1, 3):
        found[f"{times}x"] = await play(server, times * per_s, options, f"{times}x")
        await asyncio.sleep(2.0)
    return found


def goals(found: dict[str, Any], options: argparse.Namespace) -> dict[str, bool]:
    once, thrice = found["1x"], found["3x"]
    return {
        "goodput": thrice["goodput_per_s"] >= GOODPUT_GOAL * once["goodput_per_s"],
        "the rest gets 429 with Retry-After": thrice["without_retry_after"] == 0 and thrice["failed"] == 0 and thrice["unanswered"] == 0,
        "nothing waits beyond its deadline": not thrice["expired_most_ms"] > options.slo_ms / 2 + 1000 * LATE_S,  # nan: none expired
        "memory is flat": thrice["memory_most_mib"] <= GROWTH_GOAL * thrice["memory_first_mib"],
    }


def table(found: dict[str, Any], options: argparse.Namespace) -> str:
    """The figures for people."""
    shape = f"{options.input} + {options.output} tokens; in time: TTFT <= {options.slo_ms} ms; deadline {options.slo_ms // 2} ms"
    lines = [f"capacity {found['capacity_per_s']:.1f} requests/s of {shape}", f"{'':<34}{'1x':>30}{'3x':>30}"]
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "requests": lambda f: f"{f['requests']}",
        "by status": lambda f: ", ".join(f"{status}: {count}" for status, count in sorted(f["statuses"].items())),
        "failed, unanswered": lambda f: f"{f['failed']}, {f['unanswered']}",
        "goodput": lambda f: f"{f['goodput_per_s']:.2f}/s",
        "TTFT p50, p99": lambda f: f"{f['ttft_p50_ms']:.0f}, {f['ttft_p99_ms']:.0f} ms",
        "429 after p50, p99": lambda f: f"{f['refused_p50_ms']:.0f}, {f['refused_p99_ms']:.0f} ms",
        "Retry-After least, median, most": lambda f: ", ".join(f"{s:.0f}" for s in f["retry_after_s"]) + " s",
        "504 after at most": lambda f: f"{f['expired_most_ms']:.0f} ms",
        "memory at first, at most": lambda f: f"{f['memory_first_mib']:.0f}, {f['memory_most_mib']:.0f} MiB",
    }
    lines += [f"{name:<34}{cell(found['1x']):>30}{cell(found['3x']):>30}" for name, cell in rows.items()]
    return re.sub(r"\bnan\b", "-", "\n".join(lines))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=50.0, help="of arrivals at each rate")
    parser.add_argument("--capacity-s", type=float, default=30.0, help="seconds in which the capacity is measured")
    parser.add_argument("--slo-ms", type=int, default=4000, help="time to first token that counts as in time")
    parser.add_argument("--input", type=int, default=64, help="prompt tokens")
    parser.add_argument("--output", type=int, default=16, help="output tokens")
    parser.add_argument("--max-running", type=int, default=16)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("serve", nargs="*", help="more flags for `quire serve`, after --")
    options = parser.parse_args()
    flags = ["--max-running", str(options.max_running), "--kv-pages", "1024", "--replicas", str(options.replicas), *options.serve]
    print(f"starting quire serve {' '.join(flags)}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), (TENANT,), flags) as server:
        found = asyncio.run(measure(server, options))
    print(table(found, options))
    kept = goals(found, options)
    for name, good in kept.items():
        print(f"{'met' if good else 'missed':<8}{name}")
    if options.json:
        asked = {**vars(options), "json": str(options.json)}
        text = json.dumps({"options": asked, "goals": kept, **found}, indent=1)
        options.json.write_text(text.replace("NaN", "null") + "\n")  # JSON knows no nan
    return 0 if all(kept.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
