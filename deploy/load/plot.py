"""The picture of a load test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .client import Outcome
from .report import tpot_s


def write_png(path: Path, title: str, outcomes: Sequence[Outcome], summary: dict[str, Any]) -> None:
    """Four panels: how TTFT, TPOT and latency are distributed, and what was going on when.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    good = [outcome for outcome in outcomes if outcome.error is None]
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{title}\n{summary['output_tokens_per_s']:.1f} output tokens/s, {summary['requests_per_s']:.2f} requests/s, "
        f"{summary['requests'] - summary['succeeded']} of {summary['requests']} failed",
        fontsize=11,
    )
    panels = figure.subplots(2, 2)
    distribution(panels[0, 0], "time to first token", [o.ttft_s for o in good], summary["ttft_ms"], summary["slo"]["ttft_ms"])
    distribution(panels[0, 1], "time per output token", [tpot_s(o) for o in good], summary["tpot_ms"], summary["slo"]["tpot_ms"])
    distribution(panels[1, 0], "latency", [o.latency_s for o in good], summary["latency_ms"], None)
    _timeline(panels[1, 1], outcomes)
    figure.savefig(path, dpi=130)


def distribution(axes: Any, name: str, seconds: Sequence[float | None], figures: dict[str, float | None], limit_ms: float | None) -> None:
    """Share of the requests (y) that took at most so long (x), with the percentiles marked."""
    values = sorted(value * 1000 for value in seconds if value is not None)
    axes.set(title=name, xlabel="ms", ylabel="share of requests", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    if not values:
        axes.text(0.5, 0.5, "no request has one", ha="center", transform=axes.transAxes)
        return
    axes.step([values[0], *values], [0, *((rank + 1) / len(values) for rank in range(len(values)))], where="post", color="C0")
    for key, colour in (("p50", "C2"), ("p90", "C1"), ("p99", "C3")):
        axes.axvline(figures[key], color=colour, linestyle=":", linewidth=1.2, label=f"{key} {figures[key]:.1f} ms")
    if limit_ms is not None:
        axes.axvline(limit_ms, color="black", linewidth=1.2, label=f"SLO {limit_ms:g} ms")
    axes.set_xlim(left=0)
    axes.legend(loc="lower right", fontsize=8)


def _timeline(axes: Any, outcomes: Sequence[Outcome]) -> None:
    """How many requests were waiting for their first token, and how many were getting tokens, over time."""
    axes.set(title="requests over time", xlabel="seconds since the start", ylabel="requests")
    axes.grid(alpha=0.3)
    waiting = _level([(o.start_s, o.start_s + (o.latency_s if o.ttft_s is None else o.ttft_s)) for o in outcomes])
    decoding = _level([(o.start_s + o.ttft_s, o.start_s + o.latency_s) for o in outcomes if o.ttft_s is not None])
    for (times, counts), name, colour in ((waiting, "before the first token", "C1"), (decoding, "after it", "C0")):
        axes.step(times, counts, where="post", color=colour, linewidth=1.2, label=name)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.25 * max(1, *waiting[1], *decoding[1]))  # room for the legend
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="upper right", fontsize=8, ncols=2)


def _level(spans: Sequence[tuple[float, float]]) -> tuple[list[float], list[int]]:
    """How many of the spans are open, at each time that one opens or closes."""
    changes = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    times, counts, open_now = [0.0], [0], 0
    for time_s, change in changes:
        open_now += change
        times.append(time_s)
        counts.append(open_now)
    return times, counts
