"""What a running cluster may become without losing a stream, and in which order its replicas are replaced. Pure.

A controller takes other options over as long as pages, and the numbers in them, mean the same before and after: then running requests move
to replicas of the new options. What is named in `FIXED` decides that. Any other option may change: of the engine, which replaces every
replica, or of the controller alone (the number of replicas, routing, queue, autoscaler), which replaces none.

Replicas are replaced one by one: one more comes, and when it serves, one of the old options is emptied and goes. Where there is no room
for one more, one goes first, if what runs fits into the others.
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b
from typing import NamedTuple

from ..worker.config import ClusterOptions, QuireOptions
from .autoscaling_setup import limits_of, replicas_at_first

FIXED = {
    "model": ("model", "served_model_name", "device", "dtype", "attention", "deterministic", "quantize", "max_model_len"),
    "cache": ("page_size", "kv_dtype", "page_link", "verify_moves"),
    "parallel": ("tp",),
    "cluster": ("accelerator_type", "prefill_replicas"),
}
SURGE = 1  # replicas beyond the target while some are replaced
PLACE_PATIENCE_S = 30.0  # that one more may wait for a place before one of the old goes first
VERSION_BYTES = 4


def hindrance(old: QuireOptions, new: QuireOptions) -> str:
    """Why a controller of the old options cannot take over the new ones: the first option that must not change; empty when it can."""
    for owner, names in FIXED.items():
        before, after = (options.cluster if owner == "cluster" else getattr(options.engine, owner) for options in (old, new))
        for name in names:
            if getattr(before, name) != getattr(after, name):
                return f"{name.replace('_', '-')} changes"
    if new.cluster.prefill_replicas:
        return "prefill-replicas: the first replicas are the ones that prefill, whichever others come"
    return ""


def version(options: QuireOptions) -> str:
    """Names what a replica is told when it starts: another version, other replicas."""
    cluster = options.cluster
    told = (replace(options.engine, model=replace(options.engine.model, seed=0)), cluster.span_nodes, cluster.node_label)
    return blake2b(repr(told).encode(), digest_size=VERSION_BYTES).hexdigest()


def shared(options: QuireOptions) -> QuireOptions:
    """The options that a controller and its replicas go by: without what is each ingress's own, and how Ray is reached."""
    cluster: ClusterOptions = replace(options.cluster, ray_address=None, namespace="")
    return QuireOptions(options.engine, cluster=cluster, autoscaling=options.autoscaling)


def number_after(old: QuireOptions, new: QuireOptions, target: int, by_hand: bool) -> tuple[int, bool]:
    """(replicas that there are to be, whether an operator has said so) once the new options hold."""
    alone = new.autoscaling.autoscaler is None
    if alone and (old.autoscaling.autoscaler is not None or old.cluster.replicas != new.cluster.replicas):
        return replicas_at_first(new), False
    return limits_of(new).clamp(target), by_hand and limits_of(new).clamp(target) == target


class Fleet(NamedTuple):
    """The replicas of one model while some are replaced.

    Attributes:
        target: that there are to be.
        most: that the budget of GPUs allows; None: as many as there are.
        new_ready, new_coming: of the present version.
        old: of another version, without those that are going.
        leaving: that are going.
        no_place: one that comes has waited for a place for long.
    """

    target: int
    most: int | None
    new_ready: int
    new_coming: int
    old: int
    leaving: int
    no_place: bool = False


class Step(NamedTuple):
    """So many replicas are to come, and so many of the old version to go; `if_it_fits`: only when the others have room for what runs."""

    come: int = 0
    go: int = 0
    if_it_fits: bool = False


def next_step(fleet: Fleet) -> Step:
    """What is to be done now. A single replica is replaced by way of a second one, whatever the budget."""
    new = fleet.new_ready + fleet.new_coming
    there = new + fleet.old + fleet.leaving
    room = fleet.target + SURGE if fleet.most is None else min(fleet.target + SURGE, max(fleet.most, 1 + SURGE))
    come = max(min(fleet.target - new, room - there), 0)
    go = min(fleet.old, max(fleet.new_ready + fleet.old - fleet.target, 0))
    waits = fleet.no_place if fleet.new_coming else not come
    if not go and fleet.old and waits and not fleet.leaving and fleet.new_ready + fleet.old > 1:
        return Step(come, 1, if_it_fits=True)
    return Step(come, go)
