"""Write a run's ``report.html``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from visionkd.data.open import open_data
from visionkd.errors import RequestError, VisionKDError
from visionkd.files import check_writable, write_text
from visionkd.report.data import Curves, ExportRow, ModelRow, ReportData
from visionkd.report.html import render_report
from visionkd.types import Listener
from visionkd.workflows._tasks import Evaluations, Work, work_of
from visionkd.workflows.evaluate import data_config
from visionkd.workflows.results import ReportResult


def report(
    *,
    run: str,
    baseline: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> ReportResult:
    """Write the page.

    Args:
        run: Run directory.
        baseline: Run of the same student trained alone; None takes the one that the run was compared with.
        out: File to write; None takes ``report.html`` in the run, which is always renewed.
        overwrite: Replace ``out`` if it exists.
        listener: Is told what happens.

    Raises:
        RequestError: If there is no run, or it has trained nothing yet.
    """
    listener = listener or Listener()
    path = Path(run)
    status = _read_json(path / "status.json")
    if status is None:
        raise RequestError(
            f"{run} is not a run directory: it holds no status.json.",
            hint="Runs are made by 'visionkd distill' and 'visionkd train'.",
        )
    comparison = _read_json(path / "comparison.json")
    if comparison is None:
        state = status.get("state", "unknown")
        raise RequestError(
            f"The run in {run} has no results to report yet (state: {state}).", hint=f"Finish it: --resume --out {run}"
        )
    file = Path(out) if out is not None else path / "report.html"
    if out is not None and file.exists() and not overwrite:
        raise RequestError(
            f"{file} exists, and nothing is written over unasked.", hint="Give --overwrite, or another --out FILE."
        )
    check_writable(file)
    config_text = (path / "config.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(config_text)
    # an encoder that was pre-trained answers nothing yet
    card = _read_json(path / "model" / "model.json") or {}
    work = work_of(card.get("task", "classification"))
    evaluations = work.load(path / "evaluation.npz") if comparison["rows"][0]["role"] != "encoder" else None
    environment = _read_json(path / "environment.json") or {}
    rows = comparison["rows"]
    exports = tuple(ExportRow(**_known(ExportRow, row)) for row in _read_json(path / "export" / "export.json") or ())
    exported_latency = _read_json(path / "export" / "latency.json") or {}
    about = "agreement with the teacher, not accuracy" if comparison.get("note") else ""
    student = _model_row(rows[0], note=about, latency_ms=exported_latency)
    baseline_rows, other = _of_role(rows, "baseline"), None
    if baseline is not None and evaluations is not None:
        baseline_rows, other = _baseline(baseline, work)
    baseline = baseline or config["report"]["baseline"]
    classes = tuple(card.get("classes") or ())
    parts = work.report_parts(evaluations, baseline=other, classes=classes) if evaluations is not None else {}
    data = ReportData(
        title=f"{student.name}: {_title(config)}",
        run=path.resolve().name,
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        student=student,
        teachers=tuple(_model_row(row, note=about) for row in _of_role(rows, "teacher")),
        baseline=_model_row(baseline_rows[0], note="in float" if baseline is None else "trained alone")
        if baseline_rows
        else None,
        command=environment.get("command", ""),
        data=str(card.get("origin", {}).get("data", config["data"]["path"])),
        method="" if _of_quantize(config) and not config["train"] else config.get("method", ""),
        options=config.get("options", {}),
        curves=_curves(path),
        baseline_curves=_curves(Path(baseline)) if baseline is not None else None,
        classes=classes,
        measure=work.TITLE,
        **parts,
        thumbnail=evaluations and _thumbnails(path, evaluations, listener, classes),
        environment=environment,
        config=config_text,
        messages=tuple((level, text) for level, text in status.get("messages", ())),
        preflight=(*(tuple(found) for found in status.get("preflight", ())), *_privileged(status)),
        exports=exports,
        augmentation=path / "augmentations" if (path / "augmentations").is_dir() else None,
        note=comparison.get("note", ""),
        pretrained=evaluations is None,
        reconstructions=path / "reconstructions.png" if (path / "reconstructions.png").is_file() else None,
    )
    write_text(file, render_report(data))
    return ReportResult(file)


def _of_quantize(config: Mapping[str, Any]) -> bool:
    return "int8" in config and "model" in config


def _title(config: Mapping[str, Any]) -> str:
    if _of_quantize(config):
        return "INT8" + (" training" if config["train"] else "")
    titles = {"mae": "masked autoencoder", "linear_probe": "linear probe"}
    return str(config.get("method") or titles.get(config.get("objective", ""), "supervised training"))


def _privileged(status: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Say what a teacher reached that the run trained itself and that is shown the labels."""
    found = status.get("teacher_metrics") or {}
    if "val/miou" not in found:
        return []
    without = found.get("val/miou_no_label")
    without = f", {without:.2f} % without them" if without is not None else ""
    text = f"mIoU of the teacher that this run trained: {found['val/miou']:.2f} % while it sees the labels{without}."
    return [("privileged", f"{text} It is no model to use, so it stands in no table.")]


def _model_row(row: Mapping[str, Any], *, note: str, latency_ms: Mapping[str, float] | None = None) -> ModelRow:
    measured = {"torch": row["latency_ms"], **(latency_ms or {})}
    return ModelRow(name=row["model"], note=note, **{**_known(ModelRow, row), "latency_ms": measured})


def _known(kind: type, row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name in kind.__dataclass_fields__}  # type: ignore[attr-defined]


def _of_role(rows: list[dict[str, Any]], role: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["role"] == role]


def _baseline(run: str, work: Work) -> tuple[list[dict[str, Any]], Evaluations]:
    """Return the row of another run's network, and its answers."""
    found = _read_json(Path(run) / "comparison.json")
    card = _read_json(Path(run) / "model" / "model.json") or {}
    if found is None or work_of(card.get("task", "classification")) is not work:
        wrong = "is not a finished run" if found is None else f"is a run of another task, {card.get('task')}"
        raise RequestError(f"--baseline {run} {wrong}.", hint="Give the directory of a run made by 'visionkd train'.")
    return found["rows"][:1], work.load(Path(run) / "evaluation.npz")


def _curves(run: Path) -> Curves | None:
    file = run / "metrics.csv"
    return Curves.read(file) if file.is_file() else None


def _thumbnails(path: Path, evaluations: Evaluations, listener: Listener, classes: Sequence[str]) -> Any:
    """Return what gives the picture of an evaluated sample, None where the data is gone."""
    config = data_config(None, run=path)
    try:
        data = open_data(
            config.data.path, config=config.data, seed=config.data.split_seed, classes=lambda: classes, task=config.task
        )
        source = data.splits["val"]
    except (VisionKDError, KeyError) as error:
        listener.message(f"The report is without pictures: {error}", level="warning")
        return None

    def thumbnail(index: int) -> Image.Image:
        return source.load(int(evaluations.indices[index]))

    return thumbnail


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
