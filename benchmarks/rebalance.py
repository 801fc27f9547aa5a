"""Skewed arrivals on several replicas, and a prompt that fits nowhere: with and without moving what runs.

    python benchmarks/rebalance.py                              four replicas of SmolLM2-135M: about 5 minutes on two cores
    python benchmarks/rebalance.py --requests 16                a first look

Skew: requests come at random times (Poisson) and are dealt out in turn, and every fourth one is long, so that without moves one replica
gets all the long ones and its pages run out. Outputs that nobody can foresee do the same to any router. TTFT and TPOT are of all requests.

Fragments: every replica is filled to a share with long streams, then a prompt comes that needs more pages than any has left, though
together they have them. With moves, neighbours make way for it; without, it waits until streams end.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from typing import Any

from load_calls import percentile
from moving import Timed, add_arguments, body, goal, model_of, report, spread
from recovery import Server, served

MODES = {"moving": "--rebalance", "staying": "--no-rebalance"}


async def skew(server: Server, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The skewed arrivals."""
    draw, model = random.Random(seed), model_of(server)
    calls = []
    for i in range(args.requests):
        long = i % args.replicas == 0
        calls.append(Timed(server, body(model, draw, args.prompt, args.long_output if long else args.short_output)))
        await asyncio.sleep(draw.expovariate(args.rate))
    for call in calls:
        await call.end()
    tpots = [(c.times_s[-1] - c.times_s[0]) / (len(c.times_s) - 1) for c in calls if len(c.times_s) > 1]
    longest = max(call.times_s[-1] for call in calls if call.times_s) - calls[0].sent_s
    ttfts = [c.ttft_s for c in calls if c.ttft_s is not None]
    gaps = [gap for call in calls for gap in call.gaps_s()]
    return {"ttfts_s": ttfts, "tpots_s": tpots, "gaps_s": gaps, "took_s": longest, "errors": [c.error for c in calls if c.error]}


async def fragments(server: Server, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """A prompt that fits nowhere until others make way."""
    draw, model = random.Random(seed), model_of(server)
    page_tokens = args.page_size * args.kv_pages
    prompt = int(page_tokens * args.fill / args.fillers)
    streams = [Timed(server, body(model, draw, prompt, args.filler_output)) for _ in range(args.fillers * args.replicas)]
    for stream in streams:
        await stream.has(1)
    status = await asyncio.to_thread(server.status)
    pages = [r["pages"] for r in (status or {"replicas": []})["replicas"]]
    free = [p["free"] + p["cached"] for p in pages]
    needed = int(args.kv_pages * args.long_share)
    begun_s = time.perf_counter()
    call = Timed(server, body(model, draw, needed * args.page_size, 4))
    await call.has(1)
    waited_s, ended = time.perf_counter() - begun_s, sum(stream.ended for stream in streams)
    for stream in (*streams, call):
        await stream.end()
    errors = [s.error for s in (*streams, call) if s.error]
    return {"free_pages": free, "needed_pages": needed, "ttft_s": waited_s, "streams_ended_before": ended, "errors": errors}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "rebalance", 4, 48)
    parser.add_argument("--page-size", type=int, default=32)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--short-output", type=int, default=16)
    parser.add_argument("--long-output", type=int, default=200)
    parser.add_argument("--fill", type=float, default=0.6, help="share of each pool that is filled before the long prompt")
    parser.add_argument("--fillers", type=int, default=4, help="streams of which that is made, for each replica")
    parser.add_argument("--filler-output", type=int, default=100, help="tokens")
    parser.add_argument("--long-share", type=float, default=0.5, help="of a pool, for the prompt that fits nowhere")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    found: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {mode: [] for mode in MODES}
    for number in range(args.rounds):
        for mode in list(MODES)[:: 1 if number % 2 == 0 else -1]:
            flags = [MODES[mode], "--routing", "round_robin", "--no-prefix-cache", "--page-size", str(args.page_size)]
            with served(args, *flags) as server:
                skewed = asyncio.run(skew(server, args, args.seed + number))
                found[mode].append((skewed, asyncio.run(fragments(server, args, args.seed + number))))
    figures: dict[str, Any] = {}
    for mode, rounds in found.items():
        ttfts, tpots, gaps = ([v for r, _ in rounds for v in r[name]] for name in ("ttfts_s", "tpots_s", "gaps_s"))
        waits = [f["ttft_s"] for _, f in rounds]
        errors = sum(len(r["errors"]) + len(f["errors"]) for r, f in rounds)
        figures[mode] = {"ttft": spread(ttfts), "tpot": spread(tpots), "between_tokens": spread(gaps), "errors": errors}
        figures[mode] |= {"took_s": [r["took_s"] for r, _ in rounds], "fragments": [f for _, f in rounds], "long_ttft_s": waits}
        print(
            f"{mode:<8} TTFT p50 {percentile(ttfts, 0.5):.2f} s, p99 {percentile(ttfts, 0.99):.2f} s; "
            f"TPOT p50 {1e3 * percentile(tpots, 0.5):.0f} ms, p99 {1e3 * percentile(tpots, 0.99):.0f} ms; "
            f"the prompt that fits nowhere: {', '.join(f'{w:.1f} s' for w in waits)}"
        )
    now, before = figures["moving"], figures["staying"]
    ttft, tpot = ((now[k]["p99_ms"], before[k]["p99_ms"]) for k in ("ttft", "tpot"))
    errors = now["errors"] + before["errors"]
    goals = [
        goal("TTFT p99", "shorter with moves", ttft[0] < ttft[1], f"{ttft[0]:.0f} ms, without {ttft[1]:.0f} ms"),
        goal("TPOT p99", "shorter with moves", tpot[0] < tpot[1], f"{tpot[0]:.0f} ms, without {tpot[1]:.0f} ms"),
        goal(
            "a prompt that fits nowhere is served before a stream ends",
            "always",
            all(f["streams_ended_before"] == 0 for f in now["fragments"]),
            ", ".join(f"after {f['ttft_s']:.1f} s, {f['streams_ended_before']} had ended" for f in now["fragments"]),
        ),
        goal("errors", "0", errors == 0, str(errors)),
    ]
    return report(args, goals, figures)


if __name__ == "__main__":
    sys.exit(main())
