"""As few replicas as meet the targets for time to first token and per output token, by what is predicted for each number of them. Pure.

With n replicas of prefill speed v, work for prefill that will come at rate w (tokens/s) when another replica could be there, and r
sequences that run in all:

    w      = tokens/s that come + growth * start                    growth: the slope of what came lately (`Trend`), if it rises
    rho(n)  = w / (n v)                                             the share of the time in which a replica computes prompts
    wait(n) = max(left(n) / (n v),  tail(n))
    left(n) = tokens that wait, less what n replicas work off beside what comes in the time that a start takes, since none that is asked
              for now helps before; with fewer than there are to be, all that waits
    tail(n) = m (1 + c2) / (2 n (1 - rho)) * ln(100 p)              99th percentile of the wait in a queue with n servers, if p > 0.01;
              p = rho ** (sqrt(2 (n + 1)) - 1)                      the probability of a wait (Sakasegawa 1977)
    ttft(n) = wait(n) + long prompt / v + step(n)
    step(n) = a + b r / n                                           of a step that only decodes; a line through what was measured
    tpot(n) = 1 / ((1 - rho) / step(n) + rho v / batch tokens)      a step that also computes prompts is as long as its tokens take

m is the mean time that one prompt takes, c2 the squared coefficient of variation of prompts.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil, exp, inf, log, sqrt
from typing import Any, NamedTuple

from .autoscaling import AutoscalingContext, seen

MARGIN = 0.95  # of a target, that a prediction must keep for a replica to go
WORTH = 0.8  # where a target cannot be met, twice as many replicas must bring what misses it to this share
KEEP = 0.98  # of what the line knows, from one look to the next
PRIOR = 0.01  # how much the assumption counts that half of a step does not depend on what runs, in squared means of what runs
MOST = 4096
TREND_S = 60.0  # after which what came counts for a trend by 1/e
SPREAD_S = 15.0  # standard deviation of the times of looks that a trend needs at least
SAMPLES = 3  # looks of the last `TREND_S` that are independent of one another, as each is of half a minute


class Forecast(NamedTuple):
    """What so many replicas would come to."""

    replicas: int
    ttft_s: float
    tpot_s: float

    def excess(self, ttft_s: float | None, tpot_s: float | None) -> float:
        """The worse of the two as a share of its target; at most 1 when both are met."""
        return max(self.ttft_s / ttft_s if ttft_s else 0.0, self.tpot_s / tpot_s if tpot_s else 0.0)


class SloPolicy:
    """See above. A target of None is none; with neither there is nothing to do.

    Nothing is taken away while the figures that were seen lately miss a target.

    Raises:
        ValueError: no target.
    """

    def __init__(self, target_ttft_ms: float | None = None, target_tpot_ms: float | None = None, margin: float = MARGIN) -> None:
        if target_ttft_ms is None and target_tpot_ms is None:
            raise ValueError("slo policy: a target is needed: target_ttft_ms, target_tpot_ms or both")
        self._ttft_s = None if target_ttft_ms is None else target_ttft_ms / 1000
        self._tpot_s = None if target_tpot_ms is None else target_tpot_ms / 1000
        self._margin = margin

    def __call__(self, ctx: Any, /) -> tuple[float, dict[str, Any]]:
        """The fewest that meet the targets, with room to spare when that is fewer than there are."""
        ctx = seen(ctx)
        line, trend = StepLine.after(ctx), Trend.after(ctx)
        target, least = ctx.target_num_replicas, max(ceil(ctx.least_to_hold()), 1 if ctx.total_num_requests else 0)
        if not ctx.speed:
            return float(max(target, least) if ctx.total_num_requests else 0), {**line.state(), **trend.state()}
        arrivals = ctx.arrivals._replace(tokens_per_s=ctx.arrivals.tokens_per_s + trend.growth() * ctx.start_s)
        ctx = replace(ctx, arrivals=arrivals)
        most = min(ctx.capacity_adjusted_max_replicas, MOST)
        wanted = self._fewest(ctx, line, max(least, 1), most, 1.0)
        if wanted < target:
            wanted = min(max(self._fewest(ctx, line, max(least, 1), most, self._margin), wanted), target)
            if self._missed(ctx):
                wanted = target
        if not ctx.total_num_requests and not ctx.arrivals.requests_per_s:
            wanted = 0
        now = max(target, 1)
        about = {n: forecast(ctx, line, n) for n in range(max(now - 1, 1), now + 2)}
        shown = {n: {"ttft_s": _shown(f.ttft_s), "tpot_s": _shown(f.tpot_s)} for n, f in about.items()}
        return float(wanted), {**line.state(), **trend.state(), "forecast": shown}

    def _fewest(self, ctx: AutoscalingContext, line: StepLine, least: int, most: int, share: float) -> int:
        """The fewest replicas with which both stay below that share of their targets. When no number does, as many as still help."""
        ttft_s, tpot_s = self._ttft_s and self._ttft_s * share, self._tpot_s and self._tpot_s * share

        def excess(n: int) -> float:
            return forecast(ctx, line, n).excess(ttft_s, tpot_s)

        numbers = range(least, max(most, least) + 1)
        if excess(numbers[-1]) <= 1:
            return next(n for n in numbers if excess(n) <= 1)
        return next(n for n in numbers if n == numbers[-1] or WORTH * excess(n) < excess(min(2 * n, numbers[-1])) < inf)

    def _missed(self, ctx: AutoscalingContext) -> bool:
        seen_s = ((ctx.ttft_s, self._ttft_s), (ctx.tpot_s, self._tpot_s))
        return any(lately is not None and target is not None and lately > target for lately, target in seen_s)


class StepLine(NamedTuple):
    """The line through (sequences that run at a replica, seconds of a step that only decodes), by least squares with forgetting.

    Attributes:
        n, x, y, xx, xy: decayed sums of 1, sequences, seconds and their products.
    """

    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    @staticmethod
    def after(ctx: AutoscalingContext) -> StepLine:
        """What the policy knew, and what the replicas say now."""
        known = ctx.policy_state.get("_step_line")
        line = StepLine(*(KEEP * float(v) for v in known)) if known else StepLine()
        for r in ctx.replicas:
            if r.running > 0 and r.decode_step_s > 0:
                x, y = r.running, r.decode_step_s
                line = StepLine(line.n + 1, line.x + x, line.y + y, line.xx + x * x, line.xy + x * y)
        return line

    def step_s(self, running: float) -> float:
        """Of a step with so many sequences; 0 when nothing is known."""
        if not self.n:
            return 0.0
        x, y = self.x / self.n, self.y / self.n
        trust = PRIOR * x * x
        slope = (self.xy / self.n - x * y + trust * y / x / 2) / (max(self.xx / self.n - x * x, 0.0) + trust)
        slope = min(max(slope, 0.0), y / x)
        return y + slope * (running - x)

    def state(self) -> dict[str, Any]:
        """As the policy finds it again."""
        return {"_step_line": list(self)}


class Trend(NamedTuple):
    """The line through (when, prompt tokens/s that came), by least squares with forgetting.

    Attributes:
        at_s: of the latest look; times are counted from it.
        n, t, y, tt, ty, yy: decayed sums of 1, times, rates and their products.
    """

    at_s: float
    n: float = 0.0
    t: float = 0.0
    y: float = 0.0
    tt: float = 0.0
    ty: float = 0.0
    yy: float = 0.0

    @staticmethod
    def after(ctx: AutoscalingContext) -> Trend:
        """What the policy knew, and what comes now."""
        at_s, n, t, y, tt, ty, yy = map(float, ctx.policy_state.get("_trend", (ctx.now_s, *[0.0] * 6)))
        passed_s, rate = max(ctx.now_s - at_s, 0.0), ctx.arrivals.tokens_per_s
        keep = exp(-passed_s / TREND_S)
        tt, t, ty = tt - 2 * passed_s * t + passed_s**2 * n, t - passed_s * n, ty - passed_s * y  # from the new origin
        return Trend(ctx.now_s, keep * n + 1, keep * t, keep * y + rate, keep * tt, keep * ty, keep * yy + rate * rate)

    def growth(self) -> float:
        """Tokens/s that come more with every second: the slope less its standard error, and never less than 0."""
        t, y = self.t / self.n, self.y / self.n
        spread = self.tt / self.n - t * t
        if spread < SPREAD_S**2:
            return 0.0
        slope = (self.ty / self.n - t * y) / spread
        scatter = max(self.yy / self.n - y * y - slope**2 * spread, 0.0)
        return max(slope - sqrt(scatter / spread / SAMPLES), 0.0)

    def state(self) -> dict[str, Any]:
        """As the policy finds it again."""
        return {"_trend": list(self)}


def forecast(ctx: AutoscalingContext, line: StepLine, n: int) -> Forecast:
    """By the formulas at the head of this file. The speed of prefill must be known."""
    v, come = ctx.speed, ctx.arrivals
    rho = come.tokens_per_s / (n * v)
    spare = max(n * v - come.tokens_per_s, 0.0) if n >= ctx.target_num_replicas else 0.0
    left = max(ctx.waiting_tokens - spare * ctx.start_s, 0.0)
    wait_s = inf if rho >= 1 else max(left / (n * v), _tail_s(n, rho, come.mean_tokens / v, come.variation))
    step_s = line.step_s(ctx.total_num_requests / n)
    share = min(rho, 1.0)
    tpot_s = 1 / ((1 - share) / step_s + share * v / ctx.batch_tokens) if step_s else 0.0
    return Forecast(n, wait_s + come.high_tokens / v + step_s, tpot_s)


def _tail_s(n: int, rho: float, prompt_s: float, variation: float) -> float:
    waits = rho ** (sqrt(2 * (n + 1)) - 1)
    return prompt_s * (1 + variation) / (2 * n * (1 - rho)) * log(100 * waits) if waits > 0.01 else 0.0


def _shown(seconds: float) -> float | None:
    return None if seconds == inf else round(seconds, 4)
