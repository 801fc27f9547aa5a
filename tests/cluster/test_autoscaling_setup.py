"""From options to an autoscaler: what is made of them, and which flag is named when they cannot work."""

from __future__ import annotations

from typing import Any

import pytest

from quire.cluster.autoscaling import AutoscalingContext
from quire.cluster.autoscaling_setup import autoscaler_of, limits_of, most_replicas, replicas_at_first
from quire.worker.config import AutoscalingOptions, ClusterOptions, EngineOptions, ParallelOptions, QuireOptions


def options(replicas: int = 1, tp: int = 1, prefill: int = 0, **scaling: Any) -> QuireOptions:
    cluster = ClusterOptions(replicas=replicas, prefill_replicas=prefill)
    return QuireOptions(EngineOptions(parallel=ParallelOptions(tp=tp)), cluster=cluster, autoscaling=AutoscalingOptions(**scaling))


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"autoscaler": "queue"}, "--autoscaler queue: needs --max-replicas"),
        ({"autoscaler": "quue", "max_replicas": 2}, "must be one of queue, slo"),
        ({"autoscaler": "slo", "max_replicas": 2}, "a target is needed"),
        ({"min_replicas": 3, "max_replicas": 2}, "--min-replicas 3: is above --max-replicas 2"),
        ({"tp": 4, "gpu_budget": 3}, "--gpu-budget 3: one replica takes 4"),
        ({"schedule": ("* * * * * 2",)}, "--schedule: needs --autoscaler"),
        ({"autoscaler": "schedule", "max_replicas": 2, "schedule": ("* * 2",)}, "schedule '* * 2'"),
        ({"autoscaler": "pages", "max_replicas": 2, "autoscaler_arg": ("low",)}, "--autoscaler-arg 'low': must be name=value"),
        ({"autoscaler": "pages", "max_replicas": 2, "autoscaler_arg": ("lo=3",)}, "lo"),
        ({"autoscaler": "queue", "max_replicas": 4, "prefill": 1}, "--min-replicas 1: must be above --prefill-replicas 1"),
    ],
)
def test_what_cannot_work_is_said_with_its_flag(given: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        autoscaler_of(options(**given))
    assert wrong in str(caught.value)


def test_without_a_policy_there_is_none_and_only_the_bounds_hold() -> None:
    assert autoscaler_of(options(replicas=3)) is None
    assert replicas_at_first(options(replicas=3)) == 3
    assert limits_of(options(max_replicas=5, tp=2, gpu_budget=7)).most == 3


def test_arguments_reach_the_policy() -> None:
    made = autoscaler_of(options(autoscaler="ongoing", max_replicas=9, target_ongoing=4.0, scale_up_cooldown_s=0.0))
    assert made is not None
    assert made.decide(AutoscalingContext(queued_requests=8)).target == 1
    over = autoscaler_of(options(autoscaler="pages", max_replicas=9, autoscaler_arg=("low=70", "high=80.5")))
    assert over is not None
    with pytest.raises(ValueError, match="low 70 must be"):
        autoscaler_of(options(autoscaler="pages", max_replicas=9, autoscaler_arg=("low=70",)))


def test_a_schedule_stands_beside_any_policy() -> None:
    made = autoscaler_of(options(autoscaler="ongoing", max_replicas=9, schedule=("* * * * * 5",), scale_up_cooldown_s=0.0))
    assert made is not None
    assert made.decide(AutoscalingContext(target_num_replicas=1)).target == 5


@pytest.mark.parametrize(
    ("given", "first", "most"),
    [
        ({"replicas": 2}, 2, 2),
        ({"autoscaler": "queue", "max_replicas": 4}, 1, 4),
        ({"autoscaler": "queue", "max_replicas": 4, "replicas": 9}, 4, 9),
        ({"autoscaler": "queue", "min_replicas": 2, "max_replicas": 4}, 2, 4),
        ({"autoscaler": "queue", "min_replicas": 0, "max_replicas": 4}, 1, 4),
        ({"autoscaler": "queue", "max_replicas": 4, "replicas": 4, "tp": 2, "gpu_budget": 5}, 2, 4),
    ],
)
def test_where_it_begins(given: dict[str, Any], first: int, most: int) -> None:
    assert (replicas_at_first(options(**given)), most_replicas(options(**given))) == (first, most)
