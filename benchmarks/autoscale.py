"""A load that rises and falls, and replicas that come and go with it: what clients notice, and a picture of it.

    python benchmarks/autoscale.py                     SmolLM2-135M, 1 to 3 replicas and back: about 5 minutes on two cores
    python benchmarks/autoscale.py --model random --tokens 1500 --kv-pages 288      a first look

First all streams run undisturbed on one replica, which says what their texts are. Then they arrive in a rising and falling stream: after
t seconds of the rise so many are kept going as the line from 1 to `--peak` says, and back. The autoscaler starts replicas, running
sequences move to them, and when the load falls replicas are emptied by migration and end. No stream may be lost, and no text may differ.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

from moving import RESULTS, WAIT_S, Timed, body, goal, model_of, report
from recovery import Server, differences, served

LOOK_S = 0.5
ROOT = RESULTS.parent.parent
PICTURE = ROOT / "docs" / "autoscaling.png"


def wanted_at(now_s: float, args: argparse.Namespace) -> int:
    """Streams that are to be going after so many seconds: a rise, a plateau, a fall, and a rest with one at a time."""
    rise_s, hold_s = args.rise_s, args.hold_s
    if now_s < rise_s:
        share = now_s / rise_s
    elif now_s < rise_s + hold_s:
        share = 1.0
    else:
        share = max(1 - (now_s - rise_s - hold_s) / rise_s, 0.0)
    return 1 + round((args.peak - 1) * share)


async def look(server: Server, begun_s: float, streams: Sequence[Timed]) -> dict[str, Any] | None:
    """How it stands; None while nobody answers."""
    try:
        scaling = json.loads(await asyncio.to_thread(server.read, "/admin/autoscaling"))
        metrics = await asyncio.to_thread(server.read, "/metrics")
    except (URLError, TimeoutError, ConnectionError):
        return None
    moves = re.findall(r'quire_migrations_total\{outcome="moved",reason="(\w+)"\} ([0-9.]+)', metrics)
    return {
        "at_s": time.perf_counter() - begun_s,
        "streams": sum(not stream.ended for stream in streams),
        "target": scaling["target"],
        "ready": scaling["ready"],
        "leaving": len(scaling["leaving"]),
        "moved": {reason: int(float(count)) for reason, count in moves},
    }


async def watch(server: Server, begun_s: float, streams: Sequence[Timed], timeline: list[dict[str, Any]]) -> None:
    """Looks, until it is cancelled."""
    while True:
        if (row := await look(server, begun_s, streams)) is not None:
            timeline.append(row)
        await asyncio.sleep(LOOK_S)


async def calm_texts(server: Server, bodies: list[dict[str, Any]], at_once: int) -> list[Timed]:
    """Every stream, undisturbed, a few at a time."""
    gate = asyncio.Semaphore(at_once)

    async def one(asked: dict[str, Any]) -> Timed:
        async with gate:
            stream = Timed(server, asked)
            await stream.end()
            return stream

    return list(await asyncio.gather(*(one(asked) for asked in bodies)))


async def rise_and_fall(server: Server, bodies: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """The load, and then a rest until one replica is left; streams are asked for in turn, over and over."""
    streams: list[Timed] = []
    timeline: list[dict[str, Any]] = []
    begun_s = time.perf_counter()
    watching = asyncio.create_task(watch(server, begun_s, streams, timeline))
    load_s = 2 * args.rise_s + args.hold_s
    deadline_s = load_s + WAIT_S

    def settled() -> bool:
        return bool(timeline) and (timeline[-1]["target"], timeline[-1]["ready"], timeline[-1]["leaving"]) == (1, 1, 0)

    while (now_s := time.perf_counter() - begun_s) < load_s or (not settled() and now_s < deadline_s):
        while sum(not stream.ended for stream in streams) < wanted_at(now_s, args):
            streams.append(Timed(server, bodies[len(streams) % len(bodies)]))
        await asyncio.sleep(0.1)
    for stream in streams:
        await stream.end()
    watching.cancel()
    scaling = json.loads(await asyncio.to_thread(server.read, "/admin/autoscaling"))
    return {
        "streams": streams,
        "timeline": timeline,
        "settled": settled(),
        "decisions": [row for row in scaling["decisions"] if row["target"] != row["before"]],
        "ttft": [(stream.sent_s - begun_s, stream.ttft_s) for stream in streams],
    }


def draw_picture(path: Path, found: dict[str, Any], title: str) -> None:
    """Load, replicas, time to first token and migrations, over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = found["timeline"]
    at = [row["at_s"] for row in rows]
    figure, (load, replicas, ttft, moves) = plt.subplots(4, 1, figsize=(9, 9), sharex=True, constrained_layout=True)
    figure.suptitle(title)
    load.plot(at, [row["streams"] for row in rows], drawstyle="steps-post")
    load.set_ylabel("streams")
    replicas.plot(at, [row["target"] for row in rows], drawstyle="steps-post", label="to be", linestyle="--")
    replicas.plot(at, [row["ready"] for row in rows], drawstyle="steps-post", label="ready")
    replicas.plot(at, [row["leaving"] for row in rows], drawstyle="steps-post", label="leaving")
    replicas.set_ylabel("replicas")
    replicas.legend(loc="upper right")
    ttft.scatter([at_s for at_s, _ in found["ttft"]], [1000 * (s or 0) for _, s in found["ttft"]], s=8)
    ttft.set_ylabel("time to first token, ms")
    ttft.set_yscale("log")
    for reason in sorted({reason for row in rows for reason in row["moved"]}):
        moves.plot(at, [row["moved"].get(reason, 0) for row in rows], drawstyle="steps-post", label=reason)
    moves.set_ylabel("migrations so far")
    moves.set_xlabel("seconds")
    moves.legend(loc="upper left")
    figure.savefig(path, dpi=100)
    plt.close(figure)


