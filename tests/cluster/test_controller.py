"""The controller's table: lives and epochs, silence, restarts with backoff, what is hopeless, leases."""

from __future__ import annotations

import pytest

from quire.cluster.controller import SILENCE_S, START_ATTEMPTS, SUSPECT_S, Controller, Rank, ReplicaState, Report
from quire.worker.protocol import ModelInfo, ReplicaLoad

INFO = ModelInfo("m", "/m", 128, 64, (2,), 0)
LOAD = ReplicaLoad(1, 0, 8, 4, 0, 4, 0, 0, 0, 0, 0.0, 0.0, 1)
START_TIMEOUT_S = 100.0
A, B = "replica-0", "replica-1"


def report(replica_id: str, epoch: int, *, ready: bool = True, failure: str | None = None) -> Report:
    return Report(replica_id, epoch, 17, "n", 0, 0, {}, failure, INFO if ready else None, None)


def table(replicas: int = 1) -> Controller:
    return Controller(replicas, START_TIMEOUT_S)


def ready(controller: Controller, replica_id: str = A, now_s: float = 0.0, now_ms: int = 1000) -> int:
    epoch = controller.begin(replica_id, now_ms, now_s)
    assert controller.reported(report(replica_id, epoch), now_s)
    return epoch


def states(controller: Controller) -> list[ReplicaState]:
    return [r.state for r in controller.replicas()]


def test_every_replica_is_due_at_once_and_a_begun_one_is_not_due_again() -> None:
    controller = table(2)
    assert controller.due(0.0) == [A, B]
    controller.begin(A, 1000, 0.0)
    assert controller.due(50.0) == [B]


def test_a_life_starts_becomes_ready_and_dies_and_a_last_word_of_it_changes_nothing() -> None:
    controller = table()
    epoch = controller.begin(A, 1000, 0.0)
    assert not controller.reported(report(A, epoch, ready=False), 1.0)
    assert controller.serving() == []
    assert controller.reported(report(A, epoch), 2.0)
    assert not controller.reported(report(A, epoch), 3.0)  # known by now
    assert [r.replica_id for r in controller.serving()] == [A]
    assert controller.died(A, epoch, "killed", 4.0)
    assert not controller.died(A, epoch, "late news", 4.0)
    assert not controller.reported(report(A, epoch), 4.0)
    assert controller.serving() == []
    assert [(r.state, r.reason) for r in controller.replicas()] == [(ReplicaState.DEAD, "killed")]


def test_epochs_grow_even_when_the_clock_does_not() -> None:
    controller = table()
    first = controller.begin(A, 1000, 0.0)
    assert controller.begin(A, 1000, 0.0) == first + 1
    assert controller.begin(A, 500, 0.0) == first + 2
    assert controller.begin(A, 5000, 0.0) == 5000


def test_a_stale_life_neither_reports_nor_kills() -> None:
    controller = table()
    old = controller.begin(A, 1000, 0.0)
    new = controller.begin(A, 2000, 0.0)
    assert not controller.reported(report(A, old), 1.0)
    assert not controller.died(A, old, "late news", 1.0)
    assert states(controller) == [ReplicaState.STARTING]
    assert controller.reported(report(A, new), 1.0)
    assert (controller.lives(A, old), controller.lives(A, new)) == (False, True)


def test_what_another_controller_started_is_adopted_but_not_what_is_stale_or_not_ours() -> None:
    controller = table(2)
    assert controller.adopt(A, 7, 0.0)
    assert not controller.adopt(A, 6, 0.0)
    assert not controller.adopt("replica-9", 8, 0.0)
    assert controller.due(0.0) == [B]
    assert controller.reported(report(A, 7), 0.0)
    assert controller.begin(A, 1, 0.0) == 8


def test_a_dead_replica_is_due_again_after_a_delay_that_doubles_until_it_was_healthy_for_a_minute() -> None:
    controller = table()
    now_s, delays = 0.0, []
    for _ in range(9):
        epoch = ready(controller, now_s=now_s)
        now_s += 1.0
        controller.died(A, epoch, "killed", now_s)
        start_at_s = controller.replicas()[0].start_at_s
        assert start_at_s is not None
        assert controller.due(start_at_s - 0.01) == []
        assert controller.due(start_at_s) == [A]
        delays.append(start_at_s - now_s)
        now_s = start_at_s
    assert delays == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    epoch = ready(controller, now_s=now_s)
    controller.died(A, epoch, "killed", now_s + 60.0)
    assert controller.replicas()[0].start_at_s == now_s + 60.5


