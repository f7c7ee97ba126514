"""A search's picture: the score of every candidate over what it costs, as a file of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from visionkd.report.figures import log_axis
from visionkd.report.svg import BASELINE, MUTED, STUDENT, TEACHER, canvas, to_svg

# A file of its own has no page to take its colours from: those of the report, for light and for dark.
_STYLE = """<style>
svg{--page:#fff;--ink:#1b1f24;--muted:#5b6571;--line:#d8dde3;--student:#1f6fb2;--teacher:#4d5763;--baseline:#c2590f;
background:var(--page);font-family:system-ui,sans-serif}
@media (prefers-color-scheme:dark){svg{--page:#14171a;--ink:#e6e9ec;--muted:#9ba5b0;--line:#343b43;--student:#5ea9e8;
--teacher:#c3ccd6;--baseline:#ef9a55}}
</style>"""


@dataclass(frozen=True)
class Panel:
    """Score over one cost.

    Attributes:
        title: Name of the cost with its unit.
        costs: One for each candidate, above 0.
        scores: One for each candidate.
        front: Indices of the candidates that no cheaper one equals, the cheapest first.
        best: Index of the best candidate.
        limit: Largest cost allowed, if it is limited.
    """

    title: str
    costs: Sequence[float]
    scores: Sequence[float]
    front: Sequence[int]
    best: int
    limit: float | None = None


def pareto_svg(panels: Mapping[str, Panel], *, score: str) -> str:
    """Return an SVG file with a panel for each cost: all candidates, the front, the best one and the limit."""
    with canvas(300.0 * len(panels), 240.0) as figure:
        for number, panel in enumerate(panels.values()):
            axes = figure.add_subplot(1, len(panels), number + 1)
            axes.plot(
                panel.costs, panel.scores, linestyle="none", marker="o", markersize=2.6, color=MUTED, alpha=0.45,
                markeredgewidth=0,
            )  # fmt: skip
            axes.plot(
                [panel.costs[i] for i in panel.front], [panel.scores[i] for i in panel.front],
                color=STUDENT, linewidth=1.2, marker="o", markersize=4.0, drawstyle="steps-post",
            )  # fmt: skip
            axes.plot(
                [panel.costs[panel.best]], [panel.scores[panel.best]], linestyle="none", marker="D", markersize=7.0,
                color=BASELINE, zorder=4,
            )  # fmt: skip
            costs = list(panel.costs) + ([panel.limit] if panel.limit is not None else [])
            if panel.limit is not None:
                axes.axvline(panel.limit, color=TEACHER, linewidth=1.0, linestyle=(0, (3, 2)))
            if max(costs) > min(costs) > 0:
                log_axis(axes, costs)
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.set_xlabel(panel.title)
            if number == 0:
                axes.set_ylabel(f"score {score}")
        svg = to_svg(figure, "pareto", f"Score {score} of each candidate against its cost; the best one is marked")
    opening = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    head, body = svg.replace("<svg ", opening, 1).split(">", 1)
    return f"{head}>{_STYLE}{body}\n"
