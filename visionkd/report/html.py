"""Sets a report as one HTML page that needs nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

import visionkd
from visionkd.errors import VisionKDError
from visionkd.report import analysis, augmentation, detection, figures, reconstruction, segmentation
from visionkd.report.data import Evaluation, ModelRow, ReportData
from visionkd.report.pictures import picture_uri
from visionkd.report.text import (
    flatten,
    percent,
    plural,
    printable,
    quantity,
    shorten,
    signed,
    summary_sentence,
    thousands,
)

NUM_ERRORS = 24
NUM_PAIRS = 20
THUMBNAIL = 144
"""Largest side of an error picture in pixels; smaller ones are kept as they are and enlarged by the page."""
NAME_WIDTH = 36
"""Characters of a class name beside an error picture."""
PRETRAINED = "The encoder was pre-trained on images alone and has no classifier yet."
ROLES = ("student", "teacher", "baseline")


@dataclass(frozen=True)
class ErrorTile:
    """One of the student's confident errors, ready to print."""

    image: str
    pixelated: bool
    name: str
    true: str
    pred: str
    confidence: str
    teacher: str
    teacher_confidence: str
    teacher_verdict: str

_COLUMNS = ("top5", "pixel_acc", "ap50", "ap75", "ap50_base", "ap50_novel", "params_m", "macs_g", "size_mb")
#: Heading over what is known of each class, by the measure.
_BY_CLASS = {"mIoU": "IoU by class", "AP": "AP by class"}


