"""The pictures of a report, each a :class:`Picture` in SVG that is the same for the same input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from visionkd.report.analysis import Reliability
from visionkd.report.data import Curve, Curves, ModelRow
from visionkd.report.svg import (
    BASELINE,
    INK,
    LINE,
    MUTED,
    PAGE,
    STUDENT,
    TEACHER,
    LegendItem,
    Picture,
    canvas,
    to_svg,
)
from visionkd.report.text import shorten

COLORS = {"student": STUDENT, "teacher": TEACHER, "baseline": BASELINE}
MAX_CLASSES = 30
"""Beyond this many classes, bars show the worst and the confusion matrix becomes a table."""
WORST = 15
MAX_POINTS = 240
"""Points of a curve; a longer one is averaged over equal stretches."""
PANEL = (320.0, 200.0)
"""Points of a panel; enlarged by the page up to PANEL_WIDTH pixels."""
PANEL_WIDTH = 430
RIGHT, WRONG = (0x2A, 0x78, 0xB8), (0xD0, 0x4A, 0x1E)
"""Colours of the confusion matrix, laid over the page by their opacity so that 0 is the page itself."""


def learning_curves(curves: Curves, baseline: Curves | None = None, *, student: str = "Student") -> list[Picture]:
    """Draw accuracy, loss, further losses, learning rate and speed over the epochs, each where there are values."""
    losses = [name for name in curves.curves if name.endswith("loss") and name not in ("loss",)]
    panels = [
        ("curve-top1", "Accuracy, top-1 in %", ["top1"], True),
        ("curve-miou", "mIoU in %", ["miou"], True),
        ("curve-pixel-acc", "Pixel accuracy in %", ["pixel_acc"], True),
        ("curve-ap", "AP in %", ["ap"], True),
        ("curve-ap50", "AP50 in %", ["ap50"], True),
        ("curve-ap50-novel", "AP50 of novel classes in %", ["ap50_novel"], True),
        ("curve-loss", "Loss", ["loss"], True),
        ("curve-parts", "Parts of the training loss", losses, False),
        ("curve-lr", "Learning rate", ["lr"], False),
        ("curve-speed", "Images per second, training", ["images_per_s"], False),
    ]
    pictures = []
    for key, title, metrics, compare in panels:
        lines = []
        if compare:
            lines = _compared(curves, baseline, metrics[0], student)
        else:
            named = [(m, thin(curve)) for m in metrics if (curve := curves.get(m, "train")) is not None]
            styles = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))
            lines = [
                (
                    LegendItem("student", name.removesuffix("_loss"), "line" if i == 0 else "dashed"),
                    curve,
                    {"linestyle": styles[i % 4]},
                )
                for i, (name, curve) in enumerate(named[:4])
            ]
        if not any(len(curve.values) > 1 for _, curve, _ in lines):
            continue
        with canvas(*PANEL) as figure:
            axes = figure.add_subplot()
            for item, curve, style in lines:
                axes.plot(curve.epochs, curve.values, color=COLORS[item.role], **style)
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
            axes.grid(visible=False, axis="x")
            axes.margins(x=0.02, y=0.08)
            values = np.concatenate([curve.values for _, curve, _ in lines])
            if key in ("curve-lr", "curve-speed", "curve-parts") and values.min() >= 0:
                axes.set_ylim(0.0, 1.08 * max(float(values.max()), 1e-12))
            svg = to_svg(figure, key, f"{title} over the epochs")
        legend = tuple(item for item, _, _ in lines) if len(lines) > 1 else ()
        pictures.append(Picture(svg, title, PANEL_WIDTH, legend=legend))
    return pictures


def _compared(
    curves: Curves, baseline: Curves | None, metric: str, student: str
) -> list[tuple[LegendItem, Curve, dict]]:
    """Lines of student and baseline for one metric; a distilled and a plain training loss are not comparable."""
    lines: list[tuple[LegendItem, Curve, dict]] = []
    named = [("student", student, curves)] + ([("baseline", "Baseline", baseline)] if baseline is not None else [])
    for role, name, source in named:
        train = source.get(metric, "train")
        if train is not None and not (role == "baseline" and metric == "loss"):
            lines.append(
                (
                    LegendItem(role, f"{name}, training", "dashed"),
                    thin(train),
                    {"linestyle": (0, (3, 2)), "linewidth": 1.1, "alpha": 0.8},
                )
            )
        val = source.get(metric, "val") or source.get(metric, "test")
        if val is not None:
            marker = {"marker": "o", "markersize": 3.0} if len(val.values) <= 30 else {}
            lines.append((LegendItem(role, f"{name}, validation"), thin(val), marker))
    return lines


def thin(curve: Curve) -> Curve:
    if len(curve.values) <= MAX_POINTS:
        return curve
    parts = np.array_split(np.arange(len(curve.values)), MAX_POINTS)
    return Curve(np.array([curve.epochs[p].mean() for p in parts]), np.array([curve.values[p].mean() for p in parts]))


def tick(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-").replace("-", "\u2212")
    return f"{value:,.4g}".replace(",", "\u00a0").replace("-", "\u2212")


def accuracy_against_cost(
    student: ModelRow, teachers: Sequence[ModelRow], baseline: ModelRow | None, *, measure: str = "top-1"
) -> list[Picture]:
    """Draw accuracy over each cost that was measured of at least two networks, on logarithmic axes.

    Every picture has the legend of them all, so that the page can print it once.
    """
    rows = [("teacher", row) for row in teachers] + [("student", student)]
    if baseline is not None:
        rows.append(("baseline", baseline))
    rows = [(role, row) for role, row in rows if row.score is not None]
    backends = list(dict.fromkeys(name for _, row in rows for name in row.latency_ms))
    costs = [
        ("cost-params", "Parameters, M", lambda row: row.params_m),
        ("cost-macs", "MACs per image, G", lambda row: row.macs_g),
    ]
    costs += [
        (f"cost-latency{i}", f"Latency with {backend}, ms", lambda row, b=backend: row.latency_ms.get(b))
        for i, backend in enumerate(backends)
    ]
    marks = {"student": ("o", "dot", 9.0), "teacher": ("s", "square", 8.0), "baseline": ("D", "diamond", 6.5)}
    legend = tuple(LegendItem(role, f"{shorten(row.name, 40)}, {role}", marks[role][1]) for role, row in rows)
    pictures = []
    for key, title, cost in costs:
        points = [(role, float(cost(row)), float(row.score or 0.0)) for role, row in rows if cost(row)]
        # A student and its baseline cost the same: without another network there is nothing to trade.
        if len({round(math.log(x), 1) for _, x, _ in points}) < 2:
            continue
        with canvas(PANEL[0], 180.0) as figure:
            axes = figure.add_subplot()
            for role, x, y in points:
                axes.plot(
                    [x], [y], color=COLORS[role], marker=marks[role][0], linestyle="none", markersize=marks[role][2]
                )
            log_axis(axes, [x for _, x, _ in points])
            low, high = min(y for *_, y in points), max(y for *_, y in points)
            pad = max(0.2 * (high - low), 0.5)
            axes.set_ylim(low - pad, high + pad)
            # No tick above 100 %, though a mark may need the room.
            axes.yaxis.set_major_locator(
                FixedLocator([y for y in MaxNLocator(5).tick_values(low - pad, high + pad) if 0 <= y <= 100])
            )
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
            axes.set_ylabel(f"{measure}, %")
            svg = to_svg(figure, key, f"{measure} against {title}")
        pictures.append(Picture(svg, title, PANEL_WIDTH, legend=legend))
    return pictures


def log_axis(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis with plain numbers 1, 2, 5 x 10^k as ticks, as many as fit."""
    low, high = math.log10(min(values)), math.log10(max(values))
    pad = max(0.12 * (high - low), 0.08)
    low, high = low - pad, high + pad
    axes.set_xscale("log")
    axes.set_xlim(10**low, 10**high)
    decades = range(math.floor(low), math.ceil(high) + 1)
    for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**k for k in decades for step in steps if low <= math.log10(step * 10.0**k) <= high]
        if len(ticks) <= 6:
            break
    axes.xaxis.set_major_locator(FixedLocator(ticks[:: math.ceil(len(ticks) / 6)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))


def class_bars(
    accuracy: Mapping[str, np.ndarray],
    counts: np.ndarray,
    classes: Sequence[str],
    *,
    student: str = "Student",
    label: str = "Accuracy of each class in percent",
    caption: str = "Percent of each class's images that are classified rightly, worst class first.",
    absent: str = "have no image in this split",
) -> Picture | None:
    """Draw one bar per class for the student, worst first, with marks for teacher and baseline.

    Args:
        accuracy: ``student``, perhaps ``teacher`` and ``baseline``: percent per class, NaN without samples; length C.
        counts: Samples per class, length C.
        classes: Names, length C.
        student: What the student is called.
        label: What the picture shows, read out in its place.
        caption: The same for the eye.
        absent: What is said of classes with a count of 0.
    """
    values = accuracy["student"]
    order = [int(i) for i in np.argsort(values, kind="stable") if counts[i]]
    if not order:
        return None
    shown = order if len(classes) <= MAX_CLASSES else order[:WORST]
    place = np.arange(len(shown))
    with canvas(340.0, 34.0 + 17.0 * len(shown)) as figure:
        axes = figure.add_subplot()
        axes.barh(place, values[shown], height=0.66, color=STUDENT, alpha=0.85, linewidth=0)
        if "baseline" in accuracy:
            axes.plot(
                accuracy["baseline"][shown],
                place,
                linestyle="none",
                marker="D",
                markersize=5.6,
                color=BASELINE,
                markeredgecolor=PAGE,
                markeredgewidth=0.9,
                clip_on=False,
                zorder=4,
            )
        if "teacher" in accuracy:
            axes.plot(
                accuracy["teacher"][shown],
                place,
                linestyle="none",
                marker="|",
                markersize=11,
                markeredgewidth=2.4,
                color=TEACHER,
                clip_on=False,
                zorder=3,
            )
        for y, value in zip(place, values[shown], strict=True):
            axes.text(121.0, y, f"{value:.1f}", ha="right", va="center", fontsize=9, color=INK, clip_on=False)
        axes.set_yticks(place, [shorten(classes[i], 22) for i in shown])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlim(0.0, 121.0)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.spines["bottom"].set_bounds(0.0, 100.0)
        svg = to_svg(figure, "classes", label)
    legend = [LegendItem("student", student, "bar")]
    legend += [LegendItem("teacher", "Teacher", "tick")] if "teacher" in accuracy else []
    legend += [LegendItem("baseline", "Baseline", "diamond")] if "baseline" in accuracy else []
    if len(accuracy) > 1:
        caption += f" The number at the right is the {student.lower()}'s."
    if len(shown) < len(order):
        caption += f" Only the {len(shown)} worst of {len(order)} classes are shown."
    elif len(order) < len(classes):
        caption += f" {len(classes) - len(order)} of {len(classes)} classes {absent}."
    return Picture(svg, "", 520, legend=tuple(legend) if len(legend) > 1 else (), caption=caption)


_CONFUSED = (
    "Percent of the images of the class at the left that were given the class below. "
    "Blue: right. Orange: mistakes, on a scale of their own, the most frequent one strongest."
)


def confusion_map(matrix: np.ndarray, classes: Sequence[str], *, caption: str = _CONFUSED) -> Picture | None:
    """Draw C x C counts as shares of each row; None beyond MAX_CLASSES. Mistakes have a scale of their own."""
    size = len(classes)
    if size > MAX_CLASSES or not matrix.sum():
        return None
    totals = matrix.sum(axis=1, keepdims=True)
    share = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    mistakes = share * ~np.eye(size, dtype=bool)
    largest = float(mistakes.max())
    image = np.zeros((size, size, 4), dtype=np.uint8)
    image[..., :3] = WRONG
    strength = (mistakes / largest) ** 0.75 * 0.95 if largest else mistakes
    diagonal = np.arange(size)
    image[diagonal, diagonal, :3] = RIGHT
    strength[diagonal, diagonal] = 0.1 + 0.85 * np.diag(share)
    strength[totals[:, 0] == 0] = 0.0
    image[..., 3] = np.round(255 * strength)

    cell = max(16.0, min(30.0, 250.0 / size))
    side = cell * size
    longest = max(len(shorten(name, 16)) for name in classes)
    text_size = 9.0 if cell >= 22 else 7.0
    with canvas(side + 34 + 5.8 * longest, side + 30 + 5.8 * longest) as figure:
        axes = figure.add_subplot()
        axes.imshow(image, interpolation="none", aspect="equal")
        names = [shorten(name, 16) for name in classes]
        axes.set_xticks(diagonal, names, rotation=90)
        axes.set_yticks(diagonal, names)
        axes.tick_params(length=0, labelcolor=INK, pad=3)
        axes.grid(visible=False)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        for spine in axes.spines.values():
            spine.set(visible=True, color=LINE)
        for row, col in zip(*np.nonzero(np.round(100 * share) >= 1), strict=True):
            axes.text(
                col,
                row,
                f"{100 * share[row, col]:.0f}",
                ha="center",
                va="center",
                fontsize=text_size,
                color="#ffffff" if strength[row, col] > 0.55 else INK,
            )
        svg = to_svg(figure, "confusion", "Confusion matrix")
        width = figure.get_figwidth() * 72.0
    return Picture(svg, "", round(width * 1.35), min_width=round(width * 0.95), caption=caption)


def reliability_diagram(networks: Mapping[str, Reliability], *, student: str = "Student") -> Picture | None:
    """Draw accuracy over confidence for each network, and how the student's confidences are distributed."""
    own = networks["student"]
    if not own.counts.sum():
        return None
    styles = {
        "teacher": ("s", "square", "Teacher"),
        "baseline": ("D", "diamond", "Baseline"),
        "student": ("o", "dot", student),
    }
    with canvas(PANEL[0], 270.0) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        top.plot([0, 1], [0, 1], color=MUTED, linewidth=1.0, linestyle=(0, (2, 2)))
        for role in styles:
            if role not in networks:
                continue
            bins = networks[role]
            # A handful of samples says nothing about a bin.
            some = bins.counts >= max(1, min(10, bins.counts.sum() // 100))
            top.plot(
                bins.confidence[some], bins.accuracy[some], color=COLORS[role], marker=styles[role][0], markersize=4.0
            )
        top.set_ylim(0.0, 1.03)
        top.set_xlim(0.0, 1.02)
        top.set_ylabel("right answers")
        edges = np.linspace(0.0, 1.0, len(own.counts) + 1)
        bottom.bar(
            (edges[:-1] + edges[1:]) / 2,
            own.counts / own.counts.sum(),
            width=0.9 / len(own.counts),
            color=STUDENT,
            alpha=0.85,
            linewidth=0,
        )
        bottom.set_xlabel("confidence")
        bottom.set_ylabel("share")
        bottom.yaxis.set_major_locator(MaxNLocator(2))
        for axes in (top, bottom):
            axes.xaxis.set_major_locator(FixedLocator([0, 0.2, 0.4, 0.6, 0.8, 1.0]))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}\u00a0%"))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}\u00a0%"))
        svg = to_svg(figure, "reliability", "Share of right answers over confidence")
    legend = tuple(
        LegendItem(role, f"{name}, error {networks[role].ece:.1f}\u00a0%", mark)
        for role in ("teacher", "student", "baseline")
        if role in networks
        for _, mark, name in [styles[role]]
    )
    return Picture(svg, "", PANEL_WIDTH, legend=legend)
