"""The Grafana dashboard asks for metrics that there are, by labels that they have."""

from __future__ import annotations

import json
import re
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

from onnx_dl.supervisor.metrics.families import FAMILIES

DASHBOARD = json.loads((Path(__file__).parents[2] / "examples" / "grafana" / "onnx-dl.json").read_text())
SCRAPED = {"instance", "job"}
"""Labels that Prometheus itself adds."""


def samples() -> dict[str, set[str]]:
    """Labels of each sample name that a scrape gives."""
    found: dict[str, set[str]] = {}
    for family in FAMILIES:
        labels = set(family.labels) | SCRAPED
        if family.make is HistogramMetricFamily:
            found |= {f"{family.name}_{part}": labels for part in ("count", "sum")}
            found[f"{family.name}_bucket"] = labels | {"le"}
        else:
            assert family.make is not CounterMetricFamily or family.name.endswith("_total")
            found[family.name] = labels
    return found


def queries() -> list[str]:
    variables = [each for each in DASHBOARD["templating"]["list"] if each["type"] == "query"]
    asked = [each["query"]["query"] for each in variables]
    return asked + [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_every_query_names_metrics_and_labels_that_there_are() -> None:
    known = samples()
    for query in queries():
        names = re.findall(r"\bonnx_dl_\w+", query)
        assert names and [name for name in names if name not in known] == [], query
        selected = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query)
        grouped = [label for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")]
        listed = re.findall(r"label_values\(\w+, (\w+)\)", query)
        assert {*selected, *grouped, *listed} <= set.intersection(*(known[name] for name in names)), query


def test_every_family_with_figures_is_on_the_dashboard() -> None:
    shown = " ".join(target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"])
    assert [f.name for f in FAMILIES if f.name not in shown and f.name != "onnx_dl"] == []


def test_panels_have_units_a_data_source_and_their_own_place() -> None:
    assert DASHBOARD["uid"] == "onnx-dl"
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}" and panel["fieldConfig"]["defaults"]["unit"]
        at = panel["gridPos"]
        cells = {(at["x"] + right, at["y"] + down) for right in range(at["w"]) for down in range(at["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
