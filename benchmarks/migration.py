"""What moving a running request costs: its own pause against its context, its neighbours, and the bytes.

    python benchmarks/migration.py                       two replicas of SmolLM2-135M: about 5 minutes on two cores
    python benchmarks/migration.py --contexts 128 512 --streams 2 --phases 1      a first look

Downtime is what the client sees: the gap between the last token that came before the move and the first after it, less a usual step of
that stream. Each stream has a random prompt, so its first move sends every page; then it moves back, where only what has changed since is
missing. Neighbours are streams that stay where they are while others move back and forth beside them, and stand beside the same streams
while nobody moves; phases of both take turns. What had to be sent is counted from tokens: a page for each `page_size` of the context
that the destination cannot have, the last one partly filled.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from load_calls import percentile
from moving import Timed, add_arguments, body, goal, migrate, model_of, report, spread, step_s, where
from recovery import Server, served
from tqdm import tqdm

STEPS_GOAL, DOWNTIME_GOAL_S = 3.0, 0.060  # whichever is more
SLOWDOWN_GOAL = 0.05
BEFORE = 12  # texts before a move, which say how long a step is
AFTER = 6
REPLICAS = ("replica-0", "replica-1")
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "migration.png"


def other(replica: str) -> str:
    return REPLICAS[replica == REPLICAS[0]]


async def one_move(server: Server, stream: Timed, page_size: int, context: int, sent_before: int) -> dict[str, Any]:
    """One move of a stream that runs; `sent_before` of its tokens may be at the destination already."""
    at = len(stream.times_s)
    await stream.has(at + BEFORE)
    source, begun_s = await where(server, stream), time.perf_counter()
    told = await migrate(server, stream, other(source))
    moved_s = time.perf_counter()
    await stream.has(len(stream.times_s) + AFTER)
    around = [b - a for a, b in zip(stream.times_s, stream.times_s[1:], strict=False) if b > begun_s and a < moved_s]
    usual_s = step_s(stream.gaps_s(until_s=begun_s)[-BEFORE:])
    tokens = context + sum(t <= moved_s for t in stream.times_s)
    return {
        "context": context,
        "back": sent_before > 0,
        "outcome": told["outcome"],
        "reason": told["reason"],
        "downtime_s": max(max(around, default=0.0) - usual_s, 0.0),
        "step_s": usual_s,
        "told_ms": told["downtime_ms"],
        "pages": told["pages"],
        "bytes": told["bytes"],
        "pages_needed": -(-tokens // page_size) - sent_before // page_size,
        "tokens": tokens,
        "took_s": moved_s - begun_s,
    }


async def downtimes(server: Server, args: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """A move and the way back, of streams of every context."""
    draw = random.Random(args.seed)
    found = []
    for context in tqdm([c for c in args.contexts for _ in range(args.streams)], desc="moves", file=sys.stderr):
        stream = Timed(server, body(model, draw, context, 4 * BEFORE + 8 * AFTER + 40))
        first = await one_move(server, stream, args.page_size, context, 0)
        found.append(first)
        if first["outcome"] == "moved":
            found.append(await one_move(server, stream, args.page_size, context, first["tokens"]))
        await stream.end()
        if stream.error:
            raise RuntimeError(stream.error)
    return found


async def neighbours(server: Server, args: argparse.Namespace, model: str) -> dict[str, Any]:
    """Tokens a second of streams that stay, with and without streams that move beside them."""
    draw = random.Random(args.seed + 1)
    rates: dict[bool, list[float]] = {False: [], True: []}
    moves = 0
    for phase in tqdm(range(args.phases), desc="neighbours", file=sys.stderr):
        tokens = int(args.phase_s * 2 * 60) + 200
        staying = [Timed(server, body(model, draw, 64, tokens)) for _ in range(args.neighbours)]
        moving = [Timed(server, body(model, draw, args.neighbour_context, tokens)) for _ in range(2)]
        for stream in (*staying, *moving):
            await stream.has(BEFORE)
        places = [await where(server, stream) for stream in moving]
        for moves_now in (False, True) if phase % 2 == 0 else (True, False):  # contexts grow, so neither may always be the later
            begun_s = time.perf_counter()
            while time.perf_counter() - begun_s < args.phase_s:
                if moves_now:  # the two change places, so that each replica has the same work
                    told = await asyncio.gather(*(migrate(server, s, other(at)) for s, at in zip(moving, places, strict=True)))
                    places = [other(at) if t["outcome"] == "moved" else at for t, at in zip(told, places, strict=True)]
                    moves += sum(t["outcome"] == "moved" for t in told)
                await asyncio.sleep(args.pause_s)
            ended_s = time.perf_counter()
            got = sum(begun_s < t <= ended_s for stream in staying for t in stream.times_s)
            rates[moves_now].append(got / (ended_s - begun_s))
        for stream in (*staying, *moving):
            stream.task.cancel()
        await asyncio.gather(*(s.task for s in (*staying, *moving)), return_exceptions=True)
        await asyncio.sleep(1.0)
    calm, busy = statistics.mean(rates[False]), statistics.mean(rates[True])
    return {"calm_tokens_per_s": calm, "busy_tokens_per_s": busy, "slowdown": 1 - busy / calm, "moves": moves, "phases": args.phases}


def by_context(moves: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each context."""
    rows = []
    for context in sorted({m["context"] for m in moves}):
        of = [m for m in moves if m["context"] == context and m["outcome"] == "moved"]
        if of:
            needed = sum(m["pages_needed"] for m in of)
            rows.append(
                {
                    "context": context,
                    "moves": len(of),
                    **spread([m["downtime_s"] for m in of]),
                    "step_ms": 1e3 * statistics.median(m["step_s"] for m in of),
                    "told_ms": statistics.median(m["told_ms"] for m in of),
                    "pages_of_needed": sum(m["pages"] for m in of) / needed,
                    "first_mib": statistics.median(m["bytes"] for m in of if not m["back"]) / 2**20,
                }
            )
    return rows


