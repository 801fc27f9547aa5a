"""Starts one life of a replica - a placement group, its leader, its other ranks -, finds those that run, and ends them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ...worker.actor import CONCURRENCY_GROUPS, ReplicaActor
from ...worker.config import QuireOptions
from ...worker.rank import RANK_CONCURRENCY_GROUPS, RankActor
from ..placement import ACCELERATOR, ACCELERATOR_SHARE, Demand, Node, missing
from .calls import LifeName, answer, first_line, ray_, remote_class

log = logging.getLogger(__name__)

PLACE_POLL_S = 0.25
RENDEZVOUS_TIMEOUT_S = 60.0  # the leader's process has to start, no more


class NoPlace(Exception):
    """The Ray cluster has no place for a replica; says what is missing."""


@dataclass(slots=True)
class Life:
    """The actors of one life of a replica."""

    name: LifeName
    leader: Any
    ranks: dict[int, Any] = field(default_factory=dict)  # from 1 on


class Lives:
    """All lives of the replicas of one namespace.

    Args:
        options: of the cluster.
        hash_key: of page hashes.
    """

    def __init__(self, options: QuireOptions, hash_key: bytes) -> None:
        self._options = options
        self._hash_key = hash_key
        self._namespace = options.cluster.namespace
        self.log_level = options.server.log_level  # of the lives to come

    async def start(self, name: LifeName, waits: Callable[[str], None]) -> Life:
        """A new life; `waits` hears what its start waits for.

        Raises:
            NoPlace: the cluster had no place for it in time.
            ReplicaLost: its leader died at once.
            RayError, ValueError: Ray refused.
        """
        demand = self._demand()
        group = await self._place(name, demand, waits)
        logs = (self.log_level, self._options.server.log_format)
        actor = self._actor(ReplicaActor, name, 0, group, demand, CONCURRENCY_GROUPS)
        cluster = self._options.cluster
        more = {"across_nodes": cluster.span_nodes or cluster.ray_address is not None, "otlp_endpoint": self._options.server.otlp_endpoint}
        place = str(name), self._namespace
        leader = actor.remote(name.replica_id, name.epoch, self._options.engine, self._hash_key, *logs, **more, place=place)
        life = Life(name, leader)
        if demand.ranks > 1:
            address = await answer(leader.rendezvous.remote(), RENDEZVOUS_TIMEOUT_S)
            for rank in range(1, demand.ranks):
                actor = self._actor(RankActor, name, rank, group, demand, RANK_CONCURRENCY_GROUPS)
                life.ranks[rank] = actor.remote(rank, demand.ranks, address, self._options.engine, *logs)
        return life

    def find(self) -> list[Life]:
        """The lives that run, whole; what is left of others is ended. Blocks."""
        found: dict[LifeName, dict[int, Any]] = {}
        for row in ray_.util.list_named_actors(all_namespaces=True):
            parsed = LifeName.parse(row["name"]) if row["namespace"] == self._namespace else None
            if parsed is not None:
                try:
                    found.setdefault(parsed[0], {})[parsed[1]] = ray_.get_actor(row["name"], self._namespace)
                except ValueError:  # it has just died
                    continue
        lives = []
        for name, actors in found.items():
            if set(actors) == set(range(self._options.engine.parallel.tp)):
                lives.append(Life(name, actors.pop(0), actors))
            else:
                for actor in actors.values():
                    ray.kill(actor)
        return lives

    def end(self, name: LifeName) -> None:
        """Ends all processes of a life, and frees its place. Blocks; nothing happens when there is nothing left of it."""
        for rank in range(self._options.engine.parallel.tp):
            try:
                ray.kill(ray_.get_actor(name.rank(rank), self._namespace))
            except ValueError:
                continue
        self._free(lambda of: of == name)

    def sweep(self, keep: Iterable[LifeName]) -> None:
        """Frees the places of all lives but these, whichever controller made them. Blocks."""
        kept = set(keep)
        self._free(lambda of: of not in kept)

    def _actor(self, cls: type, name: LifeName, rank: int, group: PlacementGroup, demand: Demand, groups: dict[str, int]) -> Any:
        return remote_class(
            cls,
            name=name.rank(rank),
            namespace=self._namespace,
            lifetime="detached",
            num_cpus=demand.bundle["CPU"],
            num_gpus=demand.bundle.get("GPU", 0),
            max_restarts=0,  # a new life needs a new epoch, which only the controller gives
            concurrency_groups=groups,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank),
        )

    async def _place(self, name: LifeName, demand: Demand, waits: Callable[[str], None]) -> PlacementGroup:
        group: PlacementGroup = placement_group(
            [demand.bundle] * demand.ranks,
            strategy=demand.strategy,
            name=self._group_name(name),
            lifetime="detached",
            bundle_label_selector=[demand.labels] * demand.ranks if demand.labels else None,
        )
        deadline_s = time.monotonic() + self._options.cluster.start_timeout_s
        while not await asyncio.to_thread(group.wait, PLACE_POLL_S):
            lacks = missing(demand, [Node(n["Resources"], n["Labels"]) for n in ray_.nodes() if n["Alive"]])
            taken = f"{demand.ranks} x {demand.bundle}, which others have taken"
            waits(f"waiting for {lacks or taken}")
            local = self._options.cluster.ray_address is None  # such a cluster does not grow
            if time.monotonic() > deadline_s or (local and lacks):
                remove_placement_group(group)
                raise NoPlace(f"the Ray cluster has no place for it: {lacks or taken}")
        waits("")
        return group

    def _demand(self) -> Demand:
        options = self._options
        gpus = ray_.cluster_resources().get("GPU", 0.0)
        device = options.engine.model.device
        bundle = {"CPU": 1.0}
        if device == "cuda" or (device == "auto" and gpus > 0):
            bundle["GPU"] = 1.0
        if options.cluster.accelerator_type is not None:
            bundle[ACCELERATOR + options.cluster.accelerator_type] = ACCELERATOR_SHARE
        labels = dict(label.split("=", 1) for label in options.cluster.node_label)
        return Demand(bundle, options.engine.parallel.tp, not options.cluster.span_nodes, labels)

    def _free(self, unwanted: Callable[[LifeName], bool]) -> None:
        for group_id, row in ray.util.placement_group_table().items():
            namespace, _, life = row["name"].rpartition("/")
            parsed = LifeName.parse(life)
            if namespace == self._namespace and parsed is not None and unwanted(parsed[0]) and row["state"] != "REMOVED":
                try:
                    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id))))
                except RayError as error:
                    log.warning("the place of %s could not be freed: %s", life, first_line(error))

    def _group_name(self, name: LifeName) -> str:
        return f"{self._namespace}/{name}"
