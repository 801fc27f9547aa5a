"""Prefixes three times as many as the device pool holds: hit rate and time to first token, with a host pool and without.

    python benchmarks/host_tier.py                     about 4 minutes with SmolLM2-135M on two cores
    python benchmarks/host_tier.py --requests 12       a first look

`--prefixes` prompts of `--prefix-tokens` random tokens are asked for at random (the same order in both runs), each time with 16 new
tokens at the end, one request at a time. The pool holds a third of their pages. Every prefix has been computed once before the
measurement begins. TTFT is what the engine takes: nothing else runs. The texts of both runs are compared.

Goals: with the host pool the hit rate is at least 90 % of what an endless pool would give, and TTFT p50 at most half of that without.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

from moving import RESULTS, goal, report
from tqdm import tqdm

from quire import LLM, SamplingParams
from quire.deploy.load.report import percentile
from quire.worker.engine import Engine
from quire.worker.protocol import GenerateRequest

PAGE_SIZE, SUFFIX_TOKENS, OUTPUT_TOKENS = 32, 16, 4
HIT_GOAL, TTFT_GOAL = 0.9, 0.5


class Run:
    """One engine, asked one request after the other."""

    def __init__(self, engine: Engine, label: str, total: int) -> None:
        self.engine = engine
        self.ttft_ms: list[float] = []
        self.texts: list[tuple[int, ...]] = []
        self.cached = 0
        self._bar = tqdm(total=total, desc=label, unit="req", file=sys.stderr)

    def ask(self, prompt: list[int]) -> None:
        """Serve one request to its end; the engine then has all the time it needs for copies, as it would between two users' turns."""
        params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
        began_s = time.perf_counter()
        self.engine.submit(GenerateRequest(str(len(self.texts)), (tuple(prompt),), params))
        text: list[int] = []
        while not self.engine.idle():
            for output in self.engine.step():
                if not text:
                    self.ttft_ms.append(1000 * (time.perf_counter() - began_s))
                    self.cached += output.cached_tokens or 0
                text.extend(output.tokens)
        self.texts.append(tuple(text))
        while self.engine.scheduler.moves.under_way():
            self.engine.step()
        self._bar.update()

    def forget(self) -> None:
        """What was measured until now was the warm-up."""
        self.ttft_ms.clear()
        self.cached = 0


def measure(args: argparse.Namespace, host: bool) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    """The figures of one run, and its texts."""
    each = args.prefix_tokens // PAGE_SIZE
    pages = args.prefixes * each // 3 + 2
    memory = f"{args.host_memory}" if host else 0
    llm = LLM(args.model, progress=False, page_size=PAGE_SIZE, kv_pages=pages, host_memory=memory, threads=args.threads)
    draw = random.Random(args.seed)
    ids = range(llm.engine.info.vocab_size // 2, llm.engine.info.vocab_size - 1)  # far from special tokens
    prefixes = [draw.choices(ids, k=args.prefix_tokens) for _ in range(args.prefixes)]
    run = Run(llm.engine, "with a host pool" if host else "without", args.prefixes + args.requests)
    for prefix in prefixes:
        run.ask([*prefix, 1])
    run.forget()
    before = llm.stats()
    for _ in range(args.requests):
        run.ask([*draw.choice(prefixes), *draw.choices(ids, k=SUFFIX_TOKENS)])
    stats = llm.stats()
    could = args.requests * each * PAGE_SIZE
    moved = {kind: stats.moved_bytes[kind] - before.moved_bytes[kind] for kind in ("out", "in")}
    return {
        "host_pool": host,
        "pages": pages,
        "hit_rate": run.cached / could,
        "from_host": (stats.host_hit_tokens - before.host_hit_tokens) / could,
        "ttft_p50_ms": percentile(sorted(run.ttft_ms), 50),
        "ttft_p99_ms": percentile(sorted(run.ttft_ms), 99),
        "out_bytes": moved["out"],
        "in_bytes": moved["in"],
        "in_pages_per_s": llm.engine.scheduler.costs().in_pages_per_s,
        "prefill_tokens_per_s": llm.engine.scheduler.costs().prefill_tokens_per_s,
    }, run.texts


def table(rows: list[dict[str, Any]]) -> str:
    """As docs/performance.md shows it."""
    lines = ["| | hit rate | of that from host memory | TTFT p50 | TTFT p99 | copied in |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [
            "with a host pool" if row["host_pool"] else "without",
            f"{row['hit_rate']:.1%}",
            f"{row['from_host']:.1%}",
            f"{row['ttft_p50_ms']:.0f} ms",
            f"{row['ttft_p99_ms']:.0f} ms",
            f"{row['in_bytes'] / 2**20:.0f} MiB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prefixes", type=int, default=30)
    parser.add_argument("--prefix-tokens", type=int, default=512)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--host-memory", default="2GiB")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS / "host_tier.json")
    args = parser.parse_args()
    without, expected = measure(args, host=False)
    with_host, texts = measure(args, host=True)
    ratio = with_host["ttft_p50_ms"] / without["ttft_p50_ms"]
    print(table([without, with_host]))
    same = sum(a == b for a, b in zip(texts, expected, strict=True))
    goals = [
        goal("hit rate", f"at least {HIT_GOAL:.0%}", with_host["hit_rate"] >= HIT_GOAL, f"{with_host['hit_rate']:.1%}"),
        goal("TTFT p50, of that without", f"at most {TTFT_GOAL:.0%}", ratio <= TTFT_GOAL, f"{ratio:.1%}"),
        goal("identical texts", "all", texts == expected, str(same)),
    ]
    return report(args, goals, {"figures": [without, with_host]})


if __name__ == "__main__":
    sys.exit(main())
