"""Kills processes of a running cluster at random points of their streams, and holds what its clients see against an undisturbed run.

    python benchmarks/recovery.py                     3 replicas of SmolLM2-135M, 24 streams, 20 kills: 6 to 8 minutes on two cores
    python benchmarks/recovery.py --rounds 4          a first look
    python benchmarks/recovery.py --tp 3 --replicas 2 ranks are killed, too

Every round sends the same requests (half of them greedy, half sampled with a seed), kills -9 one process - a replica's leader, another
of its ranks, the controller, or an ingress - and waits until all is as before. It exits with 1 when a client saw an error (except those
that were connected to a killed ingress), when a text is not the undisturbed one, when its tokens are too few or too many, when pages
stay in use, or when a process does not come back. Prompts are lines of Shakespeare's sonnets. Linux only: it looks into /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from serve_bench import START_TIMEOUT_S, stop, wait_until_ready
from tqdm import tqdm

ROUND_TIMEOUT_S = 240.0  # for every stream of a round to end
RESTORE_TIMEOUT_S = 120.0  # from a kill until all processes are back
REST_TIMEOUT_S = 30.0  # until no page is in use
STATUS_EVERY_S = 0.2
PROGRESS_EVERY_S = 0.005


@dataclass
class Stream:
    """One request and what came of it. Times are `time.perf_counter`."""

    body: dict[str, Any]
    request_id: str = ""
    client_port: int = 0
    text: str = ""
    tokens: int | None = None  # as `usage` says at the end
    times_s: list[float] = field(default_factory=list)  # of events with text
    error: str = ""
    ended: bool = False

    def longest_pause_s(self, since_s: float) -> float:
        """Between two events, of which the later came after `since_s`."""
        pairs = zip(self.times_s, self.times_s[1:], strict=False)
        return max((after - before for before, after in pairs if after > since_s), default=0.0)


async def run_stream(url: str, stream: Stream) -> None:
    """Sends the request and reads its events. As HTTP/1.0, so that the events come without chunks around them."""
    parts = urlsplit(url)
    data = json.dumps(stream.body).encode()
    head = f"POST /v1/completions HTTP/1.0\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    try:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=2**20)
        stream.client_port = writer.get_extra_info("sockname")[1]
        writer.write(head.encode() + data)
        status = (await reader.readline()).decode().split()
        if status[1:2] != ["200"]:
            stream.error = f"HTTP {' '.join(status[1:]) or 'without an answer'}"
            return
        done = False
        async for line in reader:
            if line.startswith(b"data: [DONE]"):
                done = True
            elif line.startswith(b"data: "):
                _take(stream, json.loads(line[6:]))
        if not done and not stream.error:
            stream.error = "the stream was cut"
        writer.close()
    except (OSError, ValueError) as error:
        stream.error = repr(error)
    finally:
        stream.ended = True


def _take(stream: Stream, event: dict[str, Any]) -> None:
    if "error" in event:
        stream.error = str(event["error"])
        return
    stream.request_id = event["id"]
    if event.get("usage"):
        stream.tokens = event["usage"]["completion_tokens"]
    for choice in event["choices"]:
        if choice["text"]:
            stream.text += choice["text"]
            stream.times_s.append(time.perf_counter())


def differences(calm: list[Stream], now: list[Stream], excused: set[int]) -> list[str]:
    """What is wrong with the streams of a round: errors, other texts, other numbers of tokens. The excused ones may have been cut."""
    found = []
    for i, (want, got) in enumerate(zip(calm, now, strict=True)):
        if got.error and i in excused:
            if not want.text.startswith(got.text.removesuffix("�")):
                found.append(f"stream {i}: was cut, and its text was wrong before that")
            continue
        if got.error:
            found.append(f"stream {i}: {got.error}")
        elif got.text != want.text:
            at = next((k for k, (a, b) in enumerate(zip(got.text, want.text, strict=False)) if a != b), min(len(got.text), len(want.text)))
            found.append(
                f"stream {i}: its text differs from character {at} on: {got.text[at : at + 20]!r}, not {want.text[at : at + 20]!r}"
            )
        elif got.tokens != want.tokens:
            found.append(f"stream {i}: {got.tokens} tokens instead of {want.tokens}")
    return found


# --- the server ---


class Server:
    """`quire serve`, and what its admin API says."""

    def __init__(self, process: subprocess.Popen[str], url: str, log: Path) -> None:
        self.process = process
        self.url = url
        found = re.search(r"admin API on (http://\S+)", log.read_text())
        if found is None:
            raise RuntimeError(f"no admin API in {log}")
        self._admin = found[1]

    def status(self) -> dict[str, Any] | None:
        """None while the controller is away."""
        try:
            with urllib.request.urlopen(self._admin + "/admin/status", timeout=15) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return None

    def read(self, path: str) -> str:
        """What the admin API answers to a GET.

        Raises:
            urllib.error.URLError: it refuses, or does not answer.
        """
        with urllib.request.urlopen(self._admin + path, timeout=90) as answer:
            text: str = answer.read().decode()
            return text

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What the admin API answers to a POST.

        Raises:
            urllib.error.URLError: it refuses, or does not answer.
        """
        request = urllib.request.Request(self._admin + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=90) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    async def until(self, true: Any, timeout_s: float) -> float | None:
        """Seconds until the status is like that; None when it is not in time."""
        begun_s = time.perf_counter()
        while (took_s := time.perf_counter() - begun_s) < timeout_s:
            if self.process.poll() is not None:
                raise RuntimeError("the server has ended")
            status = await asyncio.to_thread(self.status)
            if status is not None and true(status):
                return took_s
            await asyncio.sleep(STATUS_EVERY_S)
        return None


