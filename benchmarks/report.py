"""One table of figures with what was asked of them, and a picture of what a call costs by way."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One figure.  ``limit``: what it must not exceed, or reach if ``at_least``; None: nothing is asked."""

    work: str
    way: str
    value: float
    unit: str
    limit: float | None = None
    at_least: bool = False
    least: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool | None:
        if self.limit is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def table(rows: list[Row]) -> str:
    lines = [f"{'work':<36} {'way':<26} {'figure':>11}  {'(least, most)':>20} {'asked':>12}"]
    work = None
    for row in rows:
        spread = "" if row.least is None else f"({row.least:.4g}, {row.most:.4g})"
        asked = "" if row.limit is None else f"{'≥' if row.at_least else '≤'} {row.limit:.4g}"
        verdict = {None: "", True: "  met", False: "  NOT MET"}[row.met]
        name = row.work if row.work != work else ""
        lines.append(
            f"{name:<36} {row.way:<26} {row.value:>8.4g} {row.unit:<3} {spread:>20} {asked:>12}{verdict}"
        )
        work = row.work
    return "\n".join(lines)


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    return [row._asdict() | {"met": row.met} for row in rows]


def draw(rows: list[Row], target: Path) -> None:
    """Added µs by way, for each size of call, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    added = [row for row in rows if row.unit == "µs+"]
    works = list(dict.fromkeys(row.work for row in added))
    works = [work for work in works if "all ways" in work] or works
    figure, all_axes = pyplot.subplots(1, len(works), figsize=(4.2 * len(works), 4.6), dpi=110)
    for axes, work in zip([all_axes] if len(works) == 1 else all_axes, works, strict=True):
        mine = sorted((row for row in added if row.work == work), key=lambda row: -row.value)
        colors = ["#1b7837" if "onnx-dl" in row.way else "#999999" for row in mine]
        axes.barh([row.way for row in mine], [max(row.value, 1) for row in mine], color=colors)
        axes.set_xscale("log")
        axes.set_xlim(left=1)
        axes.set_title(work, fontsize=11)
        axes.set_xlabel("µs added to the in-process call")
        axes.grid(axis="x", alpha=0.3)
        for index, row in enumerate(mine):
            axes.text(max(row.value, 1) * 1.1, index, f"{row.value:.0f}", va="center", fontsize=8)
        axes.margins(x=0.3)
    figure.tight_layout()
    figure.savefig(target)
