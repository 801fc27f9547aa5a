"""What each policy wants: tables of figures, and the exact number of replicas. They run in Ray Serve, and its policies here."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest

from quire.cluster.arrivals import ArrivalWindow
from quire.cluster.autoscaling import Arrivals, AutoscalingContext, ReplicaFigures, seen
from quire.cluster.autoscaling_policies import (
    OngoingPolicy,
    PagesPolicy,
    QueuePolicy,
    SchedulePolicy,
    SloPolicy,
    policy_named,
)
from quire.cluster.autoscaling_slo import StepLine, Trend, forecast


def at(name: str = "replica-0", **figures: float) -> ReplicaFigures:
    """A replica of 100 pages and 1000 prefill tokens/s, idle but for what is said."""
    return ReplicaFigures(name, **({"prefill_tokens_per_s": 1000.0, "pages_total": 100.0, "pages_free": 100.0} | figures))


def like(n: int, **figures: float) -> tuple[ReplicaFigures, ...]:
    return tuple(at(f"replica-{i}", **figures) for i in range(n))


def ctx(replicas: tuple[ReplicaFigures, ...] = (), target: int | None = None, **more: Any) -> AutoscalingContext:
    n = len(replicas) if target is None else target
    return AutoscalingContext(replicas=replicas, target_num_replicas=n, capacity_adjusted_max_replicas=16, **more)


EMPTY = ctx()
NEW = ctx(target=2)  # at the start: two are to come, and nobody has said anything
ASKED = ctx(target=2, queued_requests=1, queued_tokens=10)


class Case(NamedTuple):
    policy: Any
    ctx: AutoscalingContext
    wanted: float


QUEUE, PAGES, ONGOING = QueuePolicy(target_wait_s=2.0, utilisation=0.5), PagesPolicy(10, 60), OngoingPolicy(2.0)
WITHIN_1S = SloPolicy(target_ttft_ms=1000)
STEPS_100MS = SloPolicy(target_tpot_ms=100)

CASES = {
    "queue: no replica, no figures, nothing asked": Case(QUEUE, EMPTY, 0),
    "queue: no figures yet": Case(QUEUE, NEW, 0),
    "queue: no figures yet, and a request": Case(QUEUE, ASKED, 2),
    "queue: the first request of all": Case(QUEUE, ctx(queued_requests=1, queued_tokens=500), 1),
    "queue: a burst from zero, by the speed that was measured before": Case(
        QUEUE, ctx(queued_requests=9, queued_tokens=7000, usual_prefill_tokens_per_s=1000), 3.5
    ),
    "queue: what comes": Case(QUEUE, ctx(like(2), arrivals=Arrivals(1, 900)), 1.8),
    "queue: what comes and what waits, here and there": Case(
        QUEUE, ctx(like(2, waiting_tokens=1000), queued_tokens=2000, arrivals=Arrivals(1, 500)), 1 + 2
    ),
    "queue: what runs keeps its pages": Case(QUEUE, ctx(like(3, running=4, pages_free=10)), 3.0),
    "queue: one that is much slower than the others counts little": Case(
        QUEUE, ctx((*like(2), at("c", prefill_tokens_per_s=10)), arrivals=Arrivals(1, 1000)), 2.0
    ),
    "pages: no replica, no figures, nothing asked": Case(PAGES, EMPTY, 0),
    "pages: no figures yet": Case(PAGES, NEW, 0),
    "pages: no figures yet, and a request": Case(PAGES, ASKED, 2),
    "pages: the first request of all": Case(PAGES, ctx(queued_requests=1), 1),
    "pages: within the band": Case(PAGES, ctx(like(2, running=2, pages_free=50)), 2),
    "pages: freeness 5 of 10": Case(PAGES, ctx(like(1, running=10, pages_free=50)), 1.5),
    "pages: what waits counts with its pages": Case(PAGES, ctx(like(1, running=5, waiting=3, waiting_tokens=960, pages_free=90)), 1.2),
    "pages: freeness 90 of 60": Case(PAGES, ctx(like(4, running=1, pages_free=90)), 3),
    "pages: nothing runs": Case(PAGES, ctx(like(3)), 0),
    "ongoing: as in Serve": Case(ONGOING, ctx(like(2, running=3, waiting=1), queued_requests=2), 5.0),
    "ongoing: nothing runs": Case(ONGOING, ctx(like(2)), 0),
    "ongoing: no replica, nothing asked": Case(ONGOING, EMPTY, 0),
    "ongoing: the first request of all": Case(ONGOING, ctx(queued_requests=7), 1),
    "slo: no replica, no figures, nothing asked": Case(WITHIN_1S, EMPTY, 0),
    "slo: no figures yet": Case(WITHIN_1S, NEW, 0),
    "slo: no figures yet, and a request": Case(WITHIN_1S, ASKED, 2),
    "slo: the first request of all": Case(WITHIN_1S, ctx(queued_requests=1, queued_tokens=100), 1),
    "slo: a burst from zero, by the speed that was measured before": Case(
        WITHIN_1S, ctx(queued_requests=9, queued_tokens=3500, usual_prefill_tokens_per_s=1000), 4
    ),
    "slo: the long prompt leaves half of the time for the wait": Case(
        WITHIN_1S, ctx(like(1), queued_requests=5, queued_tokens=2500, arrivals=Arrivals(0.001, 0.1, 100, 500, 0)), 5
    ),
    "slo: more comes than one can compute": Case(WITHIN_1S, ctx(like(1, running=1), arrivals=Arrivals(15, 1500, 100, 100, 0)), 2),
    "slo: at nine tenths of its speed one makes wait too long": Case(
        WITHIN_1S, ctx(like(1, running=1), arrivals=Arrivals(3, 900, 300, 300, 1)), 3
    ),
    "slo: a prompt that takes longer than the target asks for no more than helps": Case(
        WITHIN_1S, ctx(like(1, running=1), arrivals=Arrivals(0.1, 200, 2000, 2000, 0)), 3
    ),
    "slo: steps as long as they are": Case(STEPS_100MS, ctx(like(1, running=10, decode_step_s=0.05)), 1),
    "slo: steps twice as long, of which half is taken to be fixed": Case(STEPS_100MS, ctx(like(1, running=10, decode_step_s=0.15)), 3),
    "slo: not fewer with less than a twentieth to spare": Case(STEPS_100MS, ctx(like(2, running=10, decode_step_s=0.064)), 2),
    "slo: fewer with more than that": Case(STEPS_100MS, ctx(like(2, running=10, decode_step_s=0.062)), 1),
    "slo: not fewer while what was seen misses the target": Case(STEPS_100MS, ctx(like(2, running=10, decode_step_s=0.05), tpot_s=0.11), 2),
    "slo: no more than may be": Case(
        WITHIN_1S, replace(ctx(like(2), queued_requests=9, queued_tokens=9e4), capacity_adjusted_max_replicas=5), 5
    ),
    "slo: what waits": Case(WITHIN_1S, ctx(like(2), queued_tokens=5500, arrivals=Arrivals(1, 500, 100, 100, 0)), 7),
    "slo: what waits, and will have been worked off when another could come": Case(
        WITHIN_1S, ctx(like(2), queued_tokens=5500, arrivals=Arrivals(1, 500, 100, 100, 0), start_s=60), 2
    ),
    "slo: what waits where no more is worked off than comes": Case(
        WITHIN_1S, ctx(like(2), queued_tokens=5500, arrivals=Arrivals(20, 2000, 100, 100, 0), start_s=60), 3
    ),
    "slo: nothing asked": Case(WITHIN_1S, ctx(like(2)), 0),
}


@pytest.mark.parametrize("name", CASES)
def test_a_policy_wants(name: str) -> None:
    policy, context, wanted = CASES[name]
    found, state = policy(context)
    assert found == pytest.approx(wanted)
    assert isinstance(state, dict)


def test_slo_says_what_a_replica_more_or_less_would_come_to() -> None:
    _, state = WITHIN_1S(ctx(like(2, running=1), queued_tokens=1000, arrivals=Arrivals(0.01, 1, 100, 100, 0)))
    assert {n: round(f["ttft_s"], 2) for n, f in state["forecast"].items()} == {1: 1.1, 2: 0.6, 3: 0.43}


def test_slo_learns_how_steps_grow() -> None:
    """A line 20 ms + 2 ms a sequence, from replicas that are filled differently, over many looks."""
    state: dict[str, Any] = {}
    for _ in range(50):
        replicas = tuple(at(f"replica-{x}", running=x, decode_step_s=0.02 + 0.002 * x) for x in (5, 10, 20))
        context = replace(ctx(replicas), policy_state=state)
        _, state = STEPS_100MS(context)
    line = StepLine.after(replace(EMPTY, policy_state=state))
    assert line.step_s(30) == pytest.approx(0.08, rel=0.03)
    assert forecast(context, line, 1).tpot_s == pytest.approx(0.09, rel=0.03)


def looked(rates: list[float], every_s: float = 1.0, **more: Any) -> tuple[float, dict[str, Any]]:
    """What slo wants after looks at these rates of arrival."""
    state: dict[str, Any] = {}
    for i, rate in enumerate(rates):
        context = replace(ctx(like(2), arrivals=Arrivals(rate / 100, rate, 100, 100, 0), **more), now_s=i * every_s, policy_state=state)
        wanted, state = WITHIN_1S(context)
    return wanted, state


@pytest.mark.parametrize("every_s", [1.0, 5.0])
def test_slo_expects_what_rises_to_go_on_rising_until_another_has_started(every_s: float) -> None:
    rising = [100 + 5 * i * every_s for i in range(int(200 / every_s))]  # 5 tokens/s more each second, up to 1,100
    wanted, state = looked(rising, every_s, start_s=0.0)
    assert Trend(*state["_trend"]).growth() == pytest.approx(5.0)
    assert wanted == 2
    assert looked(rising, every_s, start_s=200.0)[0] == 3  # 2,100 by then


@pytest.mark.parametrize("rates", [[500.0] * 100, [1100 - 5.0 * i for i in range(200)], [400.0, 600.0] * 100, [0.0] * 3 + [900.0]])
def test_slo_expects_no_more_of_what_stays_falls_scatters_or_has_only_been_seen_for_a_moment(rates: list[float]) -> None:
    assert Trend(*looked(rates, start_s=200.0)[1]["_trend"]).growth() == 0.0


def _when(text: str, policy: SchedulePolicy, **more: Any) -> float:
    at_s = datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
    return policy(ctx(current_time=at_s, **more))[0]


@pytest.mark.parametrize(
    ("line", "holds", "not_then"),
    [
        ("* 8-17 * * mon-fri 4", "2026-11-27T17:59", "2026-11-28T12:00"),  # a Friday, a Saturday
        ("* 8-17 * * 1-5 4", "2026-11-27T08:00", "2026-11-27T18:00"),
        ("*/15 * * * * 4", "2026-11-27T03:45", "2026-11-27T03:46"),
        ("* * 1,15 * * 4", "2026-11-15T00:00", "2026-11-16T00:00"),
        ("* * * 12 * 4", "2026-12-01T00:00", "2026-11-30T23:59"),
        ("* * * * 7 4", "2026-11-29T09:00", "2026-11-30T09:00"),  # 7 is Sunday, too
        ("* * 13 * fri 4", "2026-11-13T09:00", "2026-11-14T09:00"),  # either will do, as in cron
        ("* * 13 * fri 4", "2026-11-27T09:00", "2026-11-26T09:00"),
    ],
)
def test_a_schedule_is_a_floor_while_it_matches(line: str, holds: str, not_then: str) -> None:
    policy = SchedulePolicy([line])
    assert _when(holds, policy) == 4
    assert _when(not_then, policy) == 0
    assert _when(not_then, policy, queued_requests=3) == 1


def test_the_highest_floor_holds_beside_what_another_policy_wants() -> None:
    policy = SchedulePolicy(["* 8-17 * * * 2", "* 12 * * * 5"], "Europe/Berlin", OngoingPolicy(2.0))
    busy = {"replicas": like(2, running=3), "target": 2}
    assert _when("2026-11-27T11:30", policy, **busy) == 5  # 12:30 there
    assert _when("2026-11-27T08:30", policy, **busy) == 3
    assert _when("2026-11-27T08:30", policy) == 2


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("* * * * 4", "MINUTE HOUR DAY MONTH WEEKDAY REPLICAS are due"),
        ("* * * * * many", "MINUTE HOUR DAY MONTH WEEKDAY REPLICAS are due"),
        ("60 * * * * 4", "'60' is no minute from 0 to 59"),
        ("* 17-8 * * * 4", "'17-8' is no hour from 0 to 23"),
        ("* * 0 * * 4", "'0' is no day from 1 to 31"),
        ("* * * * someday 4", "'someday' is no weekday"),
        ("*/0 * * * * 4", "'*/0' is no minute"),
    ],
)
def test_a_line_of_a_schedule_that_is_wrong_is_named(line: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=r"schedule ") as caught:
        SchedulePolicy([line])
    assert line in str(caught.value)
    assert wrong in str(caught.value)


def test_there_is_no_such_time_zone() -> None:
    with pytest.raises(ValueError, match="time zone 'Mars/Olympus'"):
        SchedulePolicy([], "Mars/Olympus")


# --- by name ---


class Mine:
    """A user's policy: written for either."""

    def __init__(self, each: float = 4.0) -> None:
        self.each = each

    def __call__(self, ctx: Any) -> tuple[float, dict[str, Any]]:
        return ctx.total_num_requests / self.each, {"asked": ctx.policy_state.get("asked", 0) + 1}


