"""The Grafana dashboards ask for metrics that there are, by labels that they have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

from onnx_dl.server.interfaces import VersionStatistics
from onnx_dl.server.metrics import families
from onnx_dl.server.metrics.machine import GpuFigures, MachineFigures
from onnx_dl.supervisor.metrics.families import FAMILIES

FOLDER = Path(__file__).parents[2] / "examples" / "grafana"
HOST = json.loads((FOLDER / "onnx-dl.json").read_text())
SERVER = json.loads((FOLDER / "onnx-dl-serve.json").read_text())
DASHBOARDS = [pytest.param(HOST, id="onnx-dl"), pytest.param(SERVER, id="onnx-dl-serve")]
SCRAPED = {"instance", "job"}
"""Labels that Prometheus itself adds."""


def samples() -> dict[str, set[str]]:
    """Labels of each sample name that a scrape of a host gives."""
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


def served() -> dict[str, set[str]]:
    """The same for the families that a server adds, with a model and a GPU."""
    machine = MachineFigures(0.5, 2, 1, (GpuFigures("GPU-1", *(1.0,) * (len(GpuFigures._fields) - 1)),))
    statistics = [VersionStatistics(name="digits", version="1")]
    text = families.render(statistics, None, "", machine=machine)[0].decode()
    lines = re.findall(r"^(\w+)(\{.*\})? ", text, re.MULTILINE)
    return {name: set(re.findall(r'(\w+)="', labels)) | SCRAPED for name, labels in lines}


def queries(dashboard: Any) -> list[str]:
    variables = [each for each in dashboard["templating"]["list"] if each["type"] == "query"]
    asked = [each["query"]["query"] for each in variables]
    return asked + [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


@pytest.mark.parametrize("dashboard", DASHBOARDS)
def test_every_query_names_metrics_and_labels_that_there_are(dashboard: Any) -> None:
    known = samples() | (served() if dashboard is SERVER else {})
    for query in queries(dashboard):
        names = re.findall(r"\b(?:onnx_dl|nv)_\w+", query)
        assert names and [name for name in names if name not in known] == [], query
        selected = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query)
        grouped = [label for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")]
        listed = re.findall(r"label_values\(\w+, (\w+)\)", query)
        assert {*selected, *grouped, *listed} <= set.intersection(*(known[name] for name in names)), query


def test_every_family_with_figures_is_on_the_dashboard() -> None:
    shown = " ".join(queries(HOST))
    assert [f.name for f in FAMILIES if f.name not in shown and f.name != "onnx_dl"] == []


def test_every_figure_of_inferences_is_on_the_servers_dashboard() -> None:
    shown = " ".join(queries(SERVER))
    assert [
        name for name in served() if name not in shown and not name.startswith(("nv_gpu", "nv_energy"))
    ] == []


@pytest.mark.parametrize("dashboard", DASHBOARDS)
def test_panels_have_units_a_data_source_and_their_own_place(
    dashboard: Any, request: pytest.FixtureRequest
) -> None:
    assert dashboard["uid"] == request.node.callspec.id
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}" and panel["fieldConfig"]["defaults"]["unit"]
        at = panel["gridPos"]
        cells = {(at["x"] + right, at["y"] + down) for right in range(at["w"]) for down in range(at["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
