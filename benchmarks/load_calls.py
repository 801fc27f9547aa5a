"""Calls of a load test that names its callers: a stream with a key, its status and Retry-After, and when each token came.

What `benchmarks/fairness.py` and `benchmarks/overload.py` share. HTTP/1.0, so that events come without chunks around them.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from serve_bench import START_TIMEOUT_S, stop, wait_until_ready

from quire.deploy.process_tree import descendants

TOKENS = range(100, 250)  # special in no model that is likely here; thirty of them make a prompt that nobody else has
MODEL = "bench"


@dataclass
class Call:
    """One request and what came of it. Times are seconds of `time.perf_counter`.

    Attributes:
        tenant: whose key it carries (`key-TENANT`).
        prompt: token ids, random: nothing is cached.
        output: tokens, exactly.
        deadline_ms: of its wait; None for none.
    """

    tenant: str
    prompt: list[int]
    output: int
    deadline_ms: int | None = None
    sent_s: float = 0.0
    status: int = 0
    retry_after_s: float | None = None
    token_times_s: list[float] = field(default_factory=list)
    end_s: float | None = None
    error: str = ""

    @property
    def ttft_s(self) -> float | None:
        return self.token_times_s[0] - self.sent_s if self.token_times_s else None


def make_call(draw: random.Random, tenant: str, prompt: int, output: int, deadline_ms: int | None = None) -> Call:
    """A call with a prompt of so many random tokens."""
    return Call(tenant, draw.choices(TOKENS, k=prompt), output, deadline_ms)


async def run(url: str, call: Call) -> Call:
    """Sends it and reads the answer to its end. Cancelling it closes the connection."""
    parts = urlsplit(url)
    body = {"model": MODEL, "prompt": call.prompt, "max_tokens": call.output, "ignore_eos": True, "temperature": 0, "stream": True}
    if call.deadline_ms is not None:
        body["deadline_ms"] = call.deadline_ms
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.0\r\nHost: {parts.netloc}\r\nAuthorization: Bearer key-{call.tenant}\r\n"
    writer = None
    call.sent_s = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=2**20)
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        call.status = int((await reader.readline()).split()[1])
        async for line in reader:
            if line.startswith(b"data: {"):
                if b'"error"' in line:
                    call.error = str(json.loads(line[6:])["error"])
                else:
                    call.token_times_s.append(time.perf_counter())
            elif line.lower().startswith(b"retry-after:"):
                call.retry_after_s = float(line.split(b":")[1])
        call.end_s = time.perf_counter()
    except (OSError, ValueError, IndexError) as error:
        call.error = repr(error)
    finally:
        if writer is not None:
            writer.close()
    return call


def percentile(values: list[float], share: float) -> float:
    """The value that so large a share stays within (nearest rank)."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else float("nan")


@dataclass(frozen=True)
class Served:
    """A server under test."""

    url: str
    pid: int
    log: Path

    def resident_mib(self) -> float:
        """Memory of all its processes, as Linux counts what is resident."""
        total = 0
        for pid in [self.pid, *(process.pid for process in descendants(self.pid))]:
            try:
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except OSError:  # it has just ended
                continue
        return total * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def serving(folder: Path, tenants: tuple[str, ...], flags: list[str]) -> Iterator[Served]:
    """`quire serve` with a key for each tenant, ready.

    Raises:
        RuntimeError: it does not become ready; the message names its log.
    """
    keys = folder / "tenants.yaml"
    keys.write_text("tenants:\n" + "".join(f"  - name: {name}\n    keys: [key-{name}]\n" for name in tenants))
    log = folder / "server.log"
    own = ["--port", "0", "--admin-port", "0", "--api-key-file", str(keys), "--served-model-name", MODEL]
    command = [sys.executable, "-m", "quire.deploy.cli", "serve", *own, *flags]
    with log.open("a") as stderr:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        url = wait_until_ready(server, time.monotonic() + START_TIMEOUT_S)
        if url is None:
            raise RuntimeError(f"the server did not become ready: {log}")
        yield Served(url, server.pid, log)
    finally:
        stop(server)
