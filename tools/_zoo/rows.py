"""The cards as the tables and the page show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from visionkd.hub.card import Card
from visionkd.hub.index import read_card
from visionkd.workflows._zoo_rows import METRICS, ZooRow, main_measurement, ordered, rows_of

#: How metrics are called.
LABELS = {"top1": "top-1", "miou": "mIoU", "ap": "AP"}


@dataclass(frozen=True)
class Model:
    """A card and its rows, one for each form."""

    card: Card
    rows: tuple[ZooRow, ...]


@dataclass(frozen=True)
class Line:
    """One form of a model in a table.

    Attributes:
        card: Its card.
        row: Its values.
        label: How the metric is called.
        value: The metric in percent, if known.
        measured: Whether this project measured it.
    """

    card: Card
    row: ZooRow
    label: str
    value: float | None
    measured: bool


def models(zoo: Path) -> list[Model]:
    """Return the models of a folder of cards, sorted by name."""
    cards = sorted((read_card(file) for file in zoo.glob("*/*.yaml")), key=lambda card: card.name)
    return [Model(card, rows_of(card, forms=True)) for card in cards]


def lines(found: Sequence[Model]) -> list[Line]:
    """Return a line for each form: the project's own models first, then by task, data and metric."""
    of = {row: model.card for model in found for row in model.rows}
    return sorted(
        (_line(of[row], row) for row in ordered(list(of), None)), key=lambda line: (line.row.origin, line.value is None)
    )  # stable: own before upstream, encoders last


def plotted(found: Sequence[Line]) -> list[tuple[str, str, int]]:
    """Return data set, metric's label and number of the points that can be compared, the largest group first."""
    groups: dict[tuple[str, str], int] = {}
    for line in found:
        if line.value is not None:
            groups[line.row.data, line.label] = groups.get((line.row.data, line.label), 0) + 1
    return sorted(((data, label, count) for (data, label), count in groups.items()), key=lambda group: -group[2])


def _line(card: Card, row: ZooRow) -> Line:
    metric = METRICS[card.task]
    first = next(iter(card.artifacts))
    form = row.name.partition("@")[2] or first
    measurement = main_measurement(card, form, first=form == first)
    value = getattr(row, metric)
    return Line(card, row, LABELS[metric], value, measurement is not None and measurement.by == "here")
