"""Calls to Ray actors with a time-out, and what they are called."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError

from ...worker.protocol import ReplicaLost

CONTROLLER_NAME = "controller"
CALL_TIMEOUT_S = 5.0

ray_: Any = ray  # for its functions without annotations


class LifeName(NamedTuple):
    """One life of one replica. Its leader is the actor `str(life)`; no two lives share a name, so a stale one is never mistaken."""

    replica_id: str
    epoch: int

    def __str__(self) -> str:
        return f"{self.replica_id}@{self.epoch}"

    def rank(self, rank: int) -> str:
        """The actor's name of a rank; rank 0 is the leader."""
        return f"{self}/{rank}" if rank else str(self)

    @staticmethod
    def parse(actor: str) -> tuple[LifeName, int] | None:
        """(life, rank) of an actor's name; None when it is not a rank's."""
        life, _, rank = actor.partition("/")
        replica_id, at, epoch = life.partition("@")
        if not at or not epoch.isdigit() or not (rank or "0").isdigit():
            return None
        return LifeName(replica_id, int(epoch)), int(rank or 0)


def remote_class(cls: type, **options: Any) -> Any:
    """An undecorated class as an actor class with these options."""
    return ray_.remote(**options)(cls)


async def value(ref: Any, timeout_s: float) -> Any:
    """The value of a call; TimeoutError when it is not there in time."""
    async with asyncio.timeout(timeout_s):
        return await ref


async def answer(ref: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
    """The value of a call; ReplicaLost when it failed or took too long."""
    try:
        return await value(ref, timeout_s)
    except TimeoutError:
        raise ReplicaLost(f"no answer within {timeout_s:g} s") from None
    except RayError as error:
        raise ReplicaLost(first_line(error)) from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
