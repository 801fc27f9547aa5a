"""What the benchmarks of migration share: streams of random tokens, where they run, moves that are asked for, and how goals are told."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import time
import urllib.request
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from load_calls import percentile
from recovery import Server, Stream, run_stream

RESULTS = Path(__file__).resolve().parent / "results"
TOKENS = range(300, 4000)  # pieces of words: what follows is text, of which nothing is held back until a character is whole
WAIT_S = 300.0


def add_arguments(parser: argparse.ArgumentParser, name: str, replicas: int, kv_pages: int) -> None:
    """--model, --replicas, --tp, --ingresses, --kv-pages, --seed, --json."""
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--replicas", type=int, default=replicas)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--ingresses", type=int, default=1)
    parser.add_argument("--kv-pages", type=int, default=kv_pages, help="of each replica")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS / f"{name}.json")


def model_of(server: Server) -> str:
    """The name under which the server knows its model."""
    with urllib.request.urlopen(server.url + "/v1/models", timeout=15) as answer:
        name: str = json.load(answer)["data"][0]["id"]
        return name


def body(model: str, draw: random.Random, prompt_tokens: int, output_tokens: int, **more: Any) -> dict[str, Any]:
    """A greedy request with a prompt that nobody else has."""
    asked = {"model": model, "prompt": draw.choices(TOKENS, k=prompt_tokens), "max_tokens": output_tokens, "ignore_eos": True}
    return {**asked, "temperature": 0.0, "stream": True, "stream_options": {"include_usage": True}, **more}


class Timed(Stream):
    """A stream that knows when it was sent, and runs by itself."""

    def __init__(self, server: Server, asked: dict[str, Any]) -> None:
        super().__init__(asked)
        self.sent_s = time.perf_counter()
        self.task = asyncio.create_task(run_stream(server.url, self))

    @property
    def ttft_s(self) -> float | None:
        """Until its first text."""
        return self.times_s[0] - self.sent_s if self.times_s else None

    def gaps_s(self, since_s: float = 0.0, until_s: float = float("inf")) -> list[float]:
        """Times between texts, of which both came in that time."""
        times = [t for t in self.times_s if since_s <= t <= until_s]
        return [b - a for a, b in pairwise(times)]

    async def has(self, count: int) -> None:
        """Waits for so many texts.

        Raises:
            RuntimeError: it ended before, or it took too long.
        """
        begun_s = time.perf_counter()
        while len(self.times_s) < count:
            if self.ended or time.perf_counter() - begun_s > WAIT_S:
                raise RuntimeError(f"a stream had {len(self.times_s)} of {count} texts: {self.error or 'it has ended, or stands still'}")
            await asyncio.sleep(0.002)

    async def end(self) -> None:
        """Waits for its end."""
        await asyncio.wait_for(self.task, WAIT_S)


async def where(server: Server, stream: Stream) -> str:
    """The replica that runs a stream."""
    while True:
        status = await asyncio.to_thread(server.status)
        found = [row["replica"] for row in (status or {"requests": []})["requests"] if row["id"] == stream.request_id]
        if found and found[0] is not None:
            return str(found[0])
        if stream.ended:
            raise RuntimeError("the stream has ended")
        await asyncio.sleep(0.05)


async def migrate(server: Server, stream: Stream, to: str) -> dict[str, Any]:
    """Moves it there; what the admin API says came of it."""
    return await asyncio.to_thread(server.ask, f"/admin/requests/{stream.request_id}/migrate", {"to": to})


def step_s(gaps: Iterable[float]) -> float:
    """A usual step."""
    return statistics.median(gaps)


def spread(values: list[float]) -> dict[str, float]:
    """Median, p99 and most, in milliseconds, of seconds."""
    most = max(values, default=float("nan"))
    return {"p50_ms": 1e3 * percentile(values, 0.5), "p99_ms": 1e3 * percentile(values, 0.99), "most_ms": 1e3 * most}


def goal(what: str, wanted: str, met: bool, found: str) -> dict[str, Any]:
    """One line of the result."""
    return {"what": what, "goal": wanted, "found": found, "met": met}


def report(args: argparse.Namespace, goals: list[dict[str, Any]], figures: Mapping[str, Any]) -> int:
    """Prints each goal beside its figure and writes the JSON; the exit status."""
    for line in goals:
        print(f"{'met' if line['met'] else 'missed':<8}{line['what']}: {line['found']} (goal: {line['goal']})")
    about = {k: v.name if isinstance(v, Path) else str(v) for k, v in vars(args).items() if k != "json"} | {"cpus": os.cpu_count()}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"arguments": about, "goals": goals, **figures}, indent=1)
    args.json.write_text(text.replace("NaN", "null") + "\n")  # JSON knows no nan
    return 0 if all(line["met"] for line in goals) else 1
