"""What stands between a policy and the replicas: bounds, budget, hysteresis, cooldowns and sleep. Pure; times are passed in.

    up    at once when nothing is there and something waits, else when it has been wanted for `up_cooldown_s`
    down  to the most that was wanted in the last `down_cooldown_s`, when less was wanted all that time, and what runs fits there
    zero  when it is allowed, and nothing ran or waited for `zero_after_s`

A change begins both cooldowns anew, so load that flaps moves nothing. A replica that does not become ready does not make the guard ask for
more and more: it is the first to go, and while it is missed for longer than `patience_s`, no other is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import ceil, isfinite
from typing import Any

from .autoscaling import AutoscalingContext, AutoscalingPolicy, ServeConfig

MOST_REPLICAS = 4096


class Why(StrEnum):
    """What a target comes from: the policy, or what keeps it from going where the policy wants it."""

    POLICY = "policy"
    STEADY = "steady"
    MIN = "min"
    MAX = "max"
    BUDGET = "budget"
    HYSTERESIS = "hysteresis"
    UP_COOLDOWN = "up_cooldown"
    DOWN_COOLDOWN = "down_cooldown"
    WAKE = "wake"
    IDLE = "idle"
    STALLED = "stalled"
    NO_ROOM = "no_room"
    FAILED = "policy_failed"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class ScaleLimits:
    """Within which a target stays.

    Attributes:
        min_replicas, max_replicas: 0 at least means that they may all go.
        gpus_per_replica: its tensor-parallel degree.
        gpu_budget: GPUs of all replicas together; None: as many as there are. It wins over `min_replicas`.
        up_cooldown_s, down_cooldown_s, zero_after_s: see above.
        hysteresis: by how much of a replica a fractional wish must go beyond a whole number to count.
        patience_s: see above.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    gpus_per_replica: int = 1
    gpu_budget: int | None = None
    up_cooldown_s: float = 3.0
    down_cooldown_s: float = 300.0
    zero_after_s: float = 600.0
    hysteresis: float = 0.1
    patience_s: float = 600.0

    @property
    def most(self) -> int:
        """Replicas that may be, by the bound and the budget."""
        return self.max_replicas if self.gpu_budget is None else min(self.max_replicas, self.gpu_budget // self.gpus_per_replica)

    def clamp(self, replicas: int) -> int:
        """The nearest number of replicas that may be."""
        return min(max(replicas, self.min_replicas), self.most)


@dataclass(frozen=True, slots=True)
class ScaleDecision:
    """How many replicas there are to be, why, and what it was decided from.

    Attributes:
        at_s, unix_s: when, monotonic and for people.
        policy: its name.
        wanted: what the policy asked for.
        before, target: replicas.
        why: a `Why`; `detail` says more where there is more.
        inputs, state: the figures of the context, and the policy's state afterwards.
    """

    at_s: float
    unix_s: float
    policy: str
    wanted: float
    before: int
    target: int
    why: Why
    detail: str = ""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """As `/admin/autoscaling` shows it."""
        state = {name: value for name, value in self.state.items() if not name.startswith("_")}
        return {
            "unix_s": round(self.unix_s, 3),
            "policy": self.policy,
            "wanted": round(self.wanted, 3),
            "before": self.before,
            "target": self.target,
            "why": self.why.value,
            "detail": self.detail,
            "inputs": dict(self.inputs),
            "state": state,
        }


class ScaleGuard:
    """Turns wishes into targets. Remembers since when what has been wanted."""

    def __init__(self, limits: ScaleLimits) -> None:
        self.limits = limits
        self._up_since_s: float | None = None
        self._lower: list[tuple[float, int]] = []  # (when, wish below the target), without a gap; the first is when it began
        self._idle_since_s: float | None = None

    def target(self, wanted: float, ctx: AutoscalingContext) -> tuple[int, Why]:
        """How many replicas there are to be, of which a policy wants `wanted`."""
        now_s, before = ctx.now_s, ctx.target_num_replicas
        busy = ctx.total_num_requests > 0
        self._idle_since_s = None if busy else (now_s if self._idle_since_s is None else self._idle_since_s)
        wish, why = self._bounded(self._rounded(wanted, before), before, ctx)
        if before == 0 and wish > 0:
            return self._change(wish, Why.WAKE if busy else why)
        if wish > before:
            return self._up(wish, why, ctx)
        if wish < before:
            return self._down(wish, why, ctx)
        self._up_since_s, self._lower = None, []
        if wish != ceil(wanted) and why is Why.POLICY:
            why = Why.HYSTERESIS
        return before, Why.STEADY if why is Why.POLICY else why

    def _rounded(self, wanted: float, before: int) -> int:
        if wanted == int(wanted):
            return int(wanted)
        up, down = ceil(wanted - self.limits.hysteresis), ceil(wanted + self.limits.hysteresis)
        return up if up > before else min(down, before)

    def _bounded(self, wish: int, before: int, ctx: AutoscalingContext) -> tuple[int, Why]:
        limits, least = self.limits, self.limits.min_replicas
        idle_s = 0.0 if self._idle_since_s is None else ctx.now_s - self._idle_since_s
        asleep = least == 0 and before == 0 and not ctx.total_num_requests
        bound, why = wish, Why.POLICY
        if least == 0 and not asleep and idle_s < limits.zero_after_s:
            least = 1
        elif least == 0 and wish == 0 < before:
            why = Why.IDLE
        if bound < least:
            bound, why = least, Why.MIN
        if bound > limits.most:
            bound, why = limits.most, Why.MAX if limits.most == limits.max_replicas else Why.BUDGET
        return bound, why

    def _up(self, wish: int, why: Why, ctx: AutoscalingContext) -> tuple[int, Why]:
        self._lower = []
        if ctx.unready_s > self.limits.patience_s:
            return ctx.target_num_replicas, Why.STALLED
        if self._up_since_s is None:
            self._up_since_s = ctx.now_s
        if ctx.now_s - self._up_since_s < self.limits.up_cooldown_s and ctx.target_num_replicas >= self.limits.min_replicas:
            return ctx.target_num_replicas, Why.UP_COOLDOWN
        return self._change(wish, why)

    def _down(self, wish: int, why: Why, ctx: AutoscalingContext) -> tuple[int, Why]:
        self._up_since_s = None
        before, limits = ctx.target_num_replicas, self.limits
        if before > limits.most:
            return self._change(wish, why)
        begun_s = self._lower[0][0] if self._lower else ctx.now_s
        recent = [(at_s, n) for at_s, n in self._lower if at_s > ctx.now_s - limits.down_cooldown_s]
        self._lower = [(begun_s, wish), *recent[-999:], (ctx.now_s, wish)] if self._lower else [(ctx.now_s, wish)]
        if why is Why.IDLE:
            return self._change(wish, why)
        if ctx.now_s - begun_s < limits.down_cooldown_s:
            return before, Why.DOWN_COOLDOWN
        peak = max([wish, *(n for _, n in recent)])
        least = ceil(ctx.least_to_hold())
        target = max(peak, min(least, before), 1 if wish else 0)
        if target >= before:
            return before, Why.NO_ROOM if least >= before else Why.DOWN_COOLDOWN
        return self._change(target, why)

    def _change(self, target: int, why: Why) -> tuple[int, Why]:
        self._up_since_s, self._lower = None, []
        return target, why


class Autoscaler:
    """A policy and its guard: what the controller asks every few seconds, and the simulator by its own clock.

    Args:
        name: of the policy.
        policy: asked each time.
        limits: which its wishes stay within.
        config: what a policy of Ray Serve finds in `ctx.config`.
    """

    def __init__(self, name: str, policy: AutoscalingPolicy, limits: ScaleLimits, config: Any = ServeConfig()) -> None:  # noqa: B008
        self.name = name
        self.guard = ScaleGuard(limits)
        self._policy = policy
        self._config = config
        self._state: dict[str, Any] = {}
        self._up_at: float | None = None
        self._down_at: float | None = None

    @property
    def limits(self) -> ScaleLimits:
        """Which its targets stay within."""
        return self.guard.limits

    def decide(self, ctx: AutoscalingContext) -> ScaleDecision:
        """The target from now on. A policy that fails, or asks for what is no number, changes nothing."""
        limits = self.limits
        ctx = replace(
            ctx,
            capacity_adjusted_min_replicas=min(limits.min_replicas, limits.most),
            capacity_adjusted_max_replicas=limits.most,
            last_scale_up_time=self._up_at,
            last_scale_down_time=self._down_at,
            policy_state=self._state,
            config=self._config,
        )
        before, detail = ctx.target_num_replicas, ""
        try:
            wanted, state = self._policy(ctx)
            wanted = float(wanted)
            if not isfinite(wanted) or wanted < 0 or not isinstance(state, dict):
                raise ValueError(f"it returned {wanted!r}, {type(state).__name__}: a number of replicas and a dict are due")
            self._state, wanted = state, min(wanted, MOST_REPLICAS)
        except Exception as error:  # noqa: BLE001 (a user's code may raise anything, and must not take the controller along)
            wanted, detail = float(before), f"{type(error).__name__}: {error}"
        target, why = self.guard.target(wanted, ctx)
        if detail:
            why = Why.FAILED if target == before else why
        if target > before:
            self._up_at = ctx.current_time
        elif target < before:
            self._down_at = ctx.current_time
        return ScaleDecision(ctx.now_s, ctx.current_time, self.name, wanted, before, target, why, detail, ctx.as_inputs(), self._state)
