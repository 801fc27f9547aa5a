"""Tensor-parallel engines for tests: the leader in the caller, the other ranks as threads or as processes of their own."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from quire.worker.config import CacheOptions, EngineOptions, ModelOptions, ParallelOptions, SchedulerOptions
from quire.worker.engine import Engine, build_engine
from quire.worker.parallel import lead
from quire.worker.plan import MemoryBytes
from quire.worker.protocol import GenerateRequest, SamplingParams, SequenceOutput
from quire.worker.rank import RankActor
from quire.worker.rendezvous import LOOPBACK, address_of, listen

KEY = b"key of the tests"
WAIT_S = 120.0


def tiny_options(model: Path | str, tp: int, step_timeout_s: float = 60.0, **model_options: Any) -> EngineOptions:
    return EngineOptions(
        model=ModelOptions(str(model), device="cpu", threads=1, **model_options),
        cache=CacheOptions(page_size=4, kv_pages=64),
        scheduler=SchedulerOptions(max_batch_tokens=24, max_running=8),
        parallel=ParallelOptions(tp=tp, step_timeout_s=step_timeout_s),
    )


@dataclass
class Ranks:
    """A leader's engine, and its followers."""

    engine: Engine
    followers: list[RankActor]
    ended: queue.Queue[tuple[int, int]] = field(default_factory=queue.Queue)  # (rank, exit code) of followers

    def memory(self) -> list[MemoryBytes]:
        """Of each rank, as it reports it."""
        reports = [ready_report(f) for f in self.followers]
        return [self.engine.runner.memory_bytes(), *(MemoryBytes(r["weight_bytes"], r["pool_bytes"]) for r in reports)]


def ready_report(follower: RankActor) -> dict[str, Any]:
    """What it reports once it has loaded."""
    while not (report := asyncio.run(follower.report()))["pool_bytes"]:
        if report["failure"] is not None:
            raise AssertionError(report["failure"])
        time.sleep(0.01)
    return report


@contextmanager
def ranks(options: EngineOptions) -> Iterator[Ranks]:
    """An engine of `options.parallel.tp` ranks in this process, the followers as threads."""
    tp = options.parallel.tp
    if tp == 1:
        engine = build_engine(options, KEY, host=LOOPBACK)
        try:
            yield Ranks(engine, [])
        finally:
            engine.runner.close()
        return
    ended: queue.Queue[tuple[int, int]] = queue.Queue()
    broken: list[str] = []
    listener = listen(LOOPBACK)
    address = address_of(listener)
    followers = [RankActor(r, tp, address, options, die=lambda code, r=r: ended.put((r, code))) for r in range(1, tp)]
    group = lead(listener, tp, options.parallel.step_timeout_s, broken.append, torch.device("cpu"))
    try:
        engine = build_engine(options, KEY, group=group)
    except BaseException:
        group.close()  # ends every rank's pulse, which would keep the connections
        raise
    try:
        yield Ranks(engine, followers, ended)
    finally:
        engine.runner.close()
    codes = {ended.get(timeout=WAIT_S) for _ in followers}
    if codes != {(r, 0) for r in range(1, tp)} or broken:
        raise AssertionError(f"the ranks did not end well: {codes}, {broken}")


def generate(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[SequenceOutput]]:
    """The outputs of each prompt, all of them computed together; one list a prompt (with `n` = 1)."""
    found: list[list[SequenceOutput]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        engine.submit(GenerateRequest(str(i), (tuple(prompt),), replace(params, seed=i)))
    while not engine.idle():
        for output in engine.step():
            found[int(output.request_id)].append(output)
    return found


def tokens(outputs: list[list[SequenceOutput]]) -> list[list[int]]:
    return [[t for o in some for t in o.tokens] for some in outputs]


# --- processes of their own ---


def spawn(target: Callable[..., None], *args: Any) -> Any:
    """A started process; the caller joins or kills it."""
    process = get_context("spawn").Process(target=target, args=args, daemon=True)
    process.start()
    return process


def follower_process(rank: int, size: int, address: str, options: EngineOptions) -> None:
    """A rank until it ends itself."""
    import threading

    RankActor(rank, size, address, options)
    threading.Event().wait(600)


def leader_process(options: EngineOptions, addresses: Any) -> None:
    """A replica without requests; its address goes into the queue `addresses`."""
    import threading

    from quire.worker.actor import ReplicaActor

    actor = ReplicaActor("r0", 1, options, KEY)
    addresses.put(asyncio.run(actor.rendezvous()))
    threading.Event().wait(600)
