"""The zoo as a table: a row for each model, or for each of its forms; filters and sorting. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from visionkd.errors import Problem, RequestError, did_you_mean
from visionkd.hub.card import Card, Latency, Measurement

#: Metrics that have a column of their own; the main one of each task.
METRICS = {"classification": "top1", "segmentation": "miou", "detection": "ap"}
#: Costs that can be limited.
COSTS = ("params_m", "macs_g", "size_mb", "latency_ms")
#: Columns whose largest value is the best one.
_BEST_IS_LARGE = frozenset(METRICS.values())


@dataclass(frozen=True)
class ZooRow:
    """A model of the zoo, or one of its forms.

    Attributes:
        name: What ``zoo:`` takes.
        task: Task that its outputs serve.
        data: Data set that the metric was measured on; the one trained on where there is no metric.
        top1: Accuracy in percent.
        miou: Mean intersection over union in percent.
        ap: Mean average precision of COCO, in percent.
        params_m: Parameters in millions.
        macs_g: Multiply-adds of one image in 10^9.
        size_mb: Bytes of the files in 10^6; four bytes a parameter where a publisher does not say.
        latency_ms: Fastest timing of one image.
        timed: What that timing was made with.
        method: How it was trained.
        licence: Licence of the weights.
        origin: ``own`` or ``upstream``.
    """

    name: str
    task: str
    data: str
    top1: float | None
    miou: float | None
    ap: float | None
    params_m: float
    macs_g: float | None
    size_mb: float | None
    latency_ms: float | None
    timed: str | None
    method: str
    licence: str
    origin: str


COLUMNS = tuple(field.name for field in fields(ZooRow))


def rows_of(card: Card, *, forms: bool = False) -> tuple[ZooRow, ...]:
    """Return the row of the form that ``zoo:NAME`` stands for, or one for each form."""
    names = tuple(card.artifacts)
    return tuple(_row(card, name, first=name == names[0]) for name in (names if forms else names[:1]))


def main_measurement(card: Card, artifact: str, *, first: bool) -> Measurement | None:
    """Return the measurement of the main metric that is shown: the project's own before a published one."""
    metric = METRICS[card.task]
    rows = [row for row in card.metrics if metric in row.values]
    rows = [row for row in rows if row.artifact == artifact or (first and row.artifact is None)]
    # of several data sets the one trained on: photographs of imagenet_samples are easier than ImageNet's
    rows.sort(key=lambda row: (row.data != card.data, row.by != "here"))
    return rows[0] if rows else None


def fastest(card: Card, artifact: str) -> Latency | None:
    """Return the fastest timing of one image, on whatever it was made."""
    timed = [row for row in card.latencies if row.artifact == artifact and row.batch_size == 1]
    return min(timed, key=lambda row: row.latency_ms) if timed else None


def size_mb(card: Card, artifact: str) -> float:
    """Return the size of a form in 10^6 bytes; four bytes a parameter where a publisher does not say."""
    known = card.size_bytes(artifact)
    return known / 1e6 if known is not None else 4.0 * card.params_m


def timing_text(row: Latency) -> str:
    """Return what a timing was made with, in a few words."""
    threads = f", {row.threads} thread{'s' if row.threads > 1 else ''}" if row.backend != "tensorrt" else ""
    return f"{row.backend}, {row.device}{threads}"


def _row(card: Card, artifact: str, *, first: bool) -> ZooRow:
    measured, timed = main_measurement(card, artifact, first=first), fastest(card, artifact)
    values: Mapping[str, float] = measured.values if measured is not None else {}
    return ZooRow(
        name=card.name if first else f"{card.name}@{artifact}",
        task=card.task,
        data=measured.data if measured is not None else card.data,
        **{metric: values.get(metric) for metric in METRICS.values()},
        params_m=card.params_m,
        macs_g=card.macs_g,
        size_mb=size_mb(card, artifact),
        latency_ms=timed.latency_ms if timed is not None else None,
        timed=timing_text(timed) if timed is not None else None,
        method=card.training.method,
        licence=card.licence,
        origin=card.origin,
    )


def allows_commercial_use(licence: str) -> bool:
    """Tell whether a licence is known, and is not one that forbids commercial use."""
    return licence != "unknown" and "-nc" not in licence


def limited(
    rows: Iterable[ZooRow], limits: Mapping[str, float | None], least: Mapping[str, float]
) -> tuple[tuple[ZooRow, ...], dict[str, int]]:
    """Return the rows within all limits, and how many were left out because a value is not known, by column.

    Args:
        rows: What to choose from.
        limits: Largest value of a cost, None for no limit.
        least: Smallest value of a metric.
    """
    kept, unknown = [], dict.fromkeys([*limits, *least], 0)
    asked = {key: value for key, value in limits.items() if value is not None}
    for row in rows:
        values = {key: getattr(row, key) for key in (*asked, *least)}
        inside = [values[key] is None or values[key] <= most for key, most in asked.items()]
        inside += [values[key] is None or values[key] >= smallest for key, smallest in least.items()]
        missing = [key for key, value in values.items() if value is None]
        if all(inside) and not missing:
            kept.append(row)
        elif all(inside):  # only what is not known keeps it out
            for key in missing:
                unknown[key] += 1
    return tuple(kept), {key: count for key, count in unknown.items() if count}


def ordered(rows: Sequence[ZooRow], column: str | None, *, reverse: bool = False) -> tuple[ZooRow, ...]:
    """Sort rows: by task, data and metric where no column is named; the best first, rows without a value last.

    Raises:
        RequestError: If there is no such column.
    """
    if column is None:
        best = sorted(rows, key=lambda row: (row.task, row.data, -(_metric(row) or -1.0), row.name))
        return tuple(reversed(best)) if reverse else tuple(best)
    if column not in COLUMNS:
        hint = did_you_mean(column, COLUMNS) or f"Columns: {', '.join(COLUMNS)}"
        raise RequestError(Problem("--sort", f"unknown column '{column}'", hint))
    known = [row for row in rows if getattr(row, column) is not None]
    known.sort(key=lambda row: row.name)
    known.sort(key=lambda row: _key(getattr(row, column)), reverse=(column in _BEST_IS_LARGE) != reverse)
    return (*known, *sorted((row for row in rows if getattr(row, column) is None), key=lambda row: row.name))


def least_metrics(given: Sequence[str]) -> dict[str, float]:
    """Read ``METRIC=VALUE`` pairs.

    Raises:
        RequestError: With everything that is wrong with them.
    """
    found, problems = {}, []
    for text in given:
        name, equals, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            equals = ""
        if not equals or name not in METRICS.values():
            known = ", ".join(METRICS.values())
            problems.append(Problem("--min", f"'{text}' is not METRIC=VALUE", f"Metrics: {known}. Example: top1=80"))
            continue
        found[name] = number
    if problems:
        raise RequestError(problems)
    return found


def _metric(row: ZooRow) -> float | None:
    value: float | None = getattr(row, METRICS[row.task])
    return value


def _key(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value
