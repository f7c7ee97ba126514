"""A zoo card as tables."""

from __future__ import annotations

from typing import Any

from visionkd.cli import console


def show_card(card: Any) -> None:
    """Print a card: what it is, what it is good and bad for, its forms, what was measured and timed."""
    console.show_fields({key: value for key, value in _fields(card).items() if value is not None})
    for title, texts in (("Good for", card.good_for), ("Bad for", card.bad_for), ("Notes", card.notes)):
        if texts:
            console.write(f"\n{title}:")
            for text in texts:
                console.write(f"  - {text}")
    for rows in (_forms(card), _measured(card), _timed(card)):
        if rows:
            console.write()
            console.show_table(rows)


def _fields(card: Any) -> dict[str, Any]:
    return {
        "name": card.name,
        "title": card.title,
        "task": card.task,
        "origin": card.origin,
        "publisher": card.publisher,
        "url": card.url,
        "paper": card.paper,
        "licence": card.licence + (f" ({card.licence_note})" if card.licence_note else ""),
        "trained on": card.data,
        "method": card.training.method,
        "teacher": card.training.teacher,
        "classes": card.num_classes,
        "architecture": f"{card.architecture.name} ({card.architecture.library})",
        "input": _input(card.preprocessing),
        "params_m": card.params_m,
        "macs_g": card.macs_g,
        "made by": card.training.command,
        "commit": card.training.commit,
    }


def _input(spec: Any) -> str:
    height, width = spec.img_size
    mean, std = ("/".join(f"{value:.3f}" for value in values) for values in (spec.mean, spec.std))
    return f"{height} x {width}, {spec.interpolation}, crop {spec.crop_pct:g}, mean {mean}, std {std}"


def _forms(card: Any) -> list[dict[str, Any]]:
    rows = []
    for number, (name, form) in enumerate(card.artifacts.items()):
        size, target = card.size_bytes(name), getattr(form, "target", None)
        precision = getattr(form, "precision", "float32")
        rows.append(
            {
                "model": f"zoo:{card.name}" + (f"@{name}" if number else ""),
                "format": form.format,
                "precision": f"{precision} ({target})" if target else precision,
                "size_mb": size / 1e6 if size is not None else None,
                "from": getattr(form, "model", None) or ", ".join(file.name for file in form.files),
            }
        )
    return rows


def _measured(card: Any) -> list[dict[str, Any]]:
    return [
        {
            "form": row.artifact,
            "data": row.data,
            "split": row.split,
            "images": row.images,
            **row.values,
            "measured": "here" if row.by == "here" else "by its publisher",
            "how": row.how,
        }
        for row in card.metrics
    ]


def _timed(card: Any) -> list[dict[str, Any]]:
    return [
        {
            "form": row.artifact,
            "backend": row.backend,
            "device": row.device,
            "threads": row.threads,
            "batch_size": row.batch_size,
            "latency_ms": row.latency_ms,
        }
        for row in card.latencies
    ]
