"""Synthetic but realistic runs for the report's tests."""

from __future__ import annotations

import numpy as np
from PIL import Image

from visionkd.report.data import Curves, Evaluation, ExportRow, ModelRow, ReportData


def probs(
    targets: np.ndarray, num_classes: int, *, skill: float, seed: int, shared: np.ndarray | None = None
) -> np.ndarray:
    """Return N x C softmax outputs; more ``skill`` is more accurate, ``shared`` logits make two networks agree."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(targets), num_classes)).astype(np.float32)
    if shared is not None:
        logits = 0.6 * logits + 0.8 * shared
    logits[np.arange(len(targets)), targets] += skill
    logits[np.arange(len(targets)), (targets * 7 + 3) % num_classes] += 0.8  # each class has its favourite mistake
    logits *= 1.6
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def evaluation(
    num_samples: int = 60, num_classes: int = 5, *, teacher: bool = True, baseline: bool = True
) -> Evaluation:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, num_classes, num_samples)
    shared = rng.normal(size=(num_samples, num_classes)).astype(np.float32)
    skill = 2.2 + 0.25 * np.log(num_classes)
    return Evaluation(
        targets=targets,
        student_probs=probs(targets, num_classes, skill=skill, seed=1, shared=shared),
        teacher_probs=probs(targets, num_classes, skill=skill + 0.8, seed=2, shared=shared) if teacher else None,
        baseline_probs=probs(targets, num_classes, skill=skill - 0.2, seed=3) if baseline else None,
        names=tuple(f"val/{target}/img_{index:05d}.jpg" for index, target in enumerate(targets)),
    )


def curves(epochs: int = 12, *, rows_per_epoch: int = 4, offset: float = 0.0, distilled: bool = True) -> Curves:
    """Training curves as ``metrics.csv`` holds them, blanks included."""
    rng = np.random.default_rng(4)
    rows = []
    for epoch in range(1, epochs + 1):
        for part in range(1, rows_per_epoch + 1):
            time = epoch - 1 + part / rows_per_epoch
            loss = 2.2 * np.exp(-time / 5) + 0.35 + 0.05 * rng.normal()
            row = {
                "epoch": epoch,
                "step": int(100 * time),
                "split": "train",
                "loss": f"{loss:.4f}",
                "top1": "",
                "lr": f"{0.05 * (1 + np.cos(np.pi * time / epochs)):.6f}",
                "images_per_s": f"{1500 + 20 * rng.normal():.1f}",
            }
            if distilled:
                row |= {"kd_loss": f"{2.4 * loss:.4f}", "task_loss": f"{0.9 * loss:.4f}"}
            if part == rows_per_epoch:
                row["top1"] = f"{90 - 62 * np.exp(-time / 4) - offset + 0.6 * rng.normal():.2f}"
            rows.append(row)
        rows.append(
            {
                "epoch": epoch,
                "step": 100 * epoch,
                "split": "val",
                "loss": f"{1.9 * np.exp(-epoch / 4) + 0.42 + 0.06 * offset:.4f}",
                "top1": f"{87 - 60 * np.exp(-epoch / 3.5) - offset + 0.8 * rng.normal():.2f}",
            }
        )
    return Curves.from_rows(rows)


def picture(index: int) -> Image.Image:
    pixels = np.random.default_rng(index).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def distilled_run(num_samples: int = 60, num_classes: int = 5, **changes: object) -> ReportData:
    """A distillation with teacher, baseline and everything else."""
    values: dict = {
        "title": "cifar_resnet20 distilled from cifar_resnet56",
        "run": "cifar10-kd-r56-r20",
        "created": "2026-03-02 14:05",
        "command": "visionkd distill --teacher cifar_resnet56 --student cifar_resnet20 --data cifar10 --epochs 12",
        "student": ModelRow(
            "cifar_resnet20", params_m=0.272, macs_g=0.041, size_mb=1.09, latency_ms={"torch": 2.1, "onnxruntime": 0.62}
        ),
        "teachers": (
            ModelRow(
                "cifar_resnet56",
                params_m=0.856,
                macs_g=0.127,
                size_mb=3.44,
                latency_ms={"torch": 6.3, "onnxruntime": 2.4},
                note="probe on frozen features",
            ),
        ),
        "baseline": ModelRow("cifar_resnet20", params_m=0.272, macs_g=0.041, size_mb=1.09, latency_ms={"torch": 2.1}),
        "data": "cifar10",
        "method": "kd",
        "options": {"temperature": 4.0, "hard_labels": False, "weights": {"task": 0.1, "distill": 0.9}},
        "curves": curves(),
        "baseline_curves": curves(offset=1.5, distilled=False),
        "classes": tuple(f"class_{index}" for index in range(num_classes)),
        "evaluation": evaluation(num_samples, num_classes),
        "thumbnail": picture,
        "environment": {
            "python": "3.12.4",
            "versions": {"torch": "2.14.1", "timm": "1.0.31"},
            "devices": ["cpu"],
            "commit": None,
        },
        "config": "training:\n  epochs: 12\n  seed: 0\n",
        "messages": (
            ("info", "no val split: validating on test"),
            ("warning", "3 of 50000 images cannot be read and are skipped"),
        ),
        "preflight": (
            ("ok", "the teacher's 10 classes are the data's"),
            ("warning", "accuracy on 4 batches is 71.2 %"),
        ),
        "exports": (ExportRow("export/model.onnx", "onnx", 1.12, 3.4e-6, 87.11, 87.11, 256),),
        "skipped": (("train/cat/broken.jpg", "truncated file"),),
    }
    return ReportData(**(values | changes))


def supervised_run(num_samples: int = 60, num_classes: int = 5, **changes: object) -> ReportData:
    """A ``visionkd train`` run: one network, no teacher."""
    values: dict = {
        "title": "cifar_resnet20 on cifar10",
        "student": ModelRow("cifar_resnet20", params_m=0.272),
        "teachers": (),
        "baseline": None,
        "method": "",
        "options": {},
        "preflight": (),
        "baseline_curves": None,
        "curves": curves(distilled=False),
        "evaluation": evaluation(num_samples, num_classes, teacher=False, baseline=False),
    }
    return distilled_run(num_samples, num_classes, **(values | changes))