def draw_picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Downtime against context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    contexts = [row["context"] for row in rows]
    axis.plot(contexts, [row["p50_ms"] for row in rows], "o-", label="downtime, median")
    axis.plot(contexts, [row["most_ms"] for row in rows], "^:", label="downtime, longest")
    axis.plot(contexts, [row["step_ms"] for row in rows], "s--", color="grey", label="one decode step")
    limits = [max(STEPS_GOAL * row["step_ms"], 1e3 * DOWNTIME_GOAL_S) for row in rows]
    axis.plot(contexts, limits, color="tab:red", linewidth=1, label="goal for the p99")
    axis.set(xscale="log", xlabel="context, tokens", ylabel="ms", ylim=(0, None), title="A running request moves: how long it stands still")
    axis.set_xticks(contexts, [str(c) for c in contexts])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


async def bench(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    model = model_of(server)
    warm = Timed(server, body(model, random.Random(args.seed + 2), 64, 80))  # the first move is slower
    await one_move(server, warm, args.page_size, 64, 0)
    await warm.end()
    return {"moves": await downtimes(server, args, model), "neighbours": await neighbours(server, args, model)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "migration", 2, 1024)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096, 7900])
    parser.add_argument("--streams", type=int, default=2, help="of each context")
    parser.add_argument("--page-size", type=int, default=32)
    parser.add_argument("--neighbours", type=int, default=6, help="streams that stay")
    parser.add_argument("--neighbour-context", type=int, default=1024, help="prompt tokens of the streams that move beside them")
    parser.add_argument("--phases", type=int, default=4, help="pairs of a calm phase and one with moves")
    parser.add_argument("--phase-s", type=float, default=8.0)
    parser.add_argument("--pause-s", type=float, default=0.5, help="between two moves of a stream")
    parser.add_argument("--png", type=Path, default=PICTURE, help="downtime against context")
    args = parser.parse_args()
    with served(args, "--no-rebalance", "--page-size", str(args.page_size)) as server:
        found = asyncio.run(bench(server, args))
    rows = by_context(found["moves"])
    print("| context | moves | downtime p50 | p99 | longest | step | by the source | pages sent / needed | first move |\n|" + "---|" * 9)
    for r in rows:
        cells = [
            f"{r['p50_ms']:.0f} ms",
            f"{r['p99_ms']:.0f} ms",
            f"{r['most_ms']:.0f} ms",
            f"{r['step_ms']:.0f} ms",
            f"{r['told_ms']:.0f} ms",
        ]
        print(f"| {r['context']} | {r['moves']} | {' | '.join(cells)} | {r['pages_of_needed']:.2f} | {r['first_mib']:.1f} MiB |")
    done = [m for m in found["moves"] if m["outcome"] == "moved"]
    p99_s = percentile([m["downtime_s"] for m in done], 0.99)
    limit_s = max(STEPS_GOAL * step_s(m["step_s"] for m in done), DOWNTIME_GOAL_S)
    flat = rows[-1]["p50_ms"] - rows[0]["p50_ms"] if rows else float("nan")
    sent, needed = sum(m["pages"] for m in done), sum(m["pages_needed"] for m in done)
    slow = found["neighbours"]["slowdown"]
    wanted = f"at most {1e3 * limit_s:.0f} ms (3 steps or 60 ms)"
    goals = [
        goal("every move succeeds", "all", len(done) == len(found["moves"]), f"{len(done)} of {len(found['moves'])}"),
        goal("downtime p99", wanted, p99_s <= limit_s, f"{1e3 * p99_s:.0f} ms"),
        goal(
            "longest context against shortest, median",
            "flat: within one step",
            flat <= (rows[-1]["step_ms"] if rows else 0),
            f"{flat:+.0f} ms",
        ),
        goal("neighbours' tokens/s", f"at most {SLOWDOWN_GOAL:.0%} fewer", slow <= SLOWDOWN_GOAL, f"{-slow:+.1%}"),
        goal(
            "pages sent, of those that had to be", "at most 1.1", sent <= 1.1 * needed, f"{sent / needed if needed else float('nan'):.2f}"
        ),
    ]
    draw_picture(rows, args.png)
    return report(args, goals, {"by_context": rows, **found})


if __name__ == "__main__":
    sys.exit(main())