@contextmanager
def served(args: argparse.Namespace, *more: str) -> Iterator[Server]:
    """A server of its own, with `more` flags, that is gone afterwards."""
    flags = [
        "--model",
        args.model,
        "--replicas",
        args.replicas,
        "--tp",
        args.tp,
        "--ingresses",
        args.ingresses,
        "--kv-pages",
        args.kv_pages,
        *more,
    ]
    command = [sys.executable, "-m", "quire.deploy.cli", "serve", "--port", "0", "--admin-port", "0", *map(str, flags)]
    log = Path(tempfile.mkstemp(prefix="quire-recovery-", suffix=".log")[1])
    print(f"{' '.join(command[1:])}\nits log: {log}", file=sys.stderr)
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        url = wait_until_ready(process, time.monotonic() + START_TIMEOUT_S)
        if url is None:
            raise RuntimeError(f"the server did not become ready:\n{log.read_text()[-4000:]}")
        yield Server(process, url, log)
    finally:
        stop(process)


# --- processes ---


@dataclass(frozen=True)
class Victim:
    """A process that is to be killed."""

    kind: str  # leader, rank, controller or ingress
    name: str
    pid: int
    replica: str = ""


def victims(status: dict[str, Any]) -> list[Victim]:
    """Every process of ours."""
    found = [Victim("controller", "controller", status["controller"]["pid"])]
    found += [Victim("ingress", row["id"], row["pid"]) for row in status["ingresses"]]
    for replica in status["replicas"]:
        for rank in replica["ranks"]:
            kind = "rank" if rank["rank"] else "leader"
            found.append(Victim(kind, f"{replica['id']} rank {rank['rank']}", rank["pid"], replica["id"]))
    return found


def complete(status: dict[str, Any], args: argparse.Namespace, gone: int | None = None) -> bool:
    """Whether all processes are there, and `gone` is not."""
    ready = [r for r in status["replicas"] if r["state"] == "ready" and len(r["ranks"]) == args.tp]
    whole = len(ready) == args.replicas and len(status["ingresses"]) == args.ingresses
    return whole and all(victim.pid != gone for victim in victims(status))


def at_rest(status: dict[str, Any]) -> bool:
    """Whether nothing runs, and every page is free or merely cached."""
    pages = [r["pages"] for r in status["replicas"]]
    return not status["requests"] and all(p["active"] == 0 and p["free"] + p["cached"] == p["total"] for p in pages)


