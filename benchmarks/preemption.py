"""What is done when pages run out: the single reflexes against the decision, on half of the pages that the requests would like.

    python benchmarks/preemption.py                  recompute, swap and decide in one engine: about 8 minutes on two cores
    python benchmarks/preemption.py --replicas 2     with migrate, which needs somewhere to go: `quire serve`; about 12 minutes
    python benchmarks/preemption.py --requests 24    a first look

Requests have the lengths of the Azure conversation trace (Azure/AzurePublicDataset, AzureLLMInferenceTrace_conv.csv, CC-BY-4.0; cite Patel
et al., Splitwise, ISCA 2024), prompts divided by 8 and outputs by 2, so that sequences grow to about twice what they begin with. Prompts
are random tokens; `--concurrency` requests are open at each replica. The demand is what so many hold at their ends, on average; the pool
has `--pool` of that. TPOT is the mean time of a request's tokens after the first. The recompute tax is the share of all computed tokens
that were computed before. With one replica there is an engine for each mode in this process, so that nothing but the engine decides how
much it is pressed. They take turns step by step, and the clock of each counts its own steps, because a shared machine is not the same from
minute to minute. With several replicas the controller shares requests out, and holds them back; the modes run one after the other, in
every other of `--rounds` in reverse order.

Goals: the decision is at least as good as the best reflex on output tokens/s and on TPOT p99 (within `NOISE`, which runs of one mode
differ by), and its recompute tax is below 2 %.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from moving import add_arguments, goal, report
from recovery import served
from tqdm import tqdm

from quire import LLM, SamplingParams
from quire.deploy.load.report import percentile
from quire.deploy.load.traces import TraceOptions
from quire.deploy.load.workload import LoadRequest, trace_file
from quire.worker.protocol import GenerateRequest

QUIRE = [sys.executable, "-m", "quire.deploy.cli"]
PROMPT_SCALE, OUTPUT_SCALE, MAX_TOKENS, PAGE_SIZE = 8, 2, 1024, 32
TAX_GOAL, NOISE = 0.02, 0.03
DECIDE = "decide"


def pool_pages(trace: list[LoadRequest], args: argparse.Namespace) -> int:
    """Pages of each replica's pool: the share asked for of what its open requests hold at their ends; at least the largest of all."""
    held = [-(-(len(request.prompt) + request.output_tokens) // PAGE_SIZE) for request in trace]
    return max(int(args.pool * args.concurrency * sum(held) / len(held)), max(held) + 1)


def scaled_trace(path: Path, count: int, vocab_size: int) -> list[LoadRequest]:
    """The first `count` requests of the trace that are short enough, with shorter lengths."""
    whole = trace_file(path, 4 * count, TraceOptions(vocab_size=vocab_size))
    scaled = [
        replace(r, prompt=r.prompt[: -(-len(r.prompt) // PROMPT_SCALE)], output_tokens=-(-r.output_tokens // OUTPUT_SCALE)) for r in whole
    ]
    return [r for r in scaled if len(r.prompt) + r.output_tokens <= MAX_TOKENS][:count]


def write_trace(trace: list[LoadRequest], path: Path) -> None:
    """The same lengths, as `quire bench` reads them."""
    rows = (f"2023-11-16 00:00:{i % 60:02d}.000000,{len(r.prompt)},{r.output_tokens}\n" for i, r in enumerate(trace))
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(rows))


class EngineRun:
    """One mode's engine in this process, under the whole load, by a clock that stands still between its steps."""

    def __init__(self, mode: str, args: argparse.Namespace, trace: list[LoadRequest]) -> None:
        options = {"page_size": PAGE_SIZE, "kv_pages": args.kv_pages, "host_memory": args.host_memory, "threads": args.threads}
        self.mode, self._trace, self._concurrency = mode, trace, args.concurrency
        self._engine = LLM(args.model, progress=False, max_running=args.concurrency, preemption=mode, **options).engine
        self._moved = threading.Event()
        self._engine.runner.watch(self._moved.set)
        self._upcoming = iter(enumerate(trace))
        self._times_s: dict[str, list[float]] = {}
        self._sent_s: dict[str, float] = {}
        self._clock_s = 0.0
        self._open = self.ended = 0

    def step(self) -> None:
        """What is to be sent, and one step."""
        for i, request in islice(self._upcoming, self._concurrency - self._open):
            params = SamplingParams(max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True)
            self._engine.submit(GenerateRequest(str(i), (request.prompt,), params))
            self._times_s[str(i)], self._sent_s[str(i)] = [], self._clock_s
            self._open += 1
        begin_s = time.perf_counter()
        outputs = self._engine.step()
        if self._engine.resting:
            self._moved.wait(0.1)
            self._moved.clear()
        self._clock_s += time.perf_counter() - begin_s
        for output in outputs:
            self._times_s[output.request_id].append(self._clock_s)
            if output.finish is not None:
                self._open -= 1
                self.ended += 1

    def figures(self) -> dict[str, Any]:
        """Of a run that has ended."""
        stats, times_s = self._engine.stats(), self._times_s
        tpots_ms = sorted(1000 * (at[-1] - at[0]) / (len(at) - 1) for at in times_s.values() if len(at) > 1)
        asked = sum(len(request.prompt) + request.output_tokens for request in self._trace)
        return {
            "mode": self.mode,
            "failed": 0,
            "output_tokens_per_s": stats.output_tokens / self._clock_s,
            "tpot_p50_ms": percentile(tpots_ms, 50),
            "tpot_p99_ms": percentile(tpots_ms, 99),
            "ttft_p50_ms": percentile(sorted(1000 * (at[0] - self._sent_s[name]) for name, at in times_s.items()), 50),
            "recompute_tax": stats.recomputed_tokens / (asked - stats.prefix_hit_tokens + stats.recomputed_tokens),
            "stall_s": stats.stall_seconds,
            "predicted_s": sum(stats.predicted_seconds.values()),
            "actual_s": sum(stats.actual_seconds.values()),
            "preemptions": stats.preemptions,
            "moved_bytes": stats.moved_bytes,
        }


def run_engines(modes: list[str], args: argparse.Namespace, trace: list[LoadRequest]) -> list[dict[str, Any]]:
    """The figures of every mode. They take turns, step by step, so that all of them see the same machine."""
    runs = [EngineRun(mode, args, trace) for mode in modes]
    with tqdm(total=len(runs) * len(trace), unit="req", file=sys.stderr) as bar:
        while runs_on := [run for run in runs if run.ended < len(trace)]:
            for run in runs_on:
                run.step()
            bar.update(sum(run.ended for run in runs) - bar.n)
    return [run.figures() for run in runs]


def counters(url: str) -> dict[str, float]:
    """The server's counters, summed over replicas: name, or name/label for those by action or kind of move."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for name, labels, value in re.findall(r"^quire_(\w+)_total\{([^}]*replica=[^}]*)\} (\S+)$", text, re.MULTILINE):
        key = re.search(r'(?:action|kind)="(\w+)"', labels)
        full = f"{name}/{key[1]}" if key else name
        found[full] = found.get(full, 0.0) + float(value)
    return found


def run_served(mode: str, args: argparse.Namespace, trace: list[LoadRequest]) -> dict[str, Any]:
    """One mode's figures, from `quire serve` with several replicas."""
    flags = ["--preemption", mode, "--page-size", PAGE_SIZE, "--host-memory", args.host_memory]
    flags += ["--max-running", args.concurrency, "--threads", args.threads]
    with served(args, *map(str, flags)) as server, tempfile.NamedTemporaryFile(suffix=".csv") as lengths:
        bench(server.url, args, "--num-requests", 2 * args.replicas, "--input-tokens", 64, "--output-tokens", 8)  # what is slow once
        before = counters(server.url)
        write_trace(trace, Path(lengths.name))
        load = ["--trace", lengths.name, "--num-requests", len(trace), "--concurrency", args.concurrency * args.replicas]
        found = bench(server.url, args, *load)["summary"]
        time.sleep(1.5)  # the next heartbeat
        spent = {name: value - before.get(name, 0.0) for name, value in counters(server.url).items()}
    computed = found["input_tokens"] - found["cached_tokens"] + found["output_tokens"] + spent["recomputed_tokens"]
    by = {kind: {k.partition("/")[2]: v for k, v in spent.items() if k.startswith(f"{kind}/")} for kind in ("preemptions", "moved_bytes")}
    return {
        "mode": mode,
        "failed": found["requests"] - found["succeeded"],
        "output_tokens_per_s": found["output_tokens_per_s"],
        "tpot_p50_ms": found["tpot_ms"]["p50"],
        "tpot_p99_ms": found["tpot_ms"]["p99"],
        "ttft_p50_ms": found["ttft_ms"]["p50"],
        "recompute_tax": spent["recomputed_tokens"] / computed,
        "stall_s": spent["stall_seconds"],
        "predicted_s": sum(v for k, v in spent.items() if k.startswith("preemption_predicted_seconds/")),
        "actual_s": sum(v for k, v in spent.items() if k.startswith("preemption_seconds/")),
        **by,
    }


def bench(url: str, args: argparse.Namespace, *flags: object) -> dict[str, Any]:
    """What `quire bench` finds."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as report:
        command = [*QUIRE, "bench", "--url", url, "--vocab-size", args.vocab_size, "--json", report.name, *flags]
        done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout}")
        found: dict[str, Any] = json.load(report)
    return found


def pooled(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of all rounds of one mode, and sums of what was done."""
    row = {name: median(r[name] for r in rounds) for name, value in rounds[0].items() if isinstance(value, int | float)}
    sums = {name: {key: sum(r[name].get(key, 0.0) for r in rounds) for key in rounds[0][name]} for name in ("preemptions", "moved_bytes")}
    each = {f"{name}_of_rounds": [r[name] for r in rounds] for name in ("output_tokens_per_s", "tpot_p99_ms")}
    return {"mode": rounds[0]["mode"], **row, **sums, **each}


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was to be shown, beside what was."""
    by_mode = {row["mode"]: row for row in rows}
    failed = sum(row["failed"] for row in rows)
    kept = [goal("requests that failed", "0", not failed, str(failed))]
    if DECIDE not in by_mode or len(by_mode) < 2:
        return kept
    decide, reflexes = by_mode[DECIDE], [row for row in rows if row["mode"] != DECIDE]
    throughput = decide["output_tokens_per_s"] / max(row["output_tokens_per_s"] for row in reflexes)
    tpot, tax = decide["tpot_p99_ms"] / min(row["tpot_p99_ms"] for row in reflexes), decide["recompute_tax"]
    return [
        *kept,
        goal("throughput, of the best reflex's", f"at least {1 - NOISE:.0%}", throughput >= 1 - NOISE, f"{throughput:.1%}"),
        goal("TPOT p99, of the best reflex's", f"at most {1 + NOISE:.0%}", tpot <= 1 + NOISE, f"{tpot:.1%}"),
        goal("recompute tax", f"below {TAX_GOAL:.0%}", tax < TAX_GOAL, f"{tax:.2%}"),
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """As docs/performance.md shows it."""
    lines = [
        "| mode | output tokens/s | TPOT p50 | TPOT p99 | recompute tax | waits | recomputes | swaps | migrations | predicted | actual |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        did = [f"{row['preemptions'].get(action, 0):.0f}" for action in ("wait", "recompute", "swap", "migrate")]
        cells = [
            row["mode"],
            f"{row['output_tokens_per_s']:.1f}",
            f"{row['tpot_p50_ms']:.0f} ms",
            f"{row['tpot_p99_ms']:.0f} ms",
            f"{row['recompute_tax']:.2%}",
            *did,
            f"{row['predicted_s']:.2f} s",
            f"{row['actual_s']:.2f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    here = Path(__file__).resolve()
    data = Path(os.environ.get("QUIRE_DATA", here.parents[2] / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=data / "traces" / "AzureLLMInferenceTrace_conv.csv.gz")
    add_arguments(parser, "preemption", 1, 0)
    parser.add_argument("--vocab-size", type=int, default=10_000, help="bound of random token ids")
    parser.add_argument("--modes", nargs="+", choices=("recompute", "swap", "migrate", DECIDE), help="default: those that are possible")
    parser.add_argument("--requests", type=int, default=180, help="of fewer than about 150, the 99th percentile is one request's")
    parser.add_argument("--concurrency", type=int, default=16, help="open requests of each replica")
    parser.add_argument("--pool", type=float, default=0.5, help="pages, as a share of the demand, if --kv-pages is 0")
    parser.add_argument("--host-memory", default="2GiB", help="of each replica")
    parser.add_argument("--threads", type=int, help="of each replica; default: all cores, shared out")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    args.threads = args.threads or max(len(os.sched_getaffinity(0)) // args.replicas, 1)
    modes = args.modes or ["recompute", "swap", *(["migrate"] if args.replicas > 1 else []), DECIDE]
    trace = scaled_trace(args.trace, args.requests, args.vocab_size)
    args.kv_pages = args.kv_pages or pool_pages(trace, args)
    inputs, outputs = (sum(lengths) / len(trace) for lengths in zip(*((len(r.prompt), r.output_tokens) for r in trace), strict=True))
    print(
        f"{len(trace)} requests of {inputs:.0f} + {outputs:.0f} tokens on average, {args.kv_pages} pages for each replica", file=sys.stderr
    )
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    for number in range(args.rounds):
        order = modes[:: 1 if number % 2 == 0 else -1]
        for last in run_engines(order, args, trace) if args.replicas == 1 else (run_served(mode, args, trace) for mode in order):
            found[last["mode"]].append(last)
            print(
                f"round {number + 1}, {last['mode']}: {last['output_tokens_per_s']:.1f} tokens/s, TPOT p99 {last['tpot_p99_ms']:.0f} ms, "
                f"recompute tax {last['recompute_tax']:.2%}",
                file=sys.stderr,
            )
    rows = [pooled(rounds) for rounds in found.values()]
    print(table(rows))
    return report(args, goals(rows), {"scales": [PROMPT_SCALE, OUTPUT_SCALE], "figures": rows})


if __name__ == "__main__":
    sys.exit(main())
