"""How fast the controller decides: admissions and routings per second with 64 replicas of state and a million indexed pages.

    python benchmarks/controller_decisions.py
    python benchmarks/controller_decisions.py --policy least_loaded --replicas 16 --requests 4000

Only the pure classes run (`GlobalScheduler` over `Router`), on one core and without Ray or a model. Each replica is a stand-in that
holds pages and ends requests, and reports as a real one does: numbered frames with the pages stored and removed, the requests
started and ended, the tokens served. Every request is one turn of a session: the pages of its earlier turns and one more turn, of
12,000 tokens on average (the mean of Mooncake's conversation trace). A decision is one `offer` and the `dispatch` after it.
Time passes by the clock of the requests, 2,000 of them a second.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import time
import tracemalloc
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm, trange

from quire.cluster.global_scheduler import GlobalScheduler, QueueLimits
from quire.cluster.messages import AdmitRequest, Route
from quire.cluster.page_index import PageIndex
from quire.cluster.policies import POLICIES
from quire.cluster.routing import Router
from quire.cluster.tenants import TenantTable
from quire.deploy.load.report import percentile
from quire.worker.protocol import EventFrame, LiveRequest, ModelInfo, ReplicaLoad, pack_events, unpack_events

PAGE_TOKENS = 32
TURN_PAGES = 125  # what a turn adds; sessions of one to five turns make prompts of 375 pages (12,000 tokens) on average
TURNS = 5
COMMON_PAGES = 16  # of a system prompt that all sessions share: Mooncake's one common block
REQUESTS_PER_S = 2000
FRAMES_PER_S = 20  # of each replica
LIFE_FRAMES = 10  # a request lives so many frames
TENANTS = 16
GOAL_PER_S, GOAL_P99_MS = 2000, 5.0


@dataclass
class StandIn:
    """What one replica has to tell: it holds `capacity` pages, and drops the oldest for new ones."""

    replica_id: str
    info: ModelInfo
    capacity: int
    held: OrderedDict[bytes, None]  # oldest first
    next: int = 0
    sent: list[tuple[AdmitRequest, tuple[bytes, ...]]] = field(default_factory=list)
    live: deque[list[LiveRequest]] = field(default_factory=lambda: deque([[] for _ in range(LIFE_FRAMES)]))
    served: dict[str, int] = field(default_factory=dict)

    def frame(self, after: int | None) -> bytes:
        """What has happened since the last frame, as it travels."""
        ended = self.live.popleft()
        started = [LiveRequest(r.request_id, r.tenant, 0, "running", 1, r.prompt_tokens, 1, len(pages)) for r, pages in self.sent]
        stored = [page for _, pages in self.sent for page in pages if page not in self.held]
        self.held.update(dict.fromkeys(stored))
        removed = []
        while len(self.held) > self.capacity:
            removed.append(self.held.popitem(last=False)[0])
        for request in ended:
            self.served[request.tenant] = self.served.get(request.tenant, 0) + 20
        self.live.append(started)
        self.sent = []
        number, self.next = self.next, self.next + len(stored) + len(removed) + len(started) + len(ended)
        shown = tuple(self.held) if after is None else tuple(stored)
        ends = tuple((r.request_id, 20) for r in ended)
        frame = EventFrame(
            self.replica_id,
            1,
            number,
            self.next,
            after is None,
            shown,
            tuple(removed),
            tuple(started),
            ends,
            dict(self.served),
            self.load(),
        )
        return pack_events(frame)

    def load(self) -> ReplicaLoad:
        running = sum(map(len, self.live))
        active = min(running * 40, self.capacity // 2)
        return ReplicaLoad(
            running, 0, self.capacity, 0, self.capacity - active, active, 0, 0, 200, 0 if running else -(2**31), 2e5, 0.01, self.next
        )


class Sessions:
    """Turns of many sessions, in random order."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._common = tuple(draw.randbytes(16) for _ in range(COMMON_PAGES))
        self._open: list[list[bytes]] = [[*self._common] for _ in range(2000)]
        self._count = 0

    def request(self) -> AdmitRequest:
        place = self._draw.randrange(len(self._open))
        pages = self._open[place]
        pages += [self._draw.randbytes(16) for _ in range(TURN_PAGES)]
        hashes = tuple(pages)
        if len(pages) > COMMON_PAGES + TURNS * TURN_PAGES - 1:
            self._open[place] = [*self._common]
        self._count += 1
        tokens = len(hashes) * PAGE_TOKENS + 10
        return AdmitRequest(f"q{self._count}", 0, f"t{self._count % TENANTS}", 0, 0.0, None, 1, tokens, 20, tokens + 20, hashes)


