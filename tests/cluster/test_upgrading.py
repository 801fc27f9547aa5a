"""What a controller can take over, and in which order replicas are replaced."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from quire.cluster.upgrading import FIXED, SURGE, Fleet, Step, hindrance, next_step, number_after, shared, version
from quire.worker.config import EngineOptions, QuireOptions
from quire.worker.options import assemble, leaves

OLD = QuireOptions()


def become(old: QuireOptions = OLD, **values: Any) -> QuireOptions:
    paths = {option.name: option.path for option in leaves(QuireOptions)}
    return assemble(old, {paths[name]: value for name, value in values.items()})


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({}, ""),
        ({"kv_pages": 7, "max_running": 3, "host_memory": 0, "replicas": 4, "routing": "round_robin"}, ""),
        ({"port": 1, "api_key": ("k",), "ray_address": "auto"}, ""),
        ({"model": "other"}, "model changes"),
        ({"served_model_name": "other"}, "served-model-name changes"),
        ({"quantize": "int8"}, "quantize changes"),
        ({"page_size": 16}, "page-size changes"),
        ({"tp": 2}, "tp changes"),
        ({"max_model_len": 100}, "max-model-len changes"),
        ({"prefill_replicas": 1, "replicas": 2}, "prefill-replicas changes"),
    ],
)
def test_what_hinders(values: dict[str, Any], why: str) -> None:
    assert hindrance(OLD, become(**values)) == why


def test_prefill_replicas_hinder_also_when_they_stay() -> None:
    old = become(prefill_replicas=1, replicas=2)
    assert hindrance(old, become(old, replicas=3)).startswith("prefill-replicas: the first replicas")


def test_every_fixed_option_is_one() -> None:
    owners = {f.name: f.default for f in fields(EngineOptions)} | {"cluster": OLD.cluster}
    for owner, names in FIXED.items():
        assert {f.name for f in fields(owners[owner])} >= set(names)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "other"),
    [
        ({"kv_pages": 7}, True),
        ({"threads": 3}, True),
        ({"node_label": ("a=b",)}, True),
        ({"seed": 3}, False),
        ({"replicas": 3, "routing": "round_robin", "autoscaler": "queue", "max_replicas": 3, "grace_s": 1.0}, False),
    ],
)
def test_what_replaces_replicas(values: dict[str, Any], other: bool) -> None:
    assert (version(OLD) != version(become(**values))) is other


def test_what_is_an_ingresses_own_is_not_shared() -> None:
    assert shared(OLD) == shared(become(port=1, namespace="x", ray_address="auto", admin_port=2))
    assert shared(OLD) != shared(become(replicas=2))


@pytest.mark.parametrize(
    ("old", "new", "before", "after"),
    [
        ({"replicas": 2}, {"replicas": 2}, (5, True), (5, True)),
        ({"replicas": 2}, {"replicas": 3}, (5, True), (3, False)),
        ({"replicas": 2}, {"replicas": 2, "autoscaler": "queue", "max_replicas": 4}, (5, True), (4, False)),
        ({"autoscaler": "queue", "max_replicas": 4}, {"replicas": 1}, (3, False), (1, False)),
        ({"autoscaler": "queue", "max_replicas": 4}, {"replicas": 2, "autoscaler": "queue", "max_replicas": 4}, (3, False), (3, False)),
    ],
)
def test_how_many_there_are_to_be(old: dict[str, Any], new: dict[str, Any], before: tuple[int, bool], after: tuple[int, bool]) -> None:
    assert number_after(become(**old), become(**new), *before) == after


STEPS = {
    "one more comes beside the only one": (Fleet(1, None, 0, 0, 1, 0), Step(1, 0)),
    "nothing goes before it serves": (Fleet(1, None, 0, 1, 1, 0), Step(0, 0)),
    "then the old one goes": (Fleet(1, None, 1, 0, 1, 0), Step(0, 1)),
    "one after the other": (Fleet(3, None, 1, 0, 3, 0), Step(0, 1)),
    "not before the place of the last one is free": (Fleet(3, None, 1, 0, 2, 1), Step(0, 0)),
    "then the next one comes": (Fleet(3, None, 1, 0, 2, 0), Step(1, 0)),
    "a budget with room": (Fleet(3, 4, 0, 0, 3, 0), Step(1, 0)),
    "a budget without room: one goes first": (Fleet(3, 3, 0, 0, 3, 0), Step(0, 1, True)),
    "but no second one": (Fleet(3, 3, 0, 0, 2, 1), Step(0, 0)),
    "and then one comes": (Fleet(3, 3, 0, 0, 2, 0), Step(1, 0)),
    "which is waited for": (Fleet(3, 3, 0, 1, 2, 0), Step(0, 0)),
    "a single one is replaced by way of a second, whatever the budget": (Fleet(1, 1, 0, 0, 1, 0), Step(1, 0)),
    "one that finds no place: one goes first": (Fleet(3, None, 0, 1, 3, 0, True), Step(0, 1, True)),
    "unless it is the only one": (Fleet(1, None, 0, 1, 1, 0, True), Step(0, 0)),
    "fewer are wanted meanwhile": (Fleet(1, None, 2, 0, 2, 0), Step(0, 2)),
    "none are wanted": (Fleet(0, None, 0, 0, 2, 0), Step(0, 2)),
    "more are wanted meanwhile": (Fleet(5, None, 1, 0, 2, 0), Step(3, 0)),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_next_step(name: str) -> None:
    fleet, step = STEPS[name]
    assert next_step(fleet) == step


@pytest.mark.parametrize("spare", [None, 0, 1, 4])
@pytest.mark.parametrize("target", [1, 2, 3, 5])
def test_it_ends_with_as_many_new_ones_and_at_no_time_too_few(target: int, spare: int | None) -> None:
    most = None if spare is None else target + spare
    fleet = Fleet(target, most, 0, 0, target, 0)
    for _ in range(6 * target + 2):
        if fleet == Fleet(target, most, target, 0, 0, 0):
            return
        step = next_step(fleet)
        assert step != Step() or fleet.new_coming or fleet.leaving, fleet
        coming = fleet.new_coming + step.come
        fleet = fleet._replace(new_coming=coming, old=fleet.old - step.go, leaving=fleet.leaving + step.go)
        assert fleet.new_ready + fleet.new_coming + fleet.old + fleet.leaving <= target + SURGE
        assert fleet.new_ready + fleet.old >= max(target - 1, 1)
        if not step.come and not step.go:
            fleet = fleet._replace(new_ready=fleet.new_ready + fleet.new_coming, new_coming=0, leaving=0)
    raise AssertionError(f"it does not end: {fleet}")


def test_options_are_the_same_after_they_were_saved() -> None:
    memory = pytest.importorskip("quire.cluster.ray_gateway.memory")
    options = become(
        kv_pages=7, api_key=("a", "b"), grace_s=1.5, autoscaler="queue", max_replicas=3, deterministic=True, node_label=("x=y",)
    )
    assert memory.unpacked(memory.packed(options)) == options
    with pytest.raises(ValueError, match="kv_pages: missing or unknown"):
        memory.unpacked({name: value for name, value in memory.packed(options).items() if name != "kv_pages"})
    with pytest.raises(ValueError, match="tp: must be"):
        memory.unpacked(memory.packed(options) | {"tp": 0})
