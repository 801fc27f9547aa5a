"""docs/metrics.md and what is exported are the same, and every label is one whose values are bounded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from exported_metrics import Exported, exported, of_an_ingress, of_the_controller

CONTROLLER = "## Measured by the controller"
UNITS = {"seconds": "seconds", "bytes": "bytes", "tokens": "tokens", "pages": "pages", "requests": "requests", "replicas": "replicas"}


class Row(NamedTuple):
    kind: str
    labels: set[str]
    unit: str


def documented(text: str) -> dict[str, Row]:
    rows = re.findall(r"^\| `(quire_\w+)` \| (\w+) \|([^|]*)\|([^|]*)\|([^|]*)\|$", text, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| `quire_", text, re.MULTILINE)), "a row that has not five cells"
    assert all(what.strip() for *_, what in rows)
    return {name: Row(kind, set(re.findall(r"`(\w+)`", labels)), unit.strip()) for name, kind, labels, unit, _ in rows}


@pytest.fixture(scope="module")
def text(root: Path) -> str:
    return (root / "docs/metrics.md").read_text()


@pytest.fixture(scope="module", params=["ingress", "controller"])
def pair(request: pytest.FixtureRequest, text: str) -> tuple[dict[str, Row], dict[str, Exported]]:
    """What the documentation says of one of the two, and what it exports."""
    of_ingress, _, of_controller = text.partition(CONTROLLER)
    assert of_controller
    if request.param == "ingress":
        return documented(of_ingress), exported(of_an_ingress())
    return documented(of_controller), exported(of_the_controller())


def test_what_is_documented_is_exported_and_the_other_way_round(pair: tuple[dict[str, Row], dict[str, Exported]]) -> None:
    rows, metrics = pair
    assert {name: row.kind for name, row in rows.items()} == {name: metric.kind for name, metric in metrics.items()}
    assert {name: row.labels for name, row in rows.items()} == {name: metric.labels.keys() - {"le"} for name, metric in metrics.items()}


def test_units_agree_with_names(pair: tuple[dict[str, Row], dict[str, Exported]]) -> None:
    for name, row in pair[0].items():
        assert row.unit, name
        unit = UNITS.get(name.removesuffix("_total").rsplit("_", 1)[1])
        assert unit in (None, row.unit), name
        assert name.endswith("_total") == (row.kind == "counter"), name


def test_every_label_is_explained_with_its_values(text: str, pair: tuple[dict[str, Row], dict[str, Exported]]) -> None:
    """Either in the table of labels, or by value in the row of the metric."""
    explained = set(re.findall(r"^\| `(\w+)` \| [^|]*\|$", text.partition("## Labels")[2].partition("\n## ")[0], re.MULTILINE))
    assert {"ingress", "replica", "tenant"} <= explained
    for name, metric in pair[1].items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        values = [value for label, found in metric.labels.items() if label not in explained for value in found]
        assert [value for value in values if f"`{value}`" not in row] == [], name


def test_tables_do_not_say_a_name_twice(text: str) -> None:
    names = re.findall(r"^\| `(quire_\w+)` \|", text, re.MULTILINE)
    assert len(names) == len(set(names))
