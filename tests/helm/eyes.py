"""The dashboards and the alert rules, as their tests look at them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml
from image import ROOT

RULES = ROOT / "helm" / "rules" / "quire.yaml"
DASHBOARDS = sorted((ROOT / "helm" / "dashboards").glob("*.json"))
# What Grafana puts in: all values of each variable.
ALL = {"$namespace": ".*", "$model": ".*", "$tenant": ".*"}


class Query(NamedTuple):
    """A query, and where it stands."""

    where: str
    text: str


def dashboards() -> dict[str, dict[str, Any]]:
    """Name -> dashboard."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in DASHBOARDS}


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that show something."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def dashboard_queries() -> list[Query]:
    """Every query of every dashboard, as it stands there."""
    return [
        Query(f"{name}: {panel['title']}: {target['legendFormat']}", target["expr"])
        for name, dashboard in dashboards().items()
        for panel in panels(dashboard)
        for target in panel["targets"]
    ]


def with_all(query: str, window: str = "5m") -> str:
    """The query as Grafana sends it when all is selected."""
    for variable, value in ALL.items():
        query = query.replace(variable, value)
    return query.replace("$window", window)


def alerts() -> Iterator[dict[str, Any]]:
    """Every alert rule."""
    for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]:
        yield from group["rules"]


def alert_queries() -> list[Query]:
    """Every alert's expression."""
    return [Query(alert["alert"], alert["expr"]) for alert in alerts()]
