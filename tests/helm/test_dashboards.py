"""Dashboards and alert rules: what they ask for is exported, everything that is exported is asked for, and nothing is counted twice."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart import template
from exported_metrics import of_an_ingress, of_the_controller, series
from eyes import RULES, Query, alert_queries, alerts, dashboard_queries, dashboards, panels, with_all
from image import ROOT
from promql import Selector, grouped, selectors

OF_INGRESSES = series(of_an_ingress())
EXPORTED = {**OF_INGRESSES, **series(of_the_controller()), "up": {}}  # up is Prometheus's own
SCRAPED = {"job", "instance", "namespace", "model"}  # labels that whoever scrapes sets
OPEN = {"ingress", "replica", "tenant", "route", "status", *SCRAPED}  # labels whose values only a running cluster has
QUERIES = [*dashboard_queries(), *alert_queries()]
DASHBOARDS = sorted(dashboards())
SEVERITIES = {"critical", "warning", "info"}
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not here (Debian: apt-get install prometheus)")


def own_labels(selector: Selector) -> set[str]:
    """The labels that tell the series of a metric apart, but those that the query fixes."""
    fixed = {matcher.label for matcher in selector.matchers if matcher.operator == "="}
    return EXPORTED[selector.name].keys() - fixed


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.where)
def test_a_query_names_only_what_is_exported(query: Query) -> None:
    named = selectors(query.text)
    assert named
    labels = set()
    for selector in named:
        assert selector.name in EXPORTED
        known = EXPORTED[selector.name]
        labels |= known.keys()
        for label, operator, value in selector.matchers:
            assert label in known.keys() | SCRAPED, selector.name
            if label in OPEN:
                continue
            for each in value.split("|") if operator in ("=~", "!~") else [value]:
                assert each in known[label], f"{selector.name} never has {label}={each}"
    assert grouped(query.text) <= labels | SCRAPED


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.where)
def test_what_several_servers_export_is_taken_once(query: Query) -> None:
    """Replicas' figures come from every HTTP server, and a server's may be scraped twice: `max by` its own labels comes first."""
    for selector in selectors(query.text):
        if selector.name not in OF_INGRESSES:
            continue
        found = re.search(r"max by \(([\w, ]*)\) \((?:(?:rate|increase)\()?$", selector.before)
        assert found, selector.name
        assert set(found[1].split(", ")) == own_labels(selector) | {"namespace", "model"}, selector.name


def test_everything_that_is_exported_is_shown() -> None:
    shown = {re.sub(r"_(bucket|sum|count)$", "", s.name) for query in dashboard_queries() for s in selectors(query.text)}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in EXPORTED} <= shown


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_whole(name: str) -> None:
    dashboard = dashboards()[name]
    assert dashboard["schemaVersion"] >= 39
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    offered = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert "datasource" in offered
    assert ("tenant" in offered) == (name == "tenant")
    for panel in panels(dashboard):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        refs = [target["refId"] for target in panel["targets"]]
        assert len(refs) == len(set(refs))
        for target in panel["targets"]:
            assert target["legendFormat"]
            assert {*re.findall(r"\$(\w+)", target["expr"])} <= offered
            # A legend tells apart what the query tells apart.
            assert {*re.findall(r"{{(\w+)}}", target["legendFormat"])} <= grouped(target["expr"]), panel["title"]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_lie_beside_each_other(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboards()[name]["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_uids_of_dashboards_differ() -> None:
    uids = [dashboard["uid"] for dashboard in dashboards().values()]
    assert len(uids) == len(set(uids)) == 2


def anchors(text: str) -> set[str]:
    """Of the headings of a Markdown file, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("alert", [*alerts()], ids=lambda alert: alert["alert"])
def test_an_alert_says_what_it_is_and_what_to_do(alert: dict[str, Any]) -> None:
    assert re.fullmatch(r"Quire[A-Z]\w+", alert["alert"])
    assert alert["labels"]["severity"] in SEVERITIES
    assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
    named = set(re.findall(r"\$labels\.(\w+)", str(alert["annotations"])))
    assert named <= grouped(alert["expr"]) | ({"job", "instance"} if "up{" in alert["expr"] else set())
    path, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    assert anchor in anchors((ROOT / path).read_text(encoding="utf-8"))


def test_alerts_have_names_of_their_own() -> None:
    names = [alert["alert"] for alert in alerts()]
    assert len(names) == len(set(names)) >= 15


def test_the_chart_installs_them_as_they_are() -> None:
    objects = template(values={"monitoring.prometheusRule.enabled": True, "monitoring.dashboards.enabled": True})
    (rule,) = (found for found in objects if found["kind"] == "PrometheusRule")
    assert rule["spec"] == yaml.safe_load(RULES.read_text(encoding="utf-8"))
    maps = [found for found in objects if found["kind"] == "ConfigMap" and found["metadata"]["labels"].get("grafana_dashboard") == "1"]
    installed = {name: json.loads(text) for found in maps for name, text in found["data"].items()}
    assert installed == {f"{name}.json": dashboard for name, dashboard in dashboards().items()}


def promtool(*words: str) -> str:
    done = subprocess.run([PROMTOOL or "", *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_promtool_reads_the_rules() -> None:
    assert f"{len([*alerts()])} rules found" in promtool("check", "rules", str(RULES))


@needs_promtool
def test_promtool_reads_every_query_of_a_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"query:{number}", "expr": with_all(query.text)} for number, query in enumerate(dashboard_queries())]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", str(file))


@pytest.mark.parametrize(
    "query",
    [
        "sum(quire_steps_total",
        "sum(quire_steps_total[5m]]",
        'quire_pages{state~"free"}',
        'quire_pages{state="free" tier="host"}',
        "rate(quire_steps_total[five])",
    ],
)
def test_what_is_no_query_is_refused(query: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        selectors(query)


def test_what_a_query_names() -> None:
    found = selectors('sum by (a) (rate(x{b="c}",d=~"e|f"}[5m])) / on (a) y > 1e3')
    assert [(s.name, [tuple(m) for m in s.matchers]) for s in found] == [("x", [("b", "=", "c}"), ("d", "=~", "e|f")]), ("y", [])]
    assert grouped('sum by (a, b) (x{c="by (d)"})') >= {"a", "b"}
