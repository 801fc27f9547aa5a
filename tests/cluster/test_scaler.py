"""What the controller does about the number of replicas: who comes, who goes, what it remembers. Leaders only note what they hear."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import pytest
from test_movers import INFO, Cluster, play

from quire.cluster.admin import NotNow
from quire.cluster.controller import Report
from quire.cluster.messages import AdmitRequest
from quire.cluster.ray_gateway.memory import Remembered
from quire.cluster.ray_gateway.scaler import LINGER_S, LOOK_AROUND_S, Scaler
from quire.worker.config import AutoscalingOptions, ClusterOptions, QuireOptions
from quire.worker.protocol import EventFrame, ReplicaLoad


class Memory:
    def __init__(self, saved: Remembered | None = None) -> None:
        self.saved = saved

    def load(self) -> Remembered | None:
        return self.saved

    def save(self, what: Remembered) -> None:
        self.saved = what


class Town(Cluster):
    """Two replicas that are ready, and a scaler over them."""

    def __init__(self, active: int = 80, saved: Remembered | None = None, **scaling: Any) -> None:
        super().__init__(active)
        self.memory: Any = Memory(saved)
        options = QuireOptions(cluster=ClusterOptions(replicas=2), autoscaling=AutoscalingOptions(**scaling))
        self.scaler = Scaler(options, self.table, self.router, self.scheduler, self.movers, self.memory)

    async def look(self, now_s: float) -> None:
        self.scaler._decide(now_s)
        await self.scaler._settle(now_s)

    def names(self) -> list[str]:
        return [r.replica_id for r in self.table.replicas()]

    def empties(self, name: str) -> None:
        """It reports that it holds nothing."""
        load = self.table.replica(name).load._replace(running=0, pages_active=0, pages_free=100)  # type: ignore[union-attr]
        self.table.heard(name, 1, 0.0, load)
        self.scheduler.events(EventFrame(name, 1, 1, 2, True, (), (), (), (), {}, load), 0.0)


def test_more_start_at_once_and_no_more_than_may_be() -> None:
    async def scenario() -> None:
        town = Town(max_replicas=3)
        town.scaler.scale(3)
        await town.look(1.0)
        assert town.names() == ["replica-0", "replica-1", "replica-2"]
        assert town.table.due(1.0) == ["replica-2"]
        assert town.scaler.view()["not_ready"] == {"replica-2": ""}
        with pytest.raises(NotNow, match="4 replicas: must be from 1 to 3"):
            town.scaler.scale(4)
        with pytest.raises(NotNow, match="must be from 1 to 3"):
            town.scaler.scale(0)
        with pytest.raises(NotNow, match="no autoscaler"):
            town.scaler.scale(None)

    play(scenario)


def test_the_cheapest_is_emptied_and_goes_when_its_last_words_are_read() -> None:
    async def scenario() -> None:
        town = Town(active=40)
        town.scaler.scale(1)
        await town.look(1.0)
        assert town.leaders[1].asked("drain") == [(True,)]
        assert town.scaler.view()["leaving"] == {"replica-1": 0}
        await town.look(2.0)
        assert town.names() == ["replica-0", "replica-1"]
        await town.look(2.0 + LINGER_S)
        assert town.names() == ["replica-0"]
        assert [shot.replica_id for shot in town.router.snapshots()] == ["replica-0"]
        assert town.leaders[0].asked("drain") == []

    play(scenario)


def test_one_that_still_holds_something_stays_until_it_does_not() -> None:
    async def scenario() -> None:
        town = Town(active=40)
        town.table.replica("replica-1").load = town.table.replica("replica-0").load  # type: ignore[union-attr]
        town.scaler.scale(1)
        await town.look(1.0)
        for now_s in (2.0, 2.0 + LINGER_S, 20.0):
            await town.look(now_s)
            assert town.names() == ["replica-0", "replica-1"]
        town.empties("replica-1")
        await town.look(21.0)
        await town.look(21.0 + LINGER_S)
        assert town.names() == ["replica-0"]

    play(scenario)


def test_one_that_is_asked_for_again_stays() -> None:
    async def scenario() -> None:
        town = Town(active=40)
        town.scaler.scale(1)
        await town.look(1.0)
        town.scaler.scale(2)
        await town.look(1.5)
        assert town.leaders[1].asked("drain") == [(True,), (False,)]
        await town.look(10.0)
        assert [r.leaving or r.draining for r in town.table.replicas()] == [False, False]

    play(scenario)


def test_what_has_not_come_goes_first_and_at_once() -> None:
    async def scenario() -> None:
        town = Town(active=40)
        town.table.died("replica-0", 1, "killed", 0.5)
        town.scaler.scale(1)
        await town.look(1.0)
        assert town.names() == ["replica-1"]

    play(scenario)


def test_nobody_goes_while_the_others_have_no_room() -> None:
    async def scenario() -> None:
        town = Town(active=80)
        busy = town.table.replica("replica-0").load._replace(pages_active=70, pages_free=30)  # type: ignore[union-attr]
        town.scheduler.events(EventFrame("replica-1", 1, 1, 2, True, (), (), (), (), {}, busy), 0.0)
        town.scaler.scale(1)
        await town.look(1.0)
        assert town.scaler.view()["stays_because"] == "what runs would not fit into the others"
        town.empties("replica-1")
        await town.look(2.0)
        assert [r.replica_id for r in town.table.leaving()] == ["replica-1"]
        assert town.scaler.view()["stays_because"] == ""

    play(scenario)


def test_a_controller_that_begins_anew_knows_the_number_and_touches_nothing_that_it_does_not_know_yet() -> None:
    async def scenario() -> None:
        town = Town(active=40)
        town.scaler.scale(1)
        await town.look(1.0)
        saved = town.memory.saved
        assert saved == Remembered(1, ("replica-0",), ("replica-1",), True, saved.model, (("replica-0", ""), ("replica-1", "")))
        town = Town(saved=saved)
        town.scaler.restore()
        for name in ("replica-0", "replica-1"):
            town.table.adopt(name, 1, 2.0)
        await town.look(2.0)
        assert town.names() == ["replica-0", "replica-1"]  # neither has said anything
        assert town.scaler.view()["by_hand"] is True
        assert [r.replica_id for r in town.table.leaving()] == ["replica-1"]

    play(scenario)


def test_by_the_policy_with_its_reasons_and_inputs(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        town = Town(active=40, autoscaler="ongoing", target_ongoing=1.0, max_replicas=4, scale_up_cooldown_s=0.0)
        for i in range(2):
            request = AdmitRequest(f"q{i}", 0, "", 0, 0.0, None, 1, 100, 10, 110)
            town.scaler.came(request, 0.0)
            town.scheduler.offer(request, 0.0)
        with caplog.at_level(logging.INFO, "quire.cluster.ray_gateway.scaler"):
            await town.look(1.0)
        assert len(town.names()) == 3
        decision = town.scaler.view()["decisions"][-1]
        assert (decision["before"], decision["target"], decision["why"]) == (2, 3, "policy")
        assert decision["inputs"]["queued_requests"] == 2
        assert decision["inputs"]["arrival_tokens_per_s"] > 0
        line = next(record.getMessage() for record in caplog.records if record.getMessage().startswith("replicas: "))
        assert json.loads(line.removeprefix("replicas: ")) == decision
        figures = town.scaler.figures()
        assert (figures.target, figures.ready, figures.gpus, figures.decisions) == (3, 2, 3, {"policy": 1})

    play(scenario)


def test_not_down_before_it_is_known_what_runs() -> None:
    async def scenario() -> None:
        saved = Remembered(2, ("replica-0", "replica-1"), (), False, tuple(INFO))
        town = Town(active=40, saved=saved, autoscaler="queue", max_replicas=4, scale_down_cooldown_s=0.0)
        town.scaler.restore()
        town.table.adopt("replica-0", 1, 1.0)
        town.table.adopt("replica-1", 1, 1.0)
        await town.look(1.0)
        assert town.scaler.view()["target"] == 2
        await town.look(1.0 + LOOK_AROUND_S + 1)
        assert town.scaler.view()["target"] == 1

    play(scenario)


def test_while_there_are_to_be_none_it_says_what_would_be_served() -> None:
    async def scenario() -> None:
        town = Town(active=0, autoscaler="queue", min_replicas=0, max_replicas=2, scale_to_zero_s=5.0, scale_down_cooldown_s=1.0)
        town.empties("replica-0")
        assert town.scaler.asleep() is None
        for now_s in range(12):
            await town.look(float(now_s))
        assert town.names() == []
        assert town.scaler.asleep() is not None
        town.scheduler.offer(AdmitRequest("q", 0, "", 0, 0.0, None, 1, 100, 10, 110), 12.0)
        await town.look(12.0)
        assert town.table.due(12.0) == ["replica-0"]
        assert town.scaler.asleep() is None

    play(scenario)


def ready(town: Town, name: str) -> None:
    """A replica that has come becomes ready, and holds nothing."""
    epoch = town.table.begin(name, 1, 0.0)
    town.table.reported(Report(name, epoch, 1, "n", 0, 0, {}, None, INFO, None), 0.0)
    load = ReplicaLoad(0, 0, 100, 100, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 1)
    town.router.add(name, epoch, INFO)
    town.table.heard(name, epoch, 0.0, load)
    town.scheduler.events(EventFrame(name, epoch, 0, 1, True, (), (), (), (), {}, load), 0.0)


def test_replicas_of_another_version_are_replaced_one_by_one() -> None:
    async def scenario() -> None:
        town = Town(active=40)
        town.table._version = "new"
        for name in ("replica-0", "replica-1"):
            town.table.replica(name).version = "old"  # type: ignore[union-attr]
        await town.look(1.0)
        assert town.names() == ["replica-0", "replica-1", "replica-2"]
        assert town.scaler.view()["outdated"] == ["replica-0", "replica-1"]
        await town.look(2.0)
        assert town.table.leaving() == []  # the new one does not serve yet
        ready(town, "replica-2")
        await town.look(3.0)
        assert [r.replica_id for r in town.table.leaving()] == ["replica-1"]  # it holds less
        await town.look(4.0)
        await town.look(4.0 + LINGER_S)
        await town.look(6.0)
        assert town.names() == ["replica-0", "replica-1", "replica-2"]  # the second of the new ones has the number that is free
        ready(town, "replica-1")
        await town.look(7.0)
        assert town.leaders[0].asked("drain") == [(True,)]
        town.empties("replica-0")
        await town.look(8.0)
        await town.look(8.0 + LINGER_S)
        assert town.names() == ["replica-1", "replica-2"]
        assert town.scaler.view()["outdated"] == []
        assert dict(town.memory.saved.versions) == {"replica-1": "new", "replica-2": "new"}

    play(scenario)


def test_what_fits_nowhere_ends_on_the_old_replica() -> None:
    async def scenario() -> None:
        town = Town(active=80)
        town.table.remove("replica-1")
        town.router.remove("replica-1", 1)
        town.scaler.scale(1)
        town.table._version = "new"
        town.table.replica("replica-0").version = "old"  # type: ignore[union-attr]
        await town.look(1.0)
        ready(town, "replica-1")
        small = ReplicaLoad(0, 0, 10, 10, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 1)
        epoch = town.table.replica("replica-1").epoch  # type: ignore[union-attr]
        town.scheduler.events(EventFrame("replica-1", epoch, 1, 2, True, (), (), (), (), {}, small), 0.0)
        await town.look(2.0)
        assert [r.replica_id for r in town.table.leaving()] == ["replica-0"]
        await town.look(60.0)
        assert town.names() == ["replica-0", "replica-1"]
        town.empties("replica-0")
        await town.look(61.0)
        await town.look(61.0 + LINGER_S)
        assert town.names() == ["replica-1"]

    play(scenario)


def test_a_controller_of_other_options_finds_the_number_that_they_ask_for() -> None:
    async def scenario() -> None:
        town = Town(active=40)
        town.scaler.scale(1)
        options = QuireOptions(cluster=ClusterOptions(replicas=2))
        town.scaler.hand_over(options, replace(options, cluster=ClusterOptions(replicas=3)))
        assert (town.memory.saved.target, town.memory.saved.by_hand) == (3, False)

    play(scenario)
