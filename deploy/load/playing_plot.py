"""The picture of a simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .playing import Played
from .plot import distribution
from .report import percentile, tpot_s

WINDOWS = 60  # of the run, for figures over time


def write_png(path: Path, title: str, played: Played, figures: dict[str, Any]) -> None:
    """Four panels: how TTFT and TPOT are distributed, replicas and requests over time, and TTFT over time.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    good = [outcome for outcome in played.outcomes() if outcome.error is None]
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title} (simulated)\n{figures['gpu_hours']:.2f} GPU-hours, {figures['requests_per_s']:.2f} requests/s", fontsize=11)
    panels = figure.subplots(2, 2)
    distribution(panels[0, 0], "time to first token", [o.ttft_s for o in good], figures["ttft_ms"], figures["slo"]["ttft_ms"])
    distribution(panels[0, 1], "time per output token", [tpot_s(o) for o in good], figures["tpot_ms"], figures["slo"]["tpot_ms"])
    _replicas(panels[1, 0], played)
    _ttft(panels[1, 1], played, figures["slo"]["ttft_ms"])
    figure.savefig(path, dpi=130)


def _replicas(axes: Any, played: Played) -> None:
    samples = played.simulation.timeline.samples
    minutes = [s.at_s / 60 for s in samples]
    axes.set(title="replicas and requests", xlabel="minutes", ylabel="replicas")
    axes.grid(alpha=0.3)
    axes.step(minutes, [s.ready + s.starting + s.draining for s in samples], where="post", color="C0", label="replicas")
    axes.step(minutes, [s.ready for s in samples], where="post", color="C0", linestyle=":", label="of them ready")
    axes.set_ylim(bottom=0)
    requests = axes.twinx()
    requests.plot(minutes, [s.running + s.queued for s in samples], color="C1", linewidth=0.8, alpha=0.8, label="requests (right)")
    requests.set_ylim(bottom=0)
    handles = [one for some in (axes, requests) for one in some.get_legend_handles_labels()[0]]
    axes.legend(handles, [h.get_label() for h in handles], loc="lower center", fontsize=8, ncols=3)


def _ttft(axes: Any, played: Played, limit_ms: float | None) -> None:
    """Median and 99th percentile of the requests that came in each window."""
    width_s = max(played.end_s / WINDOWS, 1e-9)
    windows: dict[int, list[float]] = {}
    for job in played.jobs:
        if job.ttft_s is not None:
            windows.setdefault(int(job.arrival_s / width_s), []).append(1000 * job.ttft_s)
    minutes = [(w + 0.5) * width_s / 60 for w in sorted(windows)]
    axes.set(title="time to first token, by arrival", xlabel="minutes", ylabel="ms", yscale="log")
    axes.grid(alpha=0.3)
    for percent, colour in ((50, "C2"), (99, "C3")):
        axes.plot(minutes, [percentile(windows[w], percent) for w in sorted(windows)], color=colour, label=f"p{percent}")
    if limit_ms is not None:
        axes.axhline(limit_ms, color="black", linewidth=1.0, label=f"SLO {limit_ms:g} ms")
    axes.legend(loc="upper right", fontsize=8)
