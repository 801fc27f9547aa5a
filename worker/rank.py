"""The process of a rank that follows: loads its shard, then computes whatever the leader plans until one of them is gone.

The class is undecorated and is tested as a plain object; `cluster.ray_gateway` makes an actor of it. Ray starts it and asks it
how it is, no more: plans and tensors come over the ranks' own connections.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .config import EngineOptions
from .logs import start_actor_logging
from .plan import MemoryBytes
from .plan_wire import unpack
from .watchdog import Watchdog

if TYPE_CHECKING:
    from .parallel import RankGroup
    from .runner import FollowerRunner

log = logging.getLogger(__name__)

RANK_CONCURRENCY_GROUPS: dict[str, int] = {}  # a rank is only asked how it is
SWITCH_S = 5e-4  # as in the leader's process


class RankActor:
    """One life of one rank.

    Args:
        rank, size: in [1, size).
        address: "host:port" from the leader's `ReplicaActor.rendezvous`.
        options: what to serve; the same as the leader's.
        log_level, log_format: set up the logging of this process; None leaves it alone.
        die: ends the process with an exit code.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        address: str,
        options: EngineOptions,
        log_level: str | None = None,
        log_format: str = "text",
        die: Callable[[int], None] = os._exit,
    ) -> None:
        if log_level is not None:
            start_actor_logging(log_level, log_format, rank=rank)
        self._rank = rank
        self._size = size
        self._address = address
        self._options = options
        self._die = die
        self._loaded = (0, 0)
        self._failure: str | None = None
        self._memory = MemoryBytes(0, 0)
        threading.Thread(target=self._run, name=f"rank-{rank}", daemon=True).start()

    async def report(self) -> dict[str, Any]:
        """All there is to know, as primitives.

        Keys: rank, pid, node (its host name); loaded, to_load (weights so far, in all); failure (None or why this rank never became
        ready); weight_bytes, pool_bytes (what this rank holds; 0 until it is ready).
        """
        return {
            "rank": self._rank,
            "pid": os.getpid(),
            "node": platform.node(),
            "loaded": self._loaded[0],
            "to_load": self._loaded[1],
            "failure": self._failure,
            "weight_bytes": self._memory.weights,
            "pool_bytes": self._memory.pool,
        }

    async def set_log_level(self, level: str) -> None:
        """How much this process logs from now on."""
        logging.getLogger().setLevel(level.upper())

    def _run(self) -> None:
        sys.setswitchinterval(SWITCH_S)
        limit_s = self._options.parallel.step_timeout_s
        try:
            group, runner = self._build(limit_s)
        except Exception as error:  # the process outlives it, to say why; not its leader, though
            log.debug("rank %d: loading failed", self._rank, exc_info=True)
            self._failure = str(error) or repr(error)
            return
        self._memory = runner.memory_bytes()
        follower = Follower(group, runner)
        watchdog = Watchdog(limit_s, follower.step_s, self._end)
        try:
            follower.follow()
        except BaseException as error:
            log.debug("rank %d: a step failed", self._rank, exc_info=True)
            self._end(repr(error))
        else:
            self._die(0)
        finally:  # or it would keep the group and its connections
            watchdog.close()

    def _build(self, limit_s: float) -> tuple[RankGroup, FollowerRunner]:
        from .backend import device_of  # here, so that the actor answers before torch is imported
        from .build import build_follower
        from .parallel import Membership, join

        group = join(self._address, Membership(self._rank, self._size, limit_s, self._end), device_of(self._options.model))
        return group, build_follower(self._options, group, self._progress)

    def _progress(self, done: int, total: int) -> None:
        self._loaded = (done, total)

    def _end(self, why: str) -> None:
        log.critical("rank %d ends: %s", self._rank, why)
        logging.shutdown()
        self._die(1)


class Follower:
    """Computes the leader's plans."""

    def __init__(self, group: RankGroup, runner: FollowerRunner) -> None:
        self._group = group
        self._runner = runner
        self._began_s: float | None = None

    def step_s(self) -> float:
        """How long the step has taken so far that is being computed now; 0.0 while there is none."""
        began_s = self._began_s
        return 0.0 if began_s is None else time.monotonic() - began_s

    def follow(self) -> None:
        """Returns when the leader says that it is over.

        Raises:
            GroupBroken: a rank is gone or silent.
            BadMessage: what the leader said is no message.
        """
        while (step := unpack(self._group.receive())) is not None:
            self._began_s = time.monotonic()
            self._runner.run(step.plan, step.sampled)
            self._began_s = None
        self._runner.close()
        self._group.close()