def server_side(port: int, pids: list[int]) -> dict[int, int]:
    """Client's port -> pid of the process that holds the other end of its connection to `port`."""
    sockets = {}
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                sockets[os.readlink(entry)] = pid
            except FileNotFoundError:
                continue
    found = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        local, remote, inode = int(words[1].split(":")[1], 16), int(words[2].split(":")[1], 16), words[9]
        if local == port and f"socket:[{inode}]" in sockets:
            found[remote] = sockets[f"socket:[{inode}]"]
    return found


# --- rounds ---


@dataclass
class Round:
    """What one kill did. `pause_s` is the longest one of a stream that was hit, less a usual step."""

    killed: str
    kind: str
    at_s: float
    hit: int
    pause_s: float
    restored_s: float | None
    wrong: list[str]


async def play(server: Server, bodies: list[dict[str, Any]]) -> tuple[list[Stream], list[asyncio.Task[None]]]:
    """Starts all streams."""
    streams = [Stream(body) for body in bodies]
    return streams, [asyncio.create_task(run_stream(server.url, stream)) for stream in streams]


async def one_round(server: Server, args: argparse.Namespace, calm: list[Stream], kind: str, share: float, draw: random.Random) -> Round:
    """Streams, one kill when so much of all text has come, and the way back."""
    begun_s = time.perf_counter()
    streams, tasks = await play(server, [stream.body for stream in calm])
    await _come(streams, share * sum(len(stream.times_s) for stream in calm))
    at_s = time.perf_counter() - begun_s
    status = await asyncio.to_thread(server.status)
    if status is None:
        return Round("", kind, at_s, 0, 0.0, None, ["the controller was away before the kill"])
    victim = draw.choice([v for v in victims(status) if v.kind == kind])
    hit = await _hit(server, victim, status, streams)
    os.kill(victim.pid, signal.SIGKILL)
    killed_s = time.perf_counter()
    restored = asyncio.create_task(server.until(lambda now: complete(now, args, victim.pid), RESTORE_TIMEOUT_S))
    _, late = await asyncio.wait(tasks, timeout=ROUND_TIMEOUT_S)
    for task in late:
        task.cancel()
    restored_s = await restored
    wrong = differences(calm, streams, hit if kind == "ingress" else set()) + [f"{len(late)} streams never ended"] * bool(late)
    if restored_s is None:
        wrong.append(f"not all processes were back after {RESTORE_TIMEOUT_S:g} s")
    if await server.until(at_rest, REST_TIMEOUT_S) is None:
        wrong.append("pages or requests are left over")
    pauses = [streams[i].longest_pause_s(killed_s) for i in hit if not streams[i].error]
    usual_s = statistics.median(b - a for s in calm for a, b in zip(s.times_s, s.times_s[1:], strict=False))
    return Round(victim.name, kind, at_s, len(hit), max(max(pauses, default=0.0) - usual_s, 0.0), restored_s, wrong)


async def _come(streams: list[Stream], events: float) -> None:
    """Until so many events have come in all, or the streams have ended."""
    while True:
        if sum(len(stream.times_s) for stream in streams) >= events or all(stream.ended for stream in streams):
            return
        await asyncio.sleep(PROGRESS_EVERY_S)


async def _hit(server: Server, victim: Victim, status: dict[str, Any], streams: list[Stream]) -> set[int]:
    """Indices of the streams that the victim works for: none is a controller's, whose work is done before the first token."""
    if victim.kind == "ingress":
        pids, port = [row["pid"] for row in status["ingresses"]], urlsplit(server.url).port or 80
        while True:  # until every connection that is open has been accepted
            mapped = server_side(port, pids)
            if all(stream.ended or stream.client_port in mapped for stream in streams):
                return {i for i, stream in enumerate(streams) if mapped.get(stream.client_port) == victim.pid}
            await asyncio.sleep(0.01)
    ids = {row["id"] for row in status["requests"] if row["replica"] == victim.replica and victim.replica}
    return {i for i, stream in enumerate(streams) if stream.request_id in ids}


