"""Long prompts arrive while others stream: what the streams notice, with replicas that do everything and with one that only prefills.

    python benchmarks/disaggregation.py                      two replicas of SmolLM2-135M: about 5 minutes on two cores
    python benchmarks/disaggregation.py --streams 2 --seconds 8 --rounds 1      a first look

The same streams and the same long prompts, in the same order, once with `--prefill-replicas 0` and once with 1, in turns. TPOT is the
time between two tokens of a stream that runs while prompts arrive; a prefill that shares its replica makes some of them long.
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

MODES = {"together": 0, "apart": 1}


async def play(server: Server, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Streams, and prompts that arrive beside them."""
    draw, model = random.Random(seed), model_of(server)
    await Timed(server, body(model, draw, args.long_prompt, 4)).end()
    streams = [Timed(server, body(model, draw, args.prompt, args.tokens)) for _ in range(args.streams)]
    for stream in streams:
        await stream.has(8)
    begun_s = time.perf_counter()
    arrivals: list[Timed] = []
    while (now_s := time.perf_counter()) - begun_s < args.seconds:
        arrivals.append(Timed(server, body(model, draw, args.long_prompt, args.answer)))
        await asyncio.sleep(max(now_s + args.every_s - time.perf_counter(), 0.0))
    ended_s = time.perf_counter()
    gaps = [gap for stream in streams for gap in stream.gaps_s(begun_s, ended_s)]
    status = await asyncio.to_thread(server.status)
    places = {row["id"]: row["replica"] for row in (status or {"requests": []})["requests"]}
    for stream in (*streams, *arrivals):
        await stream.end()
    ttfts = [a.ttft_s for a in arrivals if a.ttft_s is not None]
    errors = [s.error for s in (*streams, *arrivals) if s.error]
    return {"gaps_s": gaps, "ttfts_s": ttfts, "errors": errors, "where": [places.get(s.request_id) for s in streams]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "disaggregation", 2, 2048)
    parser.add_argument("--streams", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the streams' prompts")
    parser.add_argument("--tokens", type=int, default=500, help="that each stream generates")
    parser.add_argument("--long-prompt", type=int, default=1500, help="tokens")
    parser.add_argument("--answer", type=int, default=8, help="tokens after a long prompt")
    parser.add_argument("--every-s", type=float, default=5.0, help="a long prompt arrives")
    parser.add_argument("--seconds", type=float, default=25.0, help="in which they arrive")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for number in range(args.rounds):
        for mode in list(MODES)[:: 1 if number % 2 == 0 else -1]:
            with served(args, "--no-rebalance", "--prefill-replicas", str(MODES[mode])) as server:
                found[mode].append(asyncio.run(play(server, args, args.seed + number)))
    figures = {}
    for mode, rounds in found.items():
        gaps, ttfts = ([value for r in rounds for value in r[name]] for name in ("gaps_s", "ttfts_s"))
        figures[mode] = {"tpot": spread(gaps), "ttft_long": spread(ttfts), "errors": sum(len(r["errors"]) for r in rounds)}
        figures[mode]["streams_at"] = [r["where"] for r in rounds]
        print(
            f"{mode:<9} TPOT p50 {1e3 * percentile(gaps, 0.5):.0f} ms, p99 {1e3 * percentile(gaps, 0.99):.0f} ms; TTFT p50 of long prompts "
            f"{percentile(ttfts, 0.5):.2f} s, p99 {percentile(ttfts, 0.99):.2f} s"
        )
    before, after = figures["together"]["tpot"]["p99_ms"], figures["apart"]["tpot"]["p99_ms"]
    errors = sum(f["errors"] for f in figures.values())
    goals = [
        goal("TPOT p99 of running streams while long prompts arrive", "shorter apart", after < before, f"{before:.0f} -> {after:.0f} ms"),
        goal("errors", "0", errors == 0, str(errors)),
    ]
    return report(args, goals, {"figures": figures})


if __name__ == "__main__":
    sys.exit(main())