async def bench(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    draw, model = random.Random(args.seed), model_of(server)
    sampled = [{"temperature": 0.8, "top_p": 0.95, "seed": i} if i % 2 else {} for i in range(args.bodies)]
    bodies = [body(model, draw, args.prompt, args.tokens, **more) for more in sampled]
    await asyncio.to_thread(server.ask, "/admin/scale", {"replicas": 1})
    calm = await calm_texts(server, bodies, args.at_once)
    failed = [stream.error for stream in calm if stream.error]
    if failed:
        raise RuntimeError(f"the undisturbed run failed: {failed}")
    await asyncio.to_thread(server.ask, "/admin/scale", {"auto": True})
    return rise_and_fall_result(calm, await rise_and_fall(server, bodies, args))


def rise_and_fall_result(calm: list[Timed], found: dict[str, Any]) -> dict[str, Any]:
    """What came of it, beside the undisturbed streams."""
    streams = found.pop("streams")
    wanted = [calm[i % len(calm)] for i in range(len(streams))]
    rows = found["timeline"]
    return {
        "streams": len(streams),
        "errors": [stream.error for stream in streams if stream.error],
        "wrong": differences(wanted, streams, set()),
        "most_ready": max(row["ready"] for row in rows),
        "moved": rows[-1]["moved"],
        "longest_pause_ms": 1e3 * max((stream.longest_pause_s(0.0) for stream in streams), default=0.0),
        **found,
    }


def random_model() -> str:
    """A directory with the tests' model."""
    sys.path.insert(0, str(ROOT / "tests" / "deploy"))
    from tiny_server import save_tiny_model

    path = Path(tempfile.mkdtemp(prefix="quire-model-"))
    save_tiny_model(path)
    return str(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="random: the random Llama of 40,000 weights that the tests use")
    parser.add_argument("--kv-pages", type=int, default=128, help="of each replica")
    parser.add_argument("--max-replicas", type=int, default=3)
    parser.add_argument("--each", type=float, default=4.0, help="streams for each replica, which is what the autoscaler goes by")
    parser.add_argument("--peak", type=int, default=12, help="streams at once")
    parser.add_argument("--rise-s", type=float, default=45.0)
    parser.add_argument("--hold-s", type=float, default=45.0)
    parser.add_argument("--bodies", type=int, default=16, help="different streams")
    parser.add_argument("--at-once", type=int, default=8, help="of them, undisturbed")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=160, help="that each stream generates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS / "autoscale.json")
    parser.add_argument("--png", type=Path, default=PICTURE)
    args = parser.parse_args()
    args.replicas, args.tp, args.ingresses = 1, 1, 1
    shown = args.model
    if args.model == "random":
        args.model = random_model()
    flags = ["--autoscaler", "ongoing", "--target-ongoing", args.each, "--max-replicas", args.max_replicas]
    with served(args, *map(str, flags), "--scale-up-cooldown-s", "2", "--scale-down-cooldown-s", "4") as server:
        found = asyncio.run(bench(server, args))
    png, args.model = args.png, shown
    del args.png  # no argument of what was measured
    draw_picture(png, found, f"{shown}, 1 to {args.max_replicas} replicas and back")
    print("\n".join(found["wrong"]) or "every text is the undisturbed one")
    took_over = sum(found["moved"].get(reason, 0) for reason in ("fill", "rebalance"))
    goals = [
        goal("errors and lost streams", "0", not found["errors"], f"{len(found['errors'])} of {found['streams']}"),
        goal("texts that differ", "0", not found["wrong"], str(len(found["wrong"]))),
        goal("replicas at the peak", str(args.max_replicas), found["most_ready"] == args.max_replicas, str(found["most_ready"])),
        goal("replicas in the end", "1", found["settled"], "1" if found["settled"] else "more"),
        goal("running streams that new replicas took over", "some", took_over > 0, str(took_over)),
        goal("streams that moved from replicas that left", "some", found["moved"].get("drain", 0) > 0, str(found["moved"].get("drain", 0))),
    ]
    return report(args, goals, found)


if __name__ == "__main__":
    sys.exit(main())