def test_a_user_names_a_class_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import ModuleType

    module = ModuleType("my_policies")
    module.Mine, module.number = Mine, 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_policies", module)
    assert policy_named("my_policies:Mine", {"each": 2.0})(ctx(like(1, running=6))) == (3.0, {"asked": 1})
    assert isinstance(policy_named("queue", {"target_wait_s": 1.0}), QueuePolicy)
    for name, arguments, wrong in (
        ("quue", {}, "must be one of queue, slo, pages, schedule, ongoing, or module:Class"),
        ("my_policies:Other", {}, "has no attribute 'Other'"),
        ("no_such_module:Mine", {}, "No module named"),
        ("my_policies:number", {}, "is not callable"),
        ("my_policies:Mine", {"eech": 1}, "eech"),
        ("slo", {}, "a target is needed"),
    ):
        with pytest.raises(ValueError, match=r"slo policy|autoscaler") as caught:
            policy_named(name, arguments)
        assert wrong in str(caught.value)


# --- Ray Serve ---


def _of_serve(running: int, queued: float, metrics: dict[str, dict[str, float]]) -> Any:
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed whole")
    from ray.serve.config import AutoscalingConfig
    from ray.serve.config import AutoscalingContext as ServeContext

    names = [f"replica-{i}" for i in range(running)]
    return ServeContext(
        deployment_id="d",
        deployment_name="d",
        app_name="a",
        current_num_replicas=running,
        target_num_replicas=running,
        running_replicas=names,
        total_num_requests=queued + 6,
        total_queued_requests=queued,
        aggregated_metrics=metrics,
        raw_metrics=None,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=1e9,
        config=AutoscalingConfig(max_replicas=8),
    )


