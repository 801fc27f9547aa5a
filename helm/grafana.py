"""Grafana dashboards from the short form of dashboards/*.yaml, which says what each panel shows; how it looks is said here.

A row has panels; a panel has `title`, `what` (its description), `unit` (Grafana's name), `queries` (legend -> PromQL) and may have `kind`
(timeseries, stat, bargauge), `width` (of 24), `stack`, and `steps` (threshold -> colour). `variables` are label -> the metric whose values
they offer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

SCHEMA_VERSION = 39  # Grafana 11
HEIGHTS = {"stat": 4}
SELECTION = 'namespace=~"$namespace",model=~"$model"'
OWN = "namespace, model"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
Json = dict[str, Any]


def dashboard(told: Json) -> str:
    """The JSON of one dashboard."""
    link = {"type": "dashboards", "title": "Quire", "tags": ["quire"], "asDropdown": True, "includeVars": True, "keepTime": True}
    whole = {
        "title": told["title"],
        "uid": told["uid"],
        "description": told["description"],
        "tags": ["quire"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [link],
        "annotations": {"list": []},
        "templating": {"list": list(_variables(told["variables"]))},
        "panels": list(_panels(told["rows"])),
    }
    return json.dumps(whole, indent=1) + "\n"


def _variables(more: dict[str, str]) -> Iterator[Json]:
    yield {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "current": {}, "hide": 0}
    yield _values("namespace", "label_values(quire_replicas, namespace)")
    yield _values("model", 'label_values(quire_replicas{namespace=~"$namespace"}, model)')
    for label, metric in more.items():
        yield _values(label, f"label_values({metric}{{{SELECTION}}}, {label})")
    yield {
        "name": "window",
        "label": "Rates over",
        "type": "interval",
        "query": "1m,5m,15m,1h,6h",
        "current": {"text": "5m", "value": "5m"},
        "options": [{"text": text, "value": text, "selected": text == "5m"} for text in ("1m", "5m", "15m", "1h", "6h")],
        "auto": False,
    }


def _values(label: str, query: str) -> Json:
    """A choice among the values of a label. All of them includes none: a label that nobody sets is empty."""
    return {
        "name": label,
        "label": label.capitalize(),
        "type": "query",
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": label},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _panels(rows: list[Json]) -> Iterator[Json]:
    number, y = 0, 0
    for row in rows:
        number += 1
        yield {"id": number, "type": "row", "title": row["title"], "collapsed": False, "panels": [], "gridPos": _place(0, y, 24, 1)}
        y += 1
        x = height = 0
        for panel in row["panels"]:
            number += 1
            kind, width = panel.get("kind", "timeseries"), panel.get("width", 8)
            if x + width > 24:
                x, y = 0, y + height
            height = HEIGHTS.get(kind, 8)
            yield {"id": number, "gridPos": _place(x, y, width, height), **_panel(kind, panel)}
            x += width
        y += height


def _place(x: int, y: int, width: int, height: int) -> Json:
    return {"x": x, "y": y, "w": width, "h": height}


def _panel(kind: str, told: Json) -> Json:
    steps = told.get("steps", {0: "green"})
    (_, first), *others = steps.items()
    thresholds = [{"color": first, "value": None}, *({"color": colour, "value": value} for value, colour in others)]
    defaults: Json = {"unit": told["unit"], "thresholds": {"mode": "absolute", "steps": thresholds}}
    if kind == "timeseries":
        line = {"mode": "line"} if others else {"mode": "off"}
        stacking = {"mode": "normal" if told.get("stack") else "none", "group": "A"}
        custom = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 20 if told.get("stack") else 5, "showPoints": "never"}
        defaults |= {"min": 0, "color": {"mode": "palette-classic"}, "custom": {**custom, "stacking": stacking, "thresholdsStyle": line}}
    else:
        defaults["color"] = {"mode": "thresholds"}
    return {
        "type": kind,
        "title": told["title"],
        "description": told["what"],
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _options(kind),
        "targets": [_target(chr(ord("A") + i), legend, query, kind) for i, (legend, query) in enumerate(told["queries"].items())],
    }


def _options(kind: str) -> Json:
    if kind == "timeseries":
        legend = {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"], "showLegend": True}
        return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
    latest = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
    if kind == "bargauge":
        return {**latest, "displayMode": "basic", "orientation": "horizontal"}
    return {**latest, "colorMode": "value", "graphMode": "area", "textMode": "auto"}


def _target(ref: str, legend: str, query: str, kind: str) -> Json:
    whole = query.replace("$in", SELECTION).replace("$own", OWN)
    return {
        "refId": ref,
        "datasource": SOURCE,
        "expr": whole,
        "legendFormat": legend,
        "range": kind == "timeseries",
        "instant": kind != "timeseries",
        "editorMode": "code",
    }