def render_report(data: ReportData) -> str:
    """Return the whole page; the same input gives the same text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent, quantity=quantity, printable=printable, signed=signed, thousands=thousands
    )
    answers, data = _measure(data)
    models = _models(data)
    moments = augmentation.read_moments(data.augmentation) if data.augmentation is not None else ()
    context: dict[str, Any] = {
        "data": data,
        "version": visionkd.__version__,
        "summary": PRETRAINED
        if data.pretrained
        else summary_sentence(data.student, data.teachers, data.baseline, note=data.note),
        "alone": "pre-trained, without a classifier" if data.pretrained else "trained with labels",
        "facts": _facts(data),
        "who": _who(data),
        "models": models,
        "backends": _backends(models),
        "measured": {
            name
            for name in _COLUMNS
            if any(getattr(row, name) is not None for _, row in models)
        },
        "curves": figures.learning_curves(data.curves, data.baseline_curves, student=_who(data)) if data.curves else [],
        "costs": figures.accuracy_against_cost(data.student, data.teachers, data.baseline, measure=data.measure),
        "strips": augmentation.strips(moments),
        "reconstructions": reconstruction.read_reconstructions(data.reconstructions),
        "learned": augmentation.parameter_rows(moments),
        "turns": augmentation.turn_pictures(data.curves),
        "environment": flatten(data.environment),
        "options": flatten(data.options),
        "plural": plural,
        "classes": None,
        "confusion": None,
        "pairs": (),
        "errors": (),
        "num_errors": 0,
        "agreement": None,
        "baseline_agreement": None,
        "reliability": None,
        "differences": (),
        "scenes": (),
        "num_worst": 0,
        "color_keys": (),
        "scene_text": "",
        "precisions": (),
        "by_class": _BY_CLASS.get(data.measure, "Accuracy by class"),
    }
    if data.evaluation is not None and len(data.evaluation):
        context.update(_evaluated(data, data.evaluation, answers))
    if data.segmentation is not None and len(data.segmentation):
        context |= segmentation.describe(
            data.segmentation, classes=data.class_names, load=data.thumbnail, student=_who(data)
        )
    if data.detection is not None and len(data.detection):
        context |= detection.describe(
            data.detection, classes=data.class_names, load=data.thumbnail, student=_who(data)
        )
    return environment.get_template("template.html.j2").render(context).strip() + "\n"


def _measure(data: ReportData) -> tuple[dict[str, analysis.Answers], ReportData]:
    """Reduce the probabilities, and fill in accuracies of rows that have none of their own."""
    if data.evaluation is None:
        return {}, data
    found: dict[str, analysis.Answers] = {}
    rows: dict[str, Any] = {}
    evaluation = data.evaluation
    for role in ROLES:
        probs = getattr(evaluation, f"{role}_probs")
        if probs is None:
            continue
        found[role] = analysis.answers(probs, evaluation.targets)
        # Several teachers share one mean, which is none of theirs.
        row = (data.teachers[0] if len(data.teachers) == 1 else None) if role == "teacher" else getattr(data, role)
        if row is None:
            continue
        top5 = (
            analysis.topk_accuracy(probs, evaluation.targets) if row.top5 is None and probs.shape[1] > 5 else row.top5
        )
        row = replace(
            row, top1=found[role].top1 if row.top1 is None else row.top1, top5=top5 if probs.shape[1] > 5 else None
        )
        rows.update({"teachers": (row,)} if role == "teacher" else {role: row})
    return found, replace(data, **rows)


def _models(data: ReportData) -> list[tuple[str, ModelRow]]:
    rows = [("teacher", row) for row in data.teachers] + [("student", data.student)]
    return rows + ([("baseline", data.baseline)] if data.baseline is not None else [])


def _who(data: ReportData) -> str:
    """What the page calls the trained network; without a teacher there is no student."""
    return "Student" if data.distilled else "Model"


def _backends(models: list[tuple[str, ModelRow]]) -> list[str]:
    names = dict.fromkeys(name for _, row in models for name, value in row.latency_ms.items() if value is not None)
    return list(names)


def _facts(data: ReportData) -> list[tuple[str, str]]:
    """The line of plain facts under the summary."""
    facts = [("Run", data.run), ("Made", data.created)]
    if data.method:
        facts.append(("Method", data.method))
    if data.data:
        facts.append(("Data", data.data))
    evaluated = next((each for each in (data.evaluation, data.segmentation) if each is not None), data.detection)
    if evaluated is not None:
        facts.append(
            (
                "Evaluated on",
                f"{plural(len(evaluated), 'image')} of {data.split}, "
                f"{plural(len(data.class_names), 'class', 'classes')}",
            )
        )
    return [(name, value) for name, value in facts if value]


def _evaluated(data: ReportData, evaluation: Evaluation, answers: dict[str, analysis.Answers]) -> dict[str, Any]:
    """What the page says about single classes and samples."""
    targets = np.asarray(evaluation.targets, dtype=np.int64)
    names = [printable(name) for name in data.class_names]
    student = answers["student"]
    per_class = {
        role: analysis.class_accuracy(found.correct, targets, len(names))[0] for role, found in answers.items()
    }
    counts = np.bincount(targets, minlength=len(names))
    matrix = analysis.confusion(student.pred, targets, len(names))
    picture = figures.confusion_map(matrix, names)
    pairs = [] if picture is not None else analysis.confused_pairs(matrix, NUM_PAIRS)
    theirs = answers.get("teacher")
    teacher_matrix = analysis.confusion(theirs.pred, targets, len(names)) if theirs is not None and pairs else None
    context: dict[str, Any] = {
        "classes": figures.class_bars(per_class, counts, names, student=_who(data)),
        "confusion": picture,
        "pairs": [
            (
                shorten(names[p.target], 60),
                shorten(names[p.pred], 60),
                p.count,
                p.share,
                None if teacher_matrix is None else int(teacher_matrix[p.target, p.pred]),
            )
            for p in pairs
        ],
        "num_errors": int((~student.correct).sum()),
        "errors": [_tile(index, data, evaluation, answers) for index in analysis.confident_errors(student, NUM_ERRORS)],
        "reliability": figures.reliability_diagram(
            {role: analysis.reliability(found) for role, found in answers.items()}, student=_who(data)
        ),
        "differences": [
            (other, difference)
            for other in ("teacher", "baseline")
            if other in answers and (difference := analysis.paired_difference(student, answers[other])) is not None
        ],
    }
    if theirs is not None and evaluation.teacher_probs is not None:
        context["agreement"] = analysis.agreement(
            student, theirs, analysis.mean_kl(evaluation.student_probs, evaluation.teacher_probs)
        )
        if "baseline" in answers and evaluation.baseline_probs is not None:
            context["baseline_agreement"] = analysis.agreement(
                answers["baseline"], theirs, analysis.mean_kl(evaluation.baseline_probs, evaluation.teacher_probs)
            )
    return context


def _tile(index: int, data: ReportData, evaluation: Evaluation, answers: dict[str, analysis.Answers]) -> ErrorTile:
    student, teacher = answers["student"], answers.get("teacher")
    target = int(evaluation.targets[index])
    image, pixelated = _thumbnail(data.thumbnail, index)
    verdict = ""
    if teacher is not None:
        same = teacher.pred[index] == student.pred[index]
        verdict = "right" if teacher.correct[index] else "same mistake" if same else "wrong too"
    names = data.class_names
    return ErrorTile(
        image=image,
        pixelated=pixelated,
        name=printable(evaluation.names[index]) if evaluation.names else f"sample {index}",
        true=shorten(names[target], NAME_WIDTH),
        pred=shorten(names[int(student.pred[index])], NAME_WIDTH),
        confidence=_share(float(student.confidence[index])),
        teacher="" if teacher is None else shorten(names[int(teacher.pred[index])], NAME_WIDTH),
        teacher_confidence="" if teacher is None else _share(float(teacher.confidence[index])),
        teacher_verdict=verdict,
    )


def _share(probability: float) -> str:
    """Return percent with one digit, rounded down so that only certainty prints as 100."""
    return f"{math.floor(probability * 1000 + 1e-6) / 10:.1f}\u00a0%"


def _thumbnail(load: Callable[[int], Image.Image] | None, index: int) -> tuple[str, bool]:
    """Return a data URI, empty where there is no picture, and whether its pixels are to be shown as squares."""
    if load is None:
        return "", False
    try:
        image = load(index).convert("RGB")
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS, reducing_gap=2.0)
        small = max(image.size) <= THUMBNAIL // 2
        return picture_uri(image, quality=78, lossless=small), small
    except (VisionKDError, OSError, ValueError, IndexError):
        return "", False  # the picture has gone since it was evaluated; the words still help
