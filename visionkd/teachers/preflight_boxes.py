"""Look at a detector before anything is trained with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from visionkd.errors import WorkError
from visionkd.models.network import Network
from visionkd.tasks.detection import DetectionTask
from visionkd.teachers.preflight import Finding, Preflight, describe_input

#: AP50 in percent below which a teacher has next to nothing to teach.
_LEAST_AP50 = 5.0


@torch.no_grad()
def preflight_boxes(
    teacher: Network,
    batches: Iterable[tuple[Tensor, Sequence[Mapping[str, Tensor]]]],
    *,
    num_classes: int,
    device: torch.device,
    name: str,
) -> Preflight:
    """Check mode, statistics, answers and AP50 on a few batches.

    Args:
        teacher: Detector to look at.
        batches: Letterboxed images in [0, 1], B x 3 x H x W, and their targets in pixels of the pictures.
        num_classes: Number of classes of the data.
        device: Where to run.
        name: What to call the teacher.

    Raises:
        WorkError: If its answers are not finite, or differ between two passes over the same images.
    """
    teacher.to(device).eval().requires_grad_(False)
    task = DetectionTask(num_classes=num_classes)
    metrics, count, boxes = task.metrics(), 0, 0
    for images, targets in batches:
        output = teacher(images.to(device))
        values = [torch.cat([each.boxes.flatten(), each.scores]) for each in output.boxes]
        if not all(bool(torch.isfinite(each).all()) for each in values):
            raise WorkError(
                f"{name} answers NaN or infinite values.",
                hint="Check its weights file; with 16-bit precision try -o teachers.0.precision=32.",
            )
        if not count:
            again = [torch.cat([each.boxes.flatten(), each.scores]) for each in teacher(images.to(device)).boxes]
            if not all(
                a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-2)
                for a, b in zip(values, again, strict=True)
            ):
                raise WorkError(
                    f"{name} answers the same images differently on each pass: it is not deterministic in eval mode."
                )
        if teacher.num_classes == num_classes:
            on_cpu = [{key: value.cpu() for key, value in target.items()} for target in targets]
            for each in output.boxes:
                each.boxes, each.scores, each.labels = each.boxes.cpu(), each.scores.cpu(), each.labels.cpu()
            task.update(metrics, output, on_cpu)
        boxes += sum(len(each.scores) for each in output.boxes)
        count += len(targets)
    if not count:
        raise WorkError(f"There are no images to look at {name} with.")
    findings = [
        Finding("ok", f"{name}: eval mode, frozen, sees {describe_input(teacher)}"),
        Finding("ok", f"{name}: finite answers for {teacher.num_classes} classes, {boxes / count:.1f} boxes an image"),
    ]
    if teacher.num_classes != num_classes:
        findings.append(Finding("warning", f"{name}: has {teacher.num_classes} classes, the data {num_classes}"))
        return Preflight(tuple(findings), None, count)
    ap50 = 100.0 * float(metrics.compute()["ap50"])
    if ap50 != ap50:
        findings.append(Finding("ok", f"{name}: the {count} images have no boxes, so its AP50 is not known"))
        return Preflight(tuple(findings), None, count)
    text = f"{name}: AP50 {ap50:.1f} % on {count} images"
    if ap50 >= _LEAST_AP50:
        findings.append(Finding("ok", text))
    else:
        advice = "it finds next to nothing here: it may not know these classes, or know them in another order"
        findings.append(Finding("warning", f"{text}: {advice}"))
    return Preflight(tuple(findings), None, count)
