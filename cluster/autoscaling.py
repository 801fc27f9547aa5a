"""What an autoscaling policy sees, and what one is. Pure; times are passed in.

A policy is a class, `__call__(ctx) -> (replicas, state)`, as in Ray Serve: it may ask for fractions of a replica, and finds the state
that it returned in `ctx.policy_state` the next time. The context carries the attributes of Ray Serve's own
(`ray.serve.config.AutoscalingContext`) beside Quire's figures, so a policy that was written for Serve runs here. The other way, `seen`
makes a context of Serve's: its figures of the replicas are then the metrics that a deployment records under the names of
`ReplicaFigures`' fields.

Bounds, cooldowns and budgets are not a policy's business: `cluster.autoscaling_guard`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from statistics import median
from typing import Any, NamedTuple, Protocol

from .policies import ReplicaSnapshot

USABLE_SHARE = 0.9  # of a pool that may be in use: running sequences grow


@dataclass(frozen=True, slots=True)
class ReplicaFigures:
    """One replica that is ready, and is not to be emptied.

    Attributes:
        running: sequences.
        waiting: sequences that wait there, or are on their way.
        waiting_tokens: that are to be computed there before what comes next has its first output.
        prefill_tokens_per_s, decode_step_s: as measured; 0 when never.
        pages_total, pages_free: of its pool; cached pages count as free.
        max_running: sequences that it can run at once.
    """

    replica_id: str
    running: float = 0
    waiting: float = 0
    waiting_tokens: float = 0
    prefill_tokens_per_s: float = 0.0
    decode_step_s: float = 0.0
    pages_total: float = 0
    pages_free: float = 0
    max_running: float = 2**31 - 1

    @staticmethod
    def of(shot: ReplicaSnapshot) -> ReplicaFigures:
        """The replica as routing knows it."""
        load = shot.load
        return ReplicaFigures(
            shot.replica_id,
            load.running,
            shot.line,
            shot.ahead_tokens,
            load.prefill_tokens_per_s,
            load.decode_step_s,
            load.pages_total,
            load.pages_free + load.pages_cached,
            shot.info.max_running,
        )


class Arrivals(NamedTuple):
    """What has come lately (`cluster.arrivals`).

    Attributes:
        requests_per_s, tokens_per_s: requests, and their prompt tokens.
        mean_tokens, high_tokens: of one request; high is the 99th percentile.
        variation: of these tokens, the squared coefficient of variation.
    """

    requests_per_s: float = 0.0
    tokens_per_s: float = 0.0
    mean_tokens: float = 0.0
    high_tokens: float = 0.0
    variation: float = 1.0


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """What policies of Ray Serve ask of `ctx.config`."""

    target_ongoing_requests: float = 2.0

    def get_target_ongoing_requests(self) -> float:
        """Requests that each replica is to have, queued ones counted in."""
        return self.target_ongoing_requests

    def get_upscaling_factor(self) -> float:
        """By how much of the way to go at once."""
        return 1.0

    def get_downscaling_factor(self) -> float:
        """By how much of the way to go at once."""
        return 1.0


NO_ARRIVALS = Arrivals()


@dataclass(frozen=True, slots=True)
class AutoscalingContext:
    """How the replicas of one model stand. Whoever builds one may leave out what it does not know.

    Attributes:
        now_s: monotonic.
        current_time: unix time, for schedules.
        target_num_replicas: that there are to be, as decided before.
        replicas: those that are ready, without those that are being emptied.
        unready_s: for how long the one has been missing that has been for longest; 0 when there are as many as there are to be.
        queued_requests, queued_tokens: in the controller's queue, and their prompt tokens.
        arrivals: of new requests.
        usual_prefill_tokens_per_s: of a replica, as measured before; for when none has measured its own. 0: never.
        ttft_s, tpot_s: 99th percentiles of what ended lately; None when nothing did.
        start_s: what a replica's start took lately; 0 when none has started.
        page_size, batch_tokens: tokens in a page, and tokens that one step computes at most.
        capacity_adjusted_min_replicas, capacity_adjusted_max_replicas: the bounds, the budget of GPUs taken into account.
        last_scale_up_time, last_scale_down_time: by the clock of `current_time`; None: never.
        policy_state: what the policy returned last.
    """

    now_s: float = 0.0
    current_time: float = 0.0
    target_num_replicas: int = 0
    replicas: tuple[ReplicaFigures, ...] = ()
    unready_s: float = 0.0
    queued_requests: float = 0
    queued_tokens: float = 0
    arrivals: Arrivals = NO_ARRIVALS
    usual_prefill_tokens_per_s: float = 0.0
    ttft_s: float | None = None
    tpot_s: float | None = None
    start_s: float = 0.0
    page_size: int = 32
    batch_tokens: int = 512
    capacity_adjusted_min_replicas: int = 0
    capacity_adjusted_max_replicas: int = 2**31 - 1
    last_scale_up_time: float | None = None
    last_scale_down_time: float | None = None
    policy_state: Mapping[str, Any] = field(default_factory=dict)
    config: Any = ServeConfig()
    deployment_id: str = "quire"
    deployment_name: str = "quire"
    app_name: str | None = None

    # --- under the names that Ray Serve gives them ---

    @property
    def current_num_replicas(self) -> int:
        """Replicas that are ready."""
        return len(self.replicas)

    @property
    def running_replicas(self) -> list[str]:
        """Their ids."""
        return [r.replica_id for r in self.replicas]

    @property
    def total_num_requests(self) -> float:
        """Requests that wait or run. A replica counts sequences: a request of several counts as several there."""
        return self.total_queued_requests + self.total_running_requests

    @property
    def total_queued_requests(self) -> float:
        """Those that wait, here or at a replica."""
        return self.queued_requests + sum(r.waiting for r in self.replicas)

    @property
    def total_running_requests(self) -> float:
        """Those that run."""
        return sum(r.running for r in self.replicas)

    @property
    def aggregated_metrics(self) -> dict[str, dict[str, float]]:
        """Name of a figure -> replica id -> its value."""
        return {name: {r.replica_id: getattr(r, name) for r in self.replicas} for name in _FIGURES}

    @property
    def raw_metrics(self) -> None:
        """No time series are kept."""
        return

    # --- what follows ---

    @property
    def waiting_tokens(self) -> float:
        """Prompt tokens that have yet to be computed, wherever they are."""
        return self.queued_tokens + sum(r.waiting_tokens for r in self.replicas)

    @property
    def speed(self) -> float:
        """Prefill tokens/s of a usual replica: the median of those that have measured theirs. 0 when none ever has."""
        speeds = [r.prefill_tokens_per_s for r in self.replicas if r.prefill_tokens_per_s > 0]
        return median(speeds) if speeds else self.usual_prefill_tokens_per_s

    @property
    def pages_per_replica(self) -> float:
        """Pages in the pool of a usual replica; 0 when none is ready."""
        return median(r.pages_total for r in self.replicas) if self.replicas else 0.0

    @property
    def pages_used(self) -> float:
        """Pages that sequences hold, in all replicas together."""
        return sum(r.pages_total - r.pages_free for r in self.replicas)

    def least_to_hold(self) -> float:
        """Replicas that what runs needs for its pages and its seats, as a fraction; 0 when nothing is known."""
        if not self.replicas:
            return 0.0
        seats = median(r.max_running for r in self.replicas)
        pages = self.pages_used / (USABLE_SHARE * self.pages_per_replica) if self.pages_per_replica else 0.0
        return max(pages, self.total_running_requests / max(seats, 1))

    def as_inputs(self) -> dict[str, Any]:
        """The figures that a decision is logged with."""
        return {
            "target": self.target_num_replicas,
            "ready": self.current_num_replicas,
            "unready_s": round(self.unready_s, 3),
            "queued_requests": self.queued_requests,
            "waiting_requests": sum(r.waiting for r in self.replicas),
            "running_requests": self.total_running_requests,
            "waiting_tokens": self.waiting_tokens,
            "arrivals_per_s": round(self.arrivals.requests_per_s, 3),
            "arrival_tokens_per_s": round(self.arrivals.tokens_per_s, 1),
            "prefill_tokens_per_s": round(self.speed, 1),
            "decode_step_s": round(max((r.decode_step_s for r in self.replicas), default=0.0), 6),
            "pages_free": sum(r.pages_free for r in self.replicas),
            "pages_total": sum(r.pages_total for r in self.replicas),
            "ttft_s": self.ttft_s,
            "tpot_s": self.tpot_s,
        }


class AutoscalingPolicy(Protocol):
    """How many replicas there ought to be."""

    def __call__(self, ctx: Any, /) -> tuple[float, dict[str, Any]]:
        """(replicas, the state that it finds in `ctx.policy_state` next)."""
        ...


_FIGURES = tuple(f.name for f in fields(ReplicaFigures) if f.name != "replica_id")


def seen(ctx: Any) -> AutoscalingContext:
    """The context itself, or one made of Ray Serve's, so that a policy of Quire runs in either."""
    if isinstance(ctx, AutoscalingContext):
        return ctx
    metrics: Mapping[str, Mapping[Any, float]] = ctx.aggregated_metrics or {}
    now_s = float(ctx.current_time or 0.0)
    return AutoscalingContext(
        now_s=now_s,
        current_time=now_s,
        target_num_replicas=ctx.target_num_replicas,
        replicas=tuple(_recorded(metrics, ctx.running_replicas, float(ctx.total_running_requests))),
        queued_requests=float(ctx.total_queued_requests or 0.0),
        capacity_adjusted_min_replicas=ctx.capacity_adjusted_min_replicas,
        capacity_adjusted_max_replicas=ctx.capacity_adjusted_max_replicas,
        last_scale_up_time=ctx.last_scale_up_time,
        last_scale_down_time=ctx.last_scale_down_time,
        policy_state=ctx.policy_state or {},
        config=ctx.config,
        deployment_id=str(ctx.deployment_id),
        deployment_name=str(ctx.deployment_name),
        app_name=ctx.app_name,
    )


def _recorded(metrics: Mapping[str, Mapping[Any, float]], replicas: Iterable[Any], running: float) -> Iterable[ReplicaFigures]:
    """Serve's replicas with the metrics that they have recorded; what runs is shared out evenly when they have not recorded that."""
    known = list(replicas)
    for replica in known:
        found = {name: float(metrics[name][replica]) for name in _FIGURES if replica in metrics.get(name, {})}
        yield ReplicaFigures(str(replica), **({"running": running / len(known)} | found))
