"""Numbers, durations and results as text and as JSON. No rich, no click: cheap to import and to test."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import Any

from visionkd.types import MetricRow

_PERCENT = (
    "top1", "top5", "miou", "iou", "pixel_acc", "ap", "ap50", "ap75", "ap50_base", "ap50_novel", "accuracy",
    "agreement", "ece",
)  # fmt: skip
_TWO_DECIMALS = ("latency_ms", "size_mb", "params_m", "ms")


def duration(seconds: float) -> str:
    """Return ``1:02:03`` or ``2:05``."""
    whole = max(0, round(seconds)) if math.isfinite(seconds) else 0
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def counted(number: int, noun: str) -> str:
    """Return ``1 image`` or ``2,000 images``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def value_text(name: str, value: Any) -> str:
    """Return a measured value with as many digits as its unit, the end of its name, deserves."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        last = name.rsplit("/", 1)[-1]
        if not math.isfinite(value):
            return str(value)
        if last.endswith("_img_s"):
            return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
        if last.endswith(_PERCENT) or last.endswith(_TWO_DECIMALS) or "latency_ms" in last:
            return f"{value:.2f}"
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(value_text(name, item) for item in value)
    return str(value)


def metric_text(name: str, value: Any) -> str:
    """Return ``val/top1 55.10``."""
    return f"{name} {value_text(name, value)}"


def as_mapping(row: Any) -> dict[str, Any]:
    """Return a row of a result, a dataclass or a mapping, as names and values."""
    if isinstance(row, MetricRow):
        return {"model": row.model, **row.values}
    if is_dataclass(row):
        return {field.name: getattr(row, field.name) for field in fields(row)}
    return dict(row)


def table_cells(rows: Iterable[Any]) -> tuple[list[str], list[list[str]], list[bool]]:
    """Return header, cells and whether each column holds numbers; values that no row has are left out."""
    mappings = [as_mapping(row) for row in rows]
    names = list(dict.fromkeys(name for row in mappings for name in row))
    names = [name for name in names if any(row.get(name) not in (None, "") for row in mappings)]
    cells = [[value_text(name, row.get(name)) for name in names] for row in mappings]
    numeric = [
        all(isinstance(row.get(name), (int, float)) or row.get(name) is None for row in mappings) for name in names
    ]
    return names, cells, numeric


def aligned(header: Sequence[str], cells: Sequence[Sequence[str]], numeric: Sequence[bool]) -> str:
    """Return a table as lines whose columns are aligned by spaces; nothing is cut."""
    lines = [list(header), *map(list, cells)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join(text)


def jsonable(value: Any) -> Any:
    """Return a result as what :mod:`json` writes: dataclasses become objects, paths strings, NaN and infinity null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, PurePath):
        return str(value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return jsonable(value.tolist())
    return str(value)
