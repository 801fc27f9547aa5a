"""From wishes to targets: bounds, budget, hysteresis, cooldowns and sleep, second by second; and the traps of autoscalers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import pytest

from quire.cluster.arrivals import ArrivalWindow
from quire.cluster.autoscaling import AutoscalingContext, ReplicaFigures
from quire.cluster.autoscaling_guard import Autoscaler, ScaleGuard, ScaleLimits, Why
from quire.cluster.autoscaling_policies import OngoingPolicy, PagesPolicy, QueuePolicy, SloPolicy

QUICK = ScaleLimits(min_replicas=1, max_replicas=8, up_cooldown_s=2.0, down_cooldown_s=10.0, zero_after_s=20.0, patience_s=30.0)


def ctx(target: int, now_s: float = 0.0, running: float = 1, used: float = 0.0, **more: Any) -> AutoscalingContext:
    """So many replicas, all ready, of 100 pages each."""
    replicas = tuple(ReplicaFigures(f"replica-{i}", running, pages_total=100, pages_free=100 - used) for i in range(target))
    return AutoscalingContext(now_s=now_s, target_num_replicas=target, replicas=replicas, **more)


class Case(NamedTuple):
    """One wish, for the first time, when the cooldowns are 0."""

    before: int
    wanted: float
    target: int
    why: Why
    limits: ScaleLimits = replace(QUICK, up_cooldown_s=0.0, down_cooldown_s=0.0)
    more: dict[str, Any] = {}  # noqa: RUF012


AT_ONCE = replace(QUICK, up_cooldown_s=0.0, down_cooldown_s=0.0)
ASLEEP = replace(AT_ONCE, min_replicas=0)
FOUR_GPUS = replace(AT_ONCE, gpus_per_replica=2, gpu_budget=5)

CASES = {
    "as it is": Case(3, 3, 3, Why.STEADY),
    "up": Case(1, 2.6, 3, Why.POLICY),
    "down": Case(4, 1.2, 2, Why.POLICY),
    "a little more is not worth a replica": Case(3, 3.09, 3, Why.HYSTERESIS),
    "enough more is": Case(3, 3.11, 4, Why.POLICY),
    "a little room is not enough to do with one less": Case(3, 1.95, 3, Why.HYSTERESIS),
    "enough room is": Case(3, 1.85, 2, Why.POLICY),
    "not below the minimum": Case(2, 0, 1, Why.MIN),
    "the minimum, although nobody wants it": Case(1, 0, 3, Why.MIN, replace(AT_ONCE, min_replicas=3)),
    "not above the maximum": Case(7, 20, 8, Why.MAX),
    "not above the budget": Case(1, 4, 2, Why.BUDGET, FOUR_GPUS),
    "a budget below the minimum": Case(3, 3, 2, Why.BUDGET, replace(FOUR_GPUS, min_replicas=3)),
    "a budget too small for one": Case(0, 3, 0, Why.BUDGET, replace(FOUR_GPUS, gpu_budget=1), {"queued_requests": 4}),
    "nothing is there, and a request waits": Case(0, 0, 1, Why.WAKE, ASLEEP, {"queued_requests": 1}),
    "nothing is there, and nothing waits": Case(0, 0, 0, Why.STEADY, ASLEEP),
    "nothing is there, and a schedule wants some": Case(0, 2, 2, Why.POLICY, ASLEEP),
    "what runs would not fit into fewer": Case(3, 1, 3, Why.NO_ROOM, AT_ONCE, {"used": 65.0}),
    "as few as what runs fits into": Case(4, 1, 3, Why.POLICY, AT_ONCE, {"used": 65.0}),
    "one that does not come is waited for no longer by asking for others": Case(2, 4, 2, Why.STALLED, AT_ONCE, {"unready_s": 31.0}),
    "one that does not come may go": Case(2, 1, 1, Why.POLICY, AT_ONCE, {"unready_s": 31.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wish_becomes_a_target(name: str) -> None:
    case = CASES[name]
    assert ScaleGuard(case.limits).target(case.wanted, ctx(case.before, **case.more)) == (case.target, case.why)


def run(limits: ScaleLimits, target: int, wishes: list[float], step_s: float = 1.0, **more: Any) -> list[int]:
    """The target after each wish, one every `step_s`."""
    guard, found = ScaleGuard(limits), []
    for i, wanted in enumerate(wishes):
        target, _ = guard.target(wanted, ctx(target, now_s=i * step_s, **more))
        found.append(target)
    return found


def test_up_when_it_has_been_wanted_for_the_cooldown() -> None:
    assert run(QUICK, 1, [2, 2, 2, 3, 3, 3]) == [1, 1, 2, 2, 2, 3]
    assert run(QUICK, 1, [2, 2, 1, 2, 2, 1]) == [1] * 6


def test_down_to_the_most_that_was_wanted_in_the_cooldown() -> None:
    assert run(QUICK, 5, [1] * 4 + [3] + [1] * 14) == [5] * 10 + [3] * 9
    assert run(QUICK, 5, [1] * 4 + [3] + [1] * 18)[-1] == 1


def test_a_change_begins_the_cooldown_anew() -> None:
    assert run(QUICK, 3, [2] * 11 + [1] * 11) == [3] * 10 + [2] * 11 + [1]


def test_flapping_load_moves_nothing() -> None:
    assert set(run(QUICK, 3, [1, 6] * 40)) == {3}
    assert set(run(QUICK, 3, [1, 1, 1, 3] * 20)) == {3}


def test_to_zero_after_an_idle_while_and_back_with_the_first_request() -> None:
    limits = replace(QUICK, min_replicas=0)
    assert run(limits, 2, [0] * 30, running=0) == [2] * 10 + [1] * 10 + [0] * 10
    assert run(limits, 1, [0] * 100) == [1] * 100  # one runs all the time
    guard = ScaleGuard(limits)
    assert guard.target(0, ctx(0)) == (0, Why.STEADY)
    assert guard.target(3.5, ctx(0, now_s=0.1, queued_requests=1)) == (4, Why.WAKE)


# --- the traps, with the policies ---


class World:
    """A cluster by the second: replicas come `start_s` after they are asked for, or never, and each serves so many tokens/s."""

    def __init__(self, limits: ScaleLimits, policy: Any, come: Callable[[int], bool] = lambda _: True) -> None:
        self.autoscaler = Autoscaler("tested", policy, limits)
        self.target = limits.min_replicas
        self.targets: list[int] = []
        self.whys: set[Why] = set()
        self.queued = 0.0
        self._arrivals = ArrivalWindow()
        self._come = come
        self._asked: dict[int, int] = {}

    def second(self, now_s: int, tokens: float) -> None:
        self.queued += tokens
        for _ in range(int(tokens // 100)):
            self._arrivals.came(100.0, float(now_s))
        self._asked = {i: self._asked.get(i, now_s) for i in range(self.target)}
        ready = [i for i, asked_s in self._asked.items() if self._come(i) and now_s - asked_s >= 5]
        served = min(self.queued, 1000.0 * len(ready))
        self.queued -= served
        missing = [now_s - asked_s for i, asked_s in self._asked.items() if i not in ready]
        each, speed = served / 100 / max(len(ready), 1), 1000.0 if served else 0.0  # requests of 100 tokens and 4 pages
        figures = [ReplicaFigures(f"replica-{i}", each, 0, 0, speed, 0.02 if served else 0.0, 100, 100 - 4 * each) for i in ready]
        context = AutoscalingContext(
            now_s=float(now_s),
            target_num_replicas=self.target,
            replicas=tuple(figures),
            unready_s=float(max(missing, default=0)),
            queued_requests=self.queued / 100,
            queued_tokens=self.queued,
            arrivals=self._arrivals.figures(float(now_s)),
        )
        decision = self.autoscaler.decide(context)
        self.target = decision.target
        self.targets.append(decision.target)
        self.whys.add(decision.why)


POLICIES = {
    "queue": lambda: QueuePolicy(),
    "slo": lambda: SloPolicy(target_ttft_ms=2000),
    "pages": lambda: PagesPolicy(),
    "ongoing": lambda: OngoingPolicy(2.0),
}


@pytest.mark.parametrize("name", POLICIES)
class TestTraps:
    def test_nothing_at_the_start(self, name: str) -> None:
        world = World(replace(QUICK, min_replicas=0), POLICIES[name]())
        for now_s in range(60):
            world.second(now_s, 0.0)
        assert set(world.targets) == {0}

    def test_a_burst_from_zero_is_served_and_forgotten(self, name: str) -> None:
        world = World(replace(QUICK, min_replicas=0), POLICIES[name]())
        for now_s in range(200):
            world.second(now_s, 20_000.0 if now_s == 10 else 0.0)
            if now_s == 10:
                assert world.target >= 1, "the first request has woken nobody"
        assert world.queued == 0
        assert world.targets[-1] == 0

    def test_a_replica_that_never_comes_does_not_make_it_ask_for_all(self, name: str) -> None:
        world = World(replace(QUICK, max_replicas=100), POLICIES[name](), come=lambda i: i == 0)
        for now_s in range(600):
            world.second(now_s, 1200.0 if now_s < 400 else 0.0)
        assert Why.STALLED in world.whys
        assert world.targets[399] == world.targets[100], "it asked for more while others did not come"

    def test_nothing_ever_comes(self, name: str) -> None:
        world = World(QUICK, POLICIES[name](), come=lambda _: False)
        for now_s in range(300):
            world.second(now_s, 100.0)
        assert world.targets[-1] == world.targets[50] <= 8

    def test_flapping_load_is_ridden_out(self, name: str) -> None:
        world = World(QUICK, POLICIES[name]())
        for now_s in range(400):
            world.second(now_s, 2500.0 if now_s // 4 % 2 else 0.0)
        late = world.targets[100:]
        changes = sum(a != b for a, b in pairwise(late))
        assert changes <= 2, late

    def test_a_budget_that_is_too_small_is_kept(self, name: str) -> None:
        world = World(replace(QUICK, gpus_per_replica=4, gpu_budget=9), POLICIES[name]())
        for now_s in range(200):
            world.second(now_s, 5000.0)
        assert max(world.targets) <= 2
        assert world.queued > 0


# --- the autoscaler ---


def test_a_policy_that_fails_changes_nothing_and_says_why() -> None:
    answers: list[Any] = [ZeroDivisionError("of a user"), (float("nan"), {}), (-1, {}), ("many", {}), (2, None), (2, {"n": 1})]

    def policy(_: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    scaler = Autoscaler("mine", policy, AT_ONCE)
    for text in ("ZeroDivisionError: of a user", "nan", "-1.0", "could not convert", "NoneType"):
        decision = scaler.decide(ctx(1))
        assert (decision.target, decision.why) == (1, Why.FAILED)
        assert text in decision.detail
    assert scaler.decide(ctx(1)).target == 2


def test_state_and_times_come_back_to_the_policy() -> None:
    found: list[tuple[Any, ...]] = []

    def policy(context: Any) -> tuple[float, dict[str, Any]]:
        found.append((dict(context.policy_state), context.last_scale_up_time, context.capacity_adjusted_max_replicas))
        return 3, {"looks": context.policy_state.get("looks", 0) + 1}

    scaler = Autoscaler("mine", policy, replace(FOUR_GPUS, gpu_budget=6))
    first = scaler.decide(ctx(1, current_time=77.0))
    scaler.decide(ctx(3))
    assert found == [({}, None, 3), ({"looks": 1}, 77.0, 3)]
    assert first.as_json() == {
        "unix_s": 77.0,
        "policy": "mine",
        "wanted": 3.0,
        "before": 1,
        "target": 3,
        "why": "policy",
        "detail": "",
        "inputs": ctx(1).as_inputs(),
        "state": {"looks": 1},
    }