def test_policies_of_ray_serve_run_here() -> None:
    """All the same numbers, but one: with no replica and nothing asked, Serve's keeps its target."""
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed whole")
    from ray.serve.autoscaling_policy import default_autoscaling_policy

    for context in (ctx(like(3, running=4)), ctx(like(1), queued_requests=5), EMPTY, ctx(queued_requests=5), NEW):
        assert default_autoscaling_policy(context)[0] == OngoingPolicy(2.0)(context)[0]


def test_the_context_has_every_attribute_of_ray_serves() -> None:
    serve = _of_serve(2, 0.0, {})
    names = {name.removesuffix("_value").lstrip("_") for name in vars(serve)} | {"total_running_requests"}
    assert [name for name in sorted(names) if not hasattr(EMPTY, name)] == []


def test_our_policies_run_in_ray_serve() -> None:
    names = ("replica-0", "replica-1")
    metrics = {
        "prefill_tokens_per_s": dict.fromkeys(names, 1000.0),
        "waiting_tokens": {"replica-0": 5000.0},
        "pages_total": dict.fromkeys(names, 100.0),
        "pages_free": dict.fromkeys(names, 40.0),
    }
    context = _of_serve(2, 4.0, metrics)
    assert seen(context).total_num_requests == context.total_num_requests
    assert QUEUE(context)[0] == 2.5
    assert PAGES(context)[0] == pytest.approx((120 + 5000 / 32 + 100) / 100)
    assert SloPolicy(target_ttft_ms=1000)(context)[0] == 5
    assert ONGOING(context)[0] == 5
    assert SchedulePolicy(["* * * * * 3"], beside=ONGOING)(context)[0] == 5
    bare = _of_serve(2, 4.0, {})
    assert [policy(bare)[0] for policy in (QUEUE, PAGES, WITHIN_1S)] == [2, 2, 2]


# --- what comes ---


def test_arrivals_of_the_last_seconds() -> None:
    window = ArrivalWindow(window_s=10.0)
    assert window.figures(100.0) == Arrivals()
    for i in range(20):
        window.came(100.0 if i % 2 else 300.0, 100.0 + i)
    figures = window.figures(120.0)
    assert figures == Arrivals(0.9, 170.0, pytest.approx(188.9, abs=0.1), 300.0, pytest.approx(0.277, abs=0.001))  # 111 to 119
    assert window.figures(200.0) == Arrivals()


def test_a_window_that_has_just_begun_is_as_long_as_what_is_known() -> None:
    window = ArrivalWindow(window_s=60.0)
    for i in range(8):
        window.came(50.0, 1000.0 + i / 2)
    assert window.figures(1004.0).requests_per_s == 2.0
