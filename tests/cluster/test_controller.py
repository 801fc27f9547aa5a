"""The controller's table: lives and epochs, routing, leases, and what is said when resources are missing."""

from __future__ import annotations

import pytest

from quire.cluster.controller import Controller, ReplicaState, Report, missing_resources
from quire.cluster.messages import Route
from quire.worker.protocol import EngineStats, ModelInfo, ReplicaLost

INFO = ModelInfo("m", "/m", 128, 64, (2,), 0)


def stats(running: int = 0, waiting: int = 0) -> EngineStats:
    return EngineStats(0, running, waiting, 8, 8, 0, 0, 0, 0, 0, 0, 0, 0, {}, 0.0)


def report(replica_id: str, epoch: int, *, ready: bool = True, failure: str | None = None, running: int = 0) -> Report:
    return Report(replica_id, epoch, 1, 0, 0, {}, failure, INFO if ready else None, stats(running) if ready else None)


def state(controller: Controller, replica_id: str = "a") -> ReplicaState:
    return next(r.state for r in controller.replicas() if r.replica_id == replica_id)


def test_nothing_is_routed_before_a_replica_is_ready_or_after_it_died() -> None:
    controller = Controller()
    epoch = controller.begin("a", 1000)
    controller.reported(report("a", epoch, ready=False))
    with pytest.raises(ReplicaLost):
        controller.admit(1)
    controller.reported(report("a", epoch))
    assert controller.admit(1) == Route("a", epoch)
    controller.died("a", epoch, "killed")
    with pytest.raises(ReplicaLost):
        controller.admit(1)
    controller.reported(report("a", epoch))  # a last word that was under way
    assert state(controller) is ReplicaState.DEAD


def test_epochs_grow_even_when_the_clock_does_not() -> None:
    controller = Controller()
    first = controller.begin("a", 1000)
    assert controller.begin("a", 1000) == first + 1
    assert controller.begin("a", 500) == first + 2
    assert controller.begin("a", 5000) == 5000


def test_a_stale_life_neither_reports_nor_kills() -> None:
    controller = Controller()
    old = controller.begin("a", 1000)
    new = controller.begin("a", 2000)
    controller.reported(report("a", old))
    assert state(controller) is ReplicaState.STARTING
    controller.reported(report("a", new))
    controller.died("a", old, "late news")
    assert controller.admit(1).epoch == new


def test_the_table_is_rebuilt_from_reports() -> None:
    controller = Controller()
    controller.reported(report("a", 7))
    controller.reported(report("b", 9, ready=False))
    assert controller.admit(1) == Route("a", 7)
    assert state(controller, "b") is ReplicaState.STARTING
    assert controller.begin("a", 1) == 8


def test_a_failure_kills_and_the_first_reason_stays() -> None:
    controller = Controller()
    epoch = controller.begin("a", 1)
    controller.reported(report("a", epoch, ready=False, failure="no such model"))
    controller.died("a", epoch, "exit 1")
    assert [(r.state, r.reason) for r in controller.replicas()] == [(ReplicaState.DEAD, "no such model")]


def test_the_least_loaded_gets_it_and_a_burst_does_not_pile_up() -> None:
    controller = Controller()
    controller.reported(report("a", 1, running=2))
    controller.reported(report("b", 1, running=0))
    assert [controller.admit(1).replica_id for _ in range(4)] == ["b", "b", "a", "b"]
    controller.reported(report("a", 1, running=9))
    controller.reported(report("b", 1, running=4))
    assert controller.admit(1).replica_id == "b"


def test_the_cluster_is_wanted_while_somebody_holds_a_lease() -> None:
    controller = Controller()
    assert not controller.wanted(0.0)
    controller.renew("x", 10.0)
    controller.renew("y", 20.0)
    controller.release("y")
    assert controller.wanted(9.0)
    assert not controller.wanted(10.0)
    controller.renew("x", 30.0)
    assert controller.wanted(29.0)


@pytest.mark.parametrize(
    ("demand", "nodes", "said"),
    [
        ({"CPU": 1, "GPU": 1}, [{"CPU": 8}], "1 GPU (the largest node has 0)"),
        ({"CPU": 4}, [{"CPU": 2}, {"CPU": 3}], "4 CPU (the largest node has 3)"),
        ({"CPU": 4, "GPU": 1}, [{"CPU": 4}, {"CPU": 1, "GPU": 1}], "one node with 4 CPU, 1 GPU"),
        ({"CPU": 1}, [], "1 CPU (the largest node has 0)"),
        ({"CPU": 2}, [{"CPU": 2}], ""),
    ],
)
def test_missing_resources_are_named(demand: dict[str, float], nodes: list[dict[str, float]], said: str) -> None:
    assert missing_resources(demand, nodes) == said
