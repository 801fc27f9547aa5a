"""Every metric that Quire exports, from figures in which nothing is missing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from admin_peer import STATUS
from prometheus_client.parser import text_string_to_metric_families

from quire.cluster.client import RecoveryStats
from quire.deploy.admin.figures import exposition
from quire.deploy.metrics import Metrics
from quire.worker.plan import MoveKind
from quire.worker.pressure import Action
from quire.worker.protocol import EngineStats

STATS = EngineStats(
    steps=1,
    running=2,
    waiting=3,
    pages_total=26,
    pages_free=5,
    pages_cached=6,
    pages_active=7,
    pages_reserved=8,
    prompt_tokens=9,
    output_tokens=10,
    prefix_query_tokens=11,
    prefix_hit_tokens=12,
    recomputed_tokens=13,
    preemptions=dict.fromkeys(Action, 14),
    step_seconds=1.5,
    host_pages_free=15,
    host_pages_cached=16,
    host_pages_active=17,
    host_hit_tokens=18,
    moved_bytes=dict.fromkeys((kind.value for kind in MoveKind if kind is not MoveKind.ERASE), 19),
    stall_seconds=2.5,
    predicted_seconds=dict.fromkeys(Action, 3.5),
    actual_seconds=dict.fromkeys(Action, 4.5),
    disk_pages=27,
)


@dataclass
class Exported:
    """One metric: its type, and its labels with the values that were seen."""

    kind: str
    labels: dict[str, set[str]] = field(default_factory=dict)


def of_an_ingress() -> str:
    """What `/metrics` of an HTTP server says when everything has happened once."""
    metrics = Metrics(lambda: {"replica-0": STATS}, RecoveryStats, "ingress-0")
    metrics.count_request("/v1/completions", 200)
    metrics.count_generation("search", 200)
    metrics.count_prompt("search", 5, 1, 0.1)
    clock = metrics.generation(0.0)
    clock.tokens(0, waited_s=0.1)
    clock.ended(0, 2)
    clock.all_ended()
    return metrics.exposition().decode()


def of_the_controller() -> str:
    """What `/metrics` of the admin port says."""
    return exposition(STATUS).decode()


def exported(text: str) -> dict[str, Exported]:
    """Name, as it stands in the documentation -> metric. A histogram's `le` is one of its labels."""
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    found = {name: Exported(kind) for name, kind in types.items()}
    for name, labels in _samples(text):
        family = name if name in types else re.sub(r"_(bucket|count|sum)$", "", name)
        for label, value in labels.items():
            found[family].labels.setdefault(label, set()).add(value)
    return found


def series(text: str) -> dict[str, dict[str, set[str]]]:
    """Name of a series, as a query names it -> label -> values."""
    found: dict[str, dict[str, set[str]]] = {}
    for name, labels in _samples(text):
        known = found.setdefault(name, {})
        for label, value in labels.items():
            known.setdefault(label, set()).add(value)
    return found


def _samples(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield sample.name, sample.labels