async def bench(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """All rounds, and what they come to."""
    draw = random.Random(args.seed)
    bodies = requests(server, args)
    begun_s = time.perf_counter()
    calm, tasks = await play(server, bodies)
    await asyncio.wait_for(asyncio.gather(*tasks), ROUND_TIMEOUT_S)
    calm_s = time.perf_counter() - begun_s
    failed = [stream.error for stream in calm if stream.error]
    if failed or await server.until(lambda now: at_rest(now) and complete(now, args), REST_TIMEOUT_S) is None:
        raise RuntimeError(f"the undisturbed run failed: {failed or 'it left pages or requests behind'}")
    print(f"undisturbed: {args.streams} streams of {args.tokens} tokens in {calm_s:.1f} s", file=sys.stderr)
    kinds = ["leader", "controller", "ingress", *(["rank"] if args.tp > 1 else [])]
    order = [kind for _ in range(-(-args.rounds // len(kinds))) for kind in draw.sample(kinds, len(kinds))][: args.rounds]
    rounds = []
    for number, kind in enumerate(tqdm(order, desc="kills", file=sys.stderr), start=1):
        done = await one_round(server, args, calm, kind, draw.uniform(0.05, 0.8), draw)
        rounds.append(done)
        back = "never" if done.restored_s is None else f"after {done.restored_s:.1f} s"
        words = f"{number:3}  {done.killed:18} at {done.at_s:5.1f} s  {done.hit:2} streams hit  pause {done.pause_s:5.2f} s  back {back}"
        tqdm.write("\n      ".join([words, *done.wrong]), file=sys.stderr)
    return {"undisturbed_s": calm_s, "rounds": [vars(r) for r in rounds], "totals": totals(rounds)}


def totals(rounds: list[Round]) -> dict[str, Any]:
    """Recovery by kind, and whether anything was wrong."""
    by_kind = {}
    for kind in sorted({r.kind for r in rounds}):
        of = [r for r in rounds if r.kind == kind]
        back = [r.restored_s for r in of if r.restored_s is not None]
        by_kind[kind] = {
            "kills": len(of),
            "streams_hit": sum(r.hit for r in of),
            "median_pause_s": round(statistics.median(r.pause_s for r in of), 3),
            "longest_pause_s": round(max(r.pause_s for r in of), 3),
            "median_restored_s": round(statistics.median(back), 3) if back else None,
        }
    return {"by_kind": by_kind, "violations": sum(len(r.wrong) for r in rounds)}


def requests(server: Server, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Greedy and seeded ones in turn, each with a prompt of its own."""
    with urllib.request.urlopen(server.url + "/v1/models", timeout=15) as answer:
        model = json.load(answer)["data"][0]["id"]
    lines = [line.strip() for line in args.text.read_text(encoding="utf-8").splitlines() if len(line.strip()) > 20]
    bodies = []
    for i in range(args.streams):
        prompt = "\n".join(lines[4 * i % len(lines) :][:4]) + "\n"
        sampling = {"temperature": 0.0} if i % 2 == 0 else {"temperature": 0.8, "top_p": 0.95, "seed": i}
        length = {"max_tokens": args.tokens, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        bodies.append({"model": model, "prompt": prompt, **sampling, **length})
    return bodies


def main() -> int:
    data = Path(os.environ.get("QUIRE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--ingresses", type=int, default=2)
    parser.add_argument("--kv-pages", type=int, default=512)
    parser.add_argument("--streams", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=96, help="that each stream generates")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of what is killed, and when")
    parser.add_argument("--text", type=Path, default=data / "prompts" / "shakespeare_sonnets.txt", help="where prompts come from")
    args = parser.parse_args()
    begun_s = time.perf_counter()
    with served(args) as server:
        result = asyncio.run(bench(server, args))
    result["took_s"] = time.perf_counter() - begun_s
    print(json.dumps({**result, "arguments": {k: str(v) for k, v in vars(args).items()}}, indent=1))
    for kind, row in result["totals"]["by_kind"].items():
        print(
            f"{kind}: {row['kills']} kills, {row['streams_hit']} streams hit, pause {row['median_pause_s']} s (longest "
            f"{row['longest_pause_s']} s), restored after {row['median_restored_s']} s",
            file=sys.stderr,
        )
    print(f"{result['totals']['violations']} violations in {args.rounds} rounds, {result['took_s']:.0f} s", file=sys.stderr)
    return 1 if result["totals"]["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