def bytes_per_page(replicas: int, pages: int) -> float:
    """Memory of an index of `pages` pages, hashes included, over the number of pages."""
    draw = random.Random(0)
    gc.collect()
    tracemalloc.start()
    index = PageIndex()
    for replica in range(replicas):
        index.update(f"r{replica}", [draw.randbytes(16) for _ in range(pages // replicas)], ())
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size / len(index)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", choices=sorted(POLICIES), default="cost")
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--pages", type=int, default=1_000_000, help="indexed (replica, page) pairs")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "controller_decisions.json")
    args = parser.parse_args()

    memory = bytes_per_page(args.replicas, args.pages)
    draw = random.Random(args.seed)
    router = Router(args.policy, args.seed)
    scheduler = GlobalScheduler(router, TenantTable(), QueueLimits(max_requests=4096, max_tokens=2**40), "fair")
    capacity = args.pages // args.replicas
    pool = capacity * PAGE_TOKENS
    replicas = []
    for i in trange(args.replicas, desc="filling"):
        info = ModelInfo("m", "", 2**20, 100_000, (), 0, PAGE_TOKENS, pool, 1280, 256)
        stand_in = StandIn(f"r{i}", info, capacity, OrderedDict.fromkeys(draw.randbytes(16) for _ in range(capacity)))
        router.add(stand_in.replica_id, 1, info)
        scheduler.events(unpack_events(stand_in.frame(None)), 0.0)
        replicas.append(stand_in)
    by_id = {replica.replica_id: replica for replica in replicas}
    sessions, waiting = Sessions(draw), {}
    decision_s, frame_s, cached, prompt, routed = [], [], 0, 0, 0
    every = REQUESTS_PER_S / (FRAMES_PER_S * args.replicas)  # requests from one frame to the next
    frames_due = 0.0
    gc.collect()
    for i in tqdm(range(args.requests), desc="deciding", mininterval=1):
        now_s = i / REQUESTS_PER_S
        request = sessions.request()
        waiting[request.request_id] = request
        decisions = []
        begin = time.perf_counter()
        scheduler.offer(request, now_s)
        decisions += scheduler.dispatch(now_s)
        decision_s.append(time.perf_counter() - begin)
        frames_due += 1
        while frames_due >= every:
            frames_due -= every
            replica = replicas[len(frame_s) % args.replicas]
            frame = replica.frame(router.resync_point(replica.replica_id, 1))
            begin = time.perf_counter()
            scheduler.events(unpack_events(frame), now_s)
            decisions += scheduler.dispatch(now_s)
            frame_s.append(time.perf_counter() - begin)
        for decision in decisions:
            if not isinstance(decision.outcome, Route):
                raise SystemExit(f"{decision.request_id} was refused: {decision.outcome}")
            taken = waiting.pop(decision.request_id)
            replica = by_id[decision.outcome.replica_id]
            length = next((n for n, page in enumerate(taken.hashes) if page not in replica.held), len(taken.hashes))
            cached, prompt, routed = cached + length * PAGE_TOKENS, prompt + taken.prompt_tokens, routed + 1
            replica.sent.append((taken, taken.hashes))
    busy_s = sum(decision_s) + sum(frame_s)
    figures = {
        "policy": args.policy,
        "replicas": args.replicas,
        "indexed_pages": sum(s.indexed_pages for s in router.snapshots()),
        "requests": args.requests,
        "routed": routed,
        "decisions_per_s": round(args.requests / sum(decision_s)),
        "with_frames_per_s": round(args.requests / busy_s),
        "decision_p50_ms": round(percentile(decision_s, 50) * 1e3, 3),
        "decision_p99_ms": round(percentile(decision_s, 99) * 1e3, 3),
        "decision_max_ms": round(max(decision_s) * 1e3, 3),
        "frames": len(frame_s),
        "frame_p50_ms": round(percentile(frame_s, 50) * 1e3, 3),
        "frame_p99_ms": round(percentile(frame_s, 99) * 1e3, 3),
        "prefix_hit_rate": round(cached / prompt, 3),
        "bytes_per_indexed_page": round(memory, 1),
        "cpus": os.cpu_count(),
    }
    print(json.dumps(figures))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(figures, indent=2) + "\n")
    ok = {True: "met", False: "MISSED"}
    per_s = figures["decisions_per_s"]
    print(f"admissions + routings/s: {per_s:,} (goal {GOAL_PER_S:,}: {ok[per_s >= GOAL_PER_S]})")
    print(f"the same beside the event frames that come of them: {figures['with_frames_per_s']:,}")
    print(f"p99 of a decision: {figures['decision_p99_ms']} ms (goal < {GOAL_P99_MS:g} ms: {ok[figures['decision_p99_ms'] < GOAL_P99_MS]})")
    print(f"memory of an indexed page: {figures['bytes_per_indexed_page']} bytes, its 16-byte hash included")


if __name__ == "__main__":
    main()
