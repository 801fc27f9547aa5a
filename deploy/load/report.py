"""The figures of a load test. Pure: outcomes in, numbers, a table and JSON-able maps out.

TTFT is the time to the first token; TPOT is `(latency - TTFT) / (tokens - 1)`, a request's mean time between its later
tokens. Goodput counts the requests that meet every limit of the SLO.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .client import Outcome

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in milliseconds; None is no limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def met(self, outcome: Outcome) -> bool:
        """A failed request meets no SLO; one with a single token has no TPOT to exceed."""
        if outcome.error is not None or outcome.ttft_s is None:
            return False
        pace_s = tpot_s(outcome)
        return (self.ttft_ms is None or outcome.ttft_s * 1000 <= self.ttft_ms) and (
            self.tpot_ms is None or pace_s is None or pace_s * 1000 <= self.tpot_ms
        )


def tpot_s(outcome: Outcome) -> float | None:
    """Mean seconds between output tokens after the first; None with fewer than two."""
    if outcome.ttft_s is None or outcome.output_tokens < 2:
        return None
    return (outcome.latency_s - outcome.ttft_s) / (outcome.output_tokens - 1)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks (numpy's default); nan without values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarize(outcomes: Sequence[Outcome], duration_s: float, slo: Slo) -> dict[str, Any]:
    """All figures of a run that took `duration_s`: counts, rates a second, times in milliseconds with mean and percentiles."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    met = sum(map(slo.met, outcomes))
    input_tokens = sum(outcome.input_tokens for outcome in good)
    output_tokens = sum(outcome.output_tokens for outcome in good)
    return {
        "requests": len(outcomes),
        "succeeded": len(good),
        "errors": dict(Counter(outcome.error for outcome in outcomes if outcome.error is not None).most_common()),
        "duration_s": duration_s,
        "requests_per_s": len(good) / duration_s,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "cached_tokens": sum(outcome.cached_tokens for outcome in good),
        "input_tokens_per_s": input_tokens / duration_s,
        "output_tokens_per_s": output_tokens / duration_s,
        "ttft_ms": _times([outcome.ttft_s for outcome in good]),
        "tpot_ms": _times([tpot_s(outcome) for outcome in good]),
        "latency_ms": _times([outcome.latency_s for outcome in good]),
        "slo": {"ttft_ms": slo.ttft_ms, "tpot_ms": slo.tpot_ms},
        "goodput_requests_per_s": met / duration_s,
        "slo_attainment": met / len(outcomes) if outcomes else math.nan,
    }


def table(summary: dict[str, Any]) -> str:
    """The summary for a terminal."""
    requests = f"{summary['succeeded']} of {summary['requests']} in {summary['duration_s']:.2f} s"
    lines = [
        f"requests   {requests}, {summary['requests_per_s']:.2f} a second",
        f"input      {summary['input_tokens']} tokens ({summary['cached_tokens']} cached), {summary['input_tokens_per_s']:.1f} a second",
        f"output     {summary['output_tokens']} tokens, {summary['output_tokens_per_s']:.1f} a second",
    ]
    lines += [f"failed     {count} x {kind}" for kind, count in summary["errors"].items()]
    limits = [f"{name.removesuffix('_ms').upper()} <= {limit:g} ms" for name, limit in summary["slo"].items() if limit is not None]
    if limits:
        share = summary["slo_attainment"]
        lines.append(f"goodput    {summary['goodput_requests_per_s']:.2f} requests a second ({share:.1%}) with {', '.join(limits)}")
    lines += ["", f"{'ms':<10} {'mean':>10} " + " ".join(f"{f'p{percent}':>10}" for percent in PERCENTILES)]
    for name in ("ttft_ms", "tpot_ms", "latency_ms"):
        label = {"latency_ms": "latency"}.get(name, name.removesuffix("_ms").upper())
        cells = " ".join(f"{_cell(summary[name][key]):>10}" for key in ("mean", *(f"p{percent}" for percent in PERCENTILES)))
        lines.append(f"{label:<10} {cells}")
    return "\n".join(lines)


def _times(seconds: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and percentiles in milliseconds; None stands for no value, since JSON has no nan."""
    values = [value * 1000 for value in seconds if value is not None]
    if not values:
        return dict.fromkeys(["mean", *(f"p{percent}" for percent in PERCENTILES)])
    return {"mean": math.fsum(values) / len(values), **{f"p{percent}": percentile(values, percent) for percent in PERCENTILES}}


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
