"""A replica with many long streams is drained: what clients notice, and how long it takes.

    python benchmarks/drain.py                        32 streams of SmolLM2-135M on one of two replicas: about 5 minutes on two cores
    python benchmarks/drain.py --streams 6 --tokens 80      a first look

First all streams run undisturbed on replica-0, which says what their texts are and when they end by themselves. Then the same again, and
in the middle of it `drain`. Beside the drain's time stand the time that waiting for the streams to end would have taken, and the time that
its bytes take over a socket of this machine, measured in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
import sys
import threading
import time
from typing import Any

from moving import WAIT_S, Timed, add_arguments, body, goal, model_of, report, spread
from recovery import Server, at_rest, differences, served

DRAINED, OTHER = "replica-0", "replica-1"
PROBE_BYTES = 2**28


async def ask_drain(server: Server, replica: str, undo: bool = False) -> dict[str, Any]:
    """Drains a replica, or ends that; returns when it is empty."""
    begun_s = time.perf_counter()
    while True:
        told = await asyncio.to_thread(server.ask, f"/admin/replicas/{replica}/drain", {"undo": undo, "wait_s": 0.0 if undo else 5.0})
        if told["state"] != "draining":
            return told
        if time.perf_counter() - begun_s > WAIT_S:
            raise RuntimeError(f"the drain does not end: {told}")


async def start(server: Server, bodies: list[dict[str, Any]]) -> list[Timed]:
    """All streams on the replica that is to be drained, each with its first text."""
    await ask_drain(server, OTHER)
    streams = [Timed(server, asked) for asked in bodies]
    for stream in streams:
        await stream.has(1)
    await ask_drain(server, OTHER, undo=True)
    status = await asyncio.to_thread(server.status)
    away = [row["id"] for row in (status or {"requests": []})["requests"] if row["replica"] != DRAINED]
    if status is None or away:
        raise RuntimeError(f"not all streams are on {DRAINED}: {away}")
    return streams


def socket_bytes_per_s() -> float:
    """How fast bytes go over the loopback interface."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = socket.create_connection(listener.getsockname())
        receiver, _ = listener.accept()
    buffer, chunk, left = bytearray(2**20), bytes(2**20), PROBE_BYTES
    thread = threading.Thread(target=lambda: [sender.sendall(chunk) for _ in range(PROBE_BYTES // len(chunk))], daemon=True)
    begun_s = time.perf_counter()
    thread.start()
    while left > 0:
        left -= receiver.recv_into(buffer)
    took_s = time.perf_counter() - begun_s
    thread.join()
    sender.close()
    receiver.close()
    return PROBE_BYTES / took_s


async def bench(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    draw, model = random.Random(args.seed), model_of(server)
    sampled = [{"temperature": 0.8, "top_p": 0.95, "seed": i} if i % 2 else {} for i in range(args.streams)]
    bodies = [body(model, draw, args.prompt, args.tokens, **more) for more in sampled]
    calm = await start(server, bodies)
    begun_s = time.perf_counter()
    for stream in calm:
        await stream.end()
    calm_s = time.perf_counter() - begun_s
    if await server.until(at_rest, WAIT_S) is None:
        raise RuntimeError("the undisturbed run leaves pages behind")
    streams = await start(server, bodies)
    await streams[0].has(args.tokens // 4)
    at = sum(len(stream.times_s) for stream in streams) / sum(len(stream.times_s) for stream in calm)
    drained_s = time.perf_counter()
    told = await ask_drain(server, DRAINED)
    took_s = time.perf_counter() - drained_s
    running = sum(not stream.ended for stream in streams)
    for stream in streams:
        await stream.end()
    await ask_drain(server, DRAINED, undo=True)
    left_over = await server.until(at_rest, WAIT_S) is None
    return {
        "streams": len(streams),
        "errors": [stream.error for stream in streams if stream.error],
        "wrong": differences(calm, streams, set()) + ["pages or requests are left over"] * left_over,
        "state": told["state"],
        "moved": told["moved"],
        "pages": told["pages"],
        "bytes": told["bytes"],
        "told_longest_pause_ms": told["downtime_ms"],
        "pauses": spread([stream.longest_pause_s(drained_s) for stream in streams if stream.times_s[-1] > drained_s]),
        "running_after": running,
        "drain_s": took_s,
        "waiting_s": calm_s * (1 - at),
        "socket_bytes_per_s": (rate := socket_bytes_per_s()),
        "bytes_over_bandwidth_s": told["bytes"] / rate,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "drain", 2, 1024)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--tokens", type=int, default=300, help="that each stream generates")
    args = parser.parse_args()
    with served(args, "--no-rebalance", "--max-running", "64") as server:
        found = asyncio.run(bench(server, args))
    print("\n".join(found["wrong"]) or "every text is the undisturbed one")
    mib = found["bytes"] / 2**20
    print(
        f"{found['moved']} streams moved, {found['pages']} pages, {mib:.0f} MiB; drained after {found['drain_s']:.2f} s, waiting for their "
        f"ends would have taken {found['waiting_s']:.1f} s, the bytes alone {found['bytes_over_bandwidth_s']:.2f} s; "
        f"longest pause p50 {found['pauses']['p50_ms']:.0f} ms, p99 {found['pauses']['p99_ms']:.0f} ms"
    )
    goals = [
        goal("errors and lost streams", "0", not found["errors"], str(len(found["errors"]))),
        goal("texts that differ", "0", not found["wrong"], str(len(found["wrong"]))),
        goal("state", "drained", found["state"] == "drained", found["state"]),
        goal(
            "drain against waiting",
            "sooner",
            found["drain_s"] < found["waiting_s"],
            f"{found['drain_s']:.1f} s, {found['waiting_s']:.1f} s",
        ),
    ]
    return report(args, goals, found)


if __name__ == "__main__":
    sys.exit(main())
