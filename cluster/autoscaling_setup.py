"""From options to an autoscaler. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ..worker.config import AutoscalingOptions, QuireOptions
from .autoscaling import AutoscalingPolicy, ServeConfig
from .autoscaling_guard import MOST_REPLICAS, Autoscaler, ScaleLimits
from .autoscaling_policies import SchedulePolicy, policy_named


def limits_of(options: QuireOptions) -> ScaleLimits:
    """Within which the number of replicas stays, also when it is changed by hand.

    Raises:
        ValueError: naming the flag at fault.
    """
    scaling, tp = options.autoscaling, options.engine.parallel.tp
    most = MOST_REPLICAS if scaling.max_replicas is None else scaling.max_replicas
    if scaling.min_replicas > most:
        raise ValueError(f"--min-replicas {scaling.min_replicas}: is above --max-replicas {most}")
    if scaling.gpu_budget is not None and scaling.gpu_budget < tp:
        raise ValueError(f"--gpu-budget {scaling.gpu_budget}: one replica takes {tp} (--tp)")
    prefill = options.cluster.prefill_replicas
    if prefill and scaling.autoscaler is not None and scaling.min_replicas <= prefill:
        raise ValueError(f"--min-replicas {scaling.min_replicas}: must be above --prefill-replicas {prefill}")
    return ScaleLimits(
        scaling.min_replicas,
        most,
        tp,
        scaling.gpu_budget,
        scaling.scale_up_cooldown_s,
        scaling.scale_down_cooldown_s,
        scaling.scale_to_zero_s,
        patience_s=options.cluster.start_timeout_s,
    )


def autoscaler_of(options: QuireOptions) -> Autoscaler | None:
    """The autoscaler that the options name, if they name one.

    Raises:
        ValueError: naming the flag at fault.
    """
    scaling, limits = options.autoscaling, limits_of(options)
    if scaling.autoscaler is None:
        if scaling.schedule:
            raise ValueError("--schedule: needs --autoscaler (`--autoscaler schedule` for the schedule alone)")
        return None
    if scaling.max_replicas is None:
        raise ValueError(f"--autoscaler {scaling.autoscaler}: needs --max-replicas")
    return Autoscaler(scaling.autoscaler, _policy(scaling, scaling.autoscaler), limits, ServeConfig(scaling.target_ongoing))


def replicas_at_first(options: QuireOptions) -> int:
    """Replicas to begin with: as asked for, as far as an autoscaler may; one at least, which says what is served."""
    replicas = options.cluster.replicas
    return replicas if options.autoscaling.autoscaler is None else max(limits_of(options).clamp(replicas), 1)


def most_replicas(options: QuireOptions) -> int:
    """Replicas that there may be at once, as far as that is known before."""
    return max(options.cluster.replicas, options.autoscaling.max_replicas or 1)


def _policy(scaling: AutoscalingOptions, name: str) -> AutoscalingPolicy:
    known: dict[str, dict[str, Any]] = {
        "queue": {"target_wait_s": scaling.target_wait_s},
        "slo": {"target_ttft_ms": scaling.target_ttft_ms, "target_tpot_ms": scaling.target_tpot_ms},
        "ongoing": {"target_ongoing_requests": scaling.target_ongoing},
        "schedule": {"floors": scaling.schedule, "timezone": scaling.schedule_timezone},
    }
    policy = policy_named(name, known.get(name, {}) | _arguments(scaling.autoscaler_arg))
    if not scaling.schedule or name == "schedule":
        return policy
    return SchedulePolicy(scaling.schedule, scaling.schedule_timezone, policy)


def _arguments(words: Iterable[str]) -> dict[str, Any]:
    """name=value; a value that is JSON is taken as such, any other as text."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--autoscaler-arg {word!r}: must be name=value")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found