def test_failed_starts_and_suspicions_are_no_health_and_no_illness() -> None:
    controller = table()
    delays = []
    for start_s in (0.0, 200.0, 400.0):  # long in starting, never ready
        epoch = controller.begin(A, 1000, start_s)
        controller.died(A, epoch, "killed", start_s + 99.0)
        delays.append((controller.replicas()[0].start_at_s or 0.0) - start_s - 99.0)
    assert delays == [0.5, 1.0, 2.0]
    epoch = ready(controller, now_s=500.0)
    controller.silent(555.0)
    controller.heard(A, epoch, 556.0)
    controller.died(A, epoch, "killed", 561.0)
    assert controller.replicas()[0].start_at_s == 561.5  # healthy since 500


def test_an_operator_need_not_wait() -> None:
    controller = table()
    epoch = ready(controller)
    controller.hurry(A, 5.0)  # it lives: nothing to hurry
    assert controller.due(100.0) == []
    controller.died(A, epoch, "restarted by an operator", 5.0)
    controller.hurry(A, 5.0)
    assert controller.due(5.0) == [A]


def test_silence_makes_suspect_then_dead_and_a_word_makes_well_again() -> None:
    controller = table()
    epoch = ready(controller, now_s=0.0)
    controller.silent(SUSPECT_S)
    assert states(controller) == [ReplicaState.READY]
    controller.silent(SUSPECT_S + 0.1)
    assert states(controller) == [ReplicaState.SUSPECT]
    assert [r.replica_id for r in controller.serving()] == [A]  # its streams may yet go on
    controller.heard(A, epoch, 10.0, LOAD)
    assert states(controller) == [ReplicaState.READY]
    assert controller.replicas()[0].load == LOAD
    controller.silent(10.0 + SUSPECT_S + 0.1)
    controller.silent(10.0 + SILENCE_S)
    assert states(controller) == [ReplicaState.SUSPECT]
    controller.silent(10.0 + SILENCE_S + 0.1)
    assert states(controller) == [ReplicaState.DEAD]
    assert controller.replicas()[0].start_at_s == 10.0 + SILENCE_S + 0.1 + 0.5


def test_a_start_that_takes_too_long_is_given_up_and_says_what_it_waited_for() -> None:
    controller = table()
    controller.silent(1000.0)  # not begun: nothing takes long
    assert states(controller) == [ReplicaState.STARTING]
    epoch = controller.begin(A, 1000, 5.0)
    controller.waits(A, epoch, "waiting for 1 GPU")
    controller.silent(5.0 + START_TIMEOUT_S)
    assert states(controller) == [ReplicaState.STARTING]
    controller.silent(5.0 + START_TIMEOUT_S + 0.1)
    assert controller.replicas()[0].reason == "was not ready within 100 s (waiting for 1 GPU)"


def test_it_is_settled_when_every_replica_was_ready_or_failed_once() -> None:
    controller = table(2)
    assert not controller.settled()
    ready(controller, A)
    epoch = controller.begin(B, 1000, 0.0)
    assert not controller.settled()
    controller.died(B, epoch, "no place", 1.0)
    assert controller.settled()
    controller.begin(B, 1000, 2.0)
    assert controller.settled()


def test_a_model_that_cannot_be_loaded_is_hopeless_at_the_first_attempt() -> None:
    controller = table(2)
    for replica_id in (A, B):
        assert controller.hopeless() == ""
        epoch = controller.begin(replica_id, 1000, 0.0)
        controller.reported(report(replica_id, epoch, ready=False, failure="no such model"), 1.0)
        controller.died(replica_id, epoch, "exit 1", 1.0)  # the first reason stays
    assert controller.hopeless() == "replica-0: no such model"


