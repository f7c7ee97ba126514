"""Numbers and sentences for people."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from visionkd.report.data import ModelRow

NBSP = "\u00a0"
MINUS = "\u2212"
DASH = "\u2013"


def percent(value: float | None, digits: int = 2) -> str:
    """Return ``91.20`` (the unit stands in the heading), a dash where there is no value."""
    return DASH if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def quantity(value: float | None) -> str:
    """Return a positive quantity with three significant digits, never in exponents where people meet it."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}".replace(",", NBSP)
    if size < 1e-4:
        return f"{value:.2e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"


def signed(value: float, digits: int = 2) -> str:
    """Return ``+1.30`` or ``−0.45`` with a real minus sign."""
    text = f"{value:+.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def thousands(count: int) -> str:
    """Return ``12 345`` with spaces that do not break."""
    return f"{count:,}".replace(",", NBSP)


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """Return ``1 image`` or ``1 234 images``."""
    return f"{thousands(count)}{NBSP}{noun if count == 1 else nouns or noun + 's'}"


def printable(text: object) -> str:
    """Return ``text`` on one line without control or direction characters, which a file or class name may hold."""
    kept = (
        "\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Cn") and c not in "\u200d\u200c" else c
        for c in re.sub(r"[\r\n\t]+", " ", str(text))
    )
    return "".join(kept)


def shorten(text: object, width: int) -> str:
    """Return ``text`` cut in the middle to ``width`` characters: names often differ at their ends."""
    clean = printable(text)
    if len(clean) <= width:
        return clean
    tail = (width - 1) // 3
    return f"{clean[: width - 1 - tail]}\u2026{clean[len(clean) - tail :]}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested mappings as rows with dotted names."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += flatten(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            rows.append((name, ", ".join(str(item) for item in value) or DASH))
        else:
            rows.append((name, DASH if value is None or value == "" else str(value)))
    return rows


def _times(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.1f}".removesuffix(".0")


def _cost(student: ModelRow, teacher: ModelRow) -> str:
    """Say how the student's size compares with the teacher's, by parameters or else by MACs."""
    for mine, theirs, noun in (
        (student.params_m, teacher.params_m, "parameters"),
        (student.macs_g, teacher.macs_g, "MACs"),
    ):
        if not mine or not theirs:
            continue
        if theirs / mine >= 1.05:
            return f" with {_times(theirs / mine)}× fewer {noun}"
        if mine / theirs >= 1.05:
            return f" with {_times(mine / theirs)}× as many {noun}"
        return f" with as many {noun}"
    return ""


def _against_baseline(student: ModelRow, baseline: ModelRow | None) -> str:
    if baseline is None or baseline.score is None or student.score is None:
        return ""
    gap = student.score - baseline.score
    # A baseline may carry a remark behind its name.
    same = baseline.name == student.name or baseline.name.startswith(f"{student.name} ")
    other = "the same network trained alone" if same else f"the baseline {printable(baseline.name)}"
    if abs(gap) < 0.005:
        return f", and is level with {other}"
    return f", and is {abs(gap):.2f}{NBSP}points {'above' if gap > 0 else 'below'} {other}"


def summary_sentence(
    student: ModelRow, teachers: Sequence[ModelRow] = (), baseline: ModelRow | None = None, *, note: str = ""
) -> str:
    """Return the run in one sentence; several teachers are represented by their most accurate one.

    A ``note`` says that top-1 is no accuracy, since the targets are the teacher's answers.
    """
    if note and student.score is not None:
        return f"The student gives the teacher's answer for {student.score:.2f}{NBSP}% of the images. {note}."
    measured = [row for row in teachers if row.score]
    if student.score is None:
        return "The student's accuracy was not measured." if teachers else "The accuracy was not measured."
    if not measured:
        size = f" with {quantity(student.params_m)}{NBSP}M parameters" if student.params_m else ""
        tail = _against_baseline(student, baseline)
        return f"{printable(student.name)} reaches {student.score:.2f}{NBSP}% {student.measure}{size}{tail}."
    noun = "accuracy" if student.measure == "top-1 accuracy" else student.measure
    best = max(measured, key=lambda row: row.score or 0.0)
    whose = "the teacher" if len(teachers) == 1 else "the best teacher"
    gap = student.score - (best.score or 0.0)
    if abs(gap) < 0.005:
        start = f"The student matches {whose}'s {noun}"
    elif gap > 0:
        more = "more accurate than" if noun == "accuracy" else f"of {noun} above"
        start = f"The student is {gap:.2f}{NBSP}points {more} {whose}"
    else:
        # 99.96 % must not be printed as if nothing had been lost.
        kept = 100.0 * student.score / (best.score or 1.0)
        kept = math.floor(kept * 10) / 10 if kept > 99 else kept
        start = f"The student keeps {kept:.1f}{NBSP}% of {whose}'s {noun}"
    return f"{start}{_cost(student, best)}{_against_baseline(student, baseline)}."