def test_there_is_hope_while_one_serves_and_for_some_attempts_after() -> None:
    controller = table(2)
    epoch_a, epoch_b = ready(controller, A), ready(controller, B)
    now_s = 0.0
    for _ in range(2 * START_ATTEMPTS):
        controller.died(B, epoch_b, "killed", now_s)
        epoch_b = controller.begin(B, 1000, now_s)
        controller.reported(report(B, epoch_b, ready=False, failure="out of memory"), now_s)
    assert controller.hopeless() == ""
    controller.died(A, epoch_a, "killed", now_s)
    for attempt in range(START_ATTEMPTS):
        assert controller.hopeless() == ""
        epoch_a = controller.begin(A, 1000 + attempt, now_s)
        controller.reported(report(A, epoch_a, ready=False, failure="out of memory"), now_s)
    assert controller.hopeless() == "replica-0: out of memory"
    ready(controller, A)
    assert controller.hopeless() == ""


def test_who_runs_the_ranks_is_known_for_as_long_as_they_live() -> None:
    controller = table()
    epoch = ready(controller)
    controller.rank_reported(A, epoch, Rank(1, 18, "n"))
    controller.rank_reported(A, epoch - 1, Rank(2, 19, "n"))
    assert controller.replicas()[0].ranks == {0: Rank(0, 17, "n"), 1: Rank(1, 18, "n")}
    controller.died(A, epoch, "killed", 1.0)
    assert controller.replicas()[0].ranks == {}


def test_the_cluster_is_wanted_while_somebody_holds_a_lease() -> None:
    controller = table()
    assert not controller.wanted(0.0)
    controller.renew("x", 10.0)
    controller.renew("y", 20.0)
    controller.release("y")
    assert controller.wanted(9.0)
    assert not controller.wanted(10.0)
    controller.renew("x", 30.0)
    assert controller.wanted(29.0)


@pytest.mark.parametrize("replicas", [0, 3])
def test_the_replicas_are_numbered(replicas: int) -> None:
    assert [r.replica_id for r in table(replicas).replicas()] == [f"replica-{i}" for i in range(replicas)]


def test_replicas_come_under_the_lowest_free_number_and_go() -> None:
    controller = table(3)
    for name in (A, B, "replica-2"):
        ready(controller, name)
    controller.leave(B)
    assert [r.replica_id for r in controller.staying()] == [A, "replica-2"]
    assert [r.replica_id for r in controller.leaving()] == [B]
    assert controller.add(5.0) == "replica-3"  # B is still there
    first = controller.replica(B)
    assert first is not None
    controller.remove(B)
    assert not controller.lives(B, first.epoch)
    assert controller.add(6.0) == B
    assert [r.replica_id for r in controller.replicas()] == [A, B, "replica-2", "replica-3"]
    assert controller.due(6.0) == [B, "replica-3"]
    assert not controller.adopt("replica-7", 1, 6.0)


def test_one_that_leaves_is_not_started_again_unless_it_stays() -> None:
    controller = table(2)
    epoch = ready(controller)
    controller.leave(A)
    controller.died(A, epoch, "killed", 1.0)
    assert controller.due(1e9) == [B]
    controller.leave(A, False)
    assert controller.due(1e9) == [A, B]


def test_a_controller_that_begins_anew_has_the_replicas_of_the_one_before() -> None:
    controller = table(1)
    controller.restore((A, "replica-4"), (B,), {})
    assert [r.replica_id for r in controller.staying()] == [A, "replica-4"]
    assert [r.replica_id for r in controller.leaving()] == [B]
    assert controller.adopt(B, 7, 0.0)


def test_a_replica_is_outdated_until_a_life_of_the_present_version_begins() -> None:
    controller = Controller(1, START_TIMEOUT_S, "new")
    controller.restore((A, B, "replica-2"), (), {A: "old", B: "new"})
    assert [controller.outdated(r) for r in controller.replicas()] == [True, False, False]
    controller.adopt(A, 7, 0.0)
    assert [controller.outdated(r) for r in controller.replicas()] == [True, False, False]
    controller.died(A, 7, "killed", 1.0)
    controller.begin(A, 8, 2.0)
    assert [(r.version, controller.outdated(r)) for r in controller.replicas()] == [("new", False), ("new", False), ("", False)]


def test_how_long_one_has_been_missing() -> None:
    controller = table(2)
    assert controller.unready_s(10.0) == 0.0
    epoch = ready(controller, now_s=12.0)
    assert controller.unready_s(15.0) == 5.0  # B
    controller.leave(B)
    assert controller.unready_s(20.0) == 0.0
    controller.died(A, epoch, "killed", 21.0)
    assert controller.unready_s(22.0) == 0.0
    assert controller.unready_s(25.0) == 3.0
