"""Look at a teacher before anything is trained with it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from visionkd.errors import WorkError
from visionkd.models.factory import Network
from visionkd.types import IGNORE


@dataclass(frozen=True)
class Finding:
    """One thing seen about a teacher."""

    status: Literal["ok", "warning"]
    text: str


@dataclass(frozen=True)
class Preflight:
    """What was seen.

    Attributes:
        findings: In reading order.
        top1: Accuracy in percent on the images looked at, of a segmentation network on their pixels; None where they
            have no labels or other classes.
        num_images: Number of images looked at.
    """

    findings: tuple[Finding, ...]
    top1: float | None
    num_images: int


@torch.no_grad()
def preflight(
    teacher: Network, batches: Iterable[tuple[Tensor, Tensor]], *, num_classes: int, device: torch.device, name: str
) -> Preflight:
    """Check mode, statistics, classes, outputs and accuracy on a few batches.

    Args:
        teacher: Network to look at.
        batches: Images in [0, 1], B x 3 x H x W, and class indices, B; of a segmentation network B maps of them.
        num_classes: Number of classes of the data.
        device: Where to run.
        name: What to call the teacher.

    Raises:
        WorkError: If its outputs are not finite, or differ between two passes over the same images.
    """
    teacher.to(device).eval().requires_grad_(False)
    findings = [Finding("ok", f"{name}: eval mode, frozen, sees {describe_input(teacher)}")]
    right = count = labeled = 0
    share: list[Tensor] = []
    first: Tensor | None = None
    for images, targets in batches:
        logits = teacher(images.to(device)).logits.float()
        if not torch.isfinite(logits).all():
            raise WorkError(
                f"{name} answers NaN or infinite values.",
                hint="Check its weights file; with 16-bit precision try -o teachers.0.precision=32.",
            )
        if first is None:
            first = logits
            if not torch.allclose(first, teacher(images.to(device)).logits.float(), rtol=1e-3, atol=1e-3):
                raise WorkError(
                    f"{name} answers the same images differently on each pass: it is not deterministic in eval mode."
                )
        share.append(logits.softmax(1).amax(1).flatten().cpu())
        if logits.shape[1] == num_classes:
            hits, seen = _hits(logits.cpu(), targets)
            right, labeled = right + hits, labeled + seen
        count += len(targets)
    if first is None:
        raise WorkError(f"There are no images to look at {name} with.")
    confidence = float(torch.cat(share).mean())
    findings.append(
        Finding("ok", f"{name}: finite outputs for {first.shape[1]} classes, mean confidence {100 * confidence:.0f} %")
    )
    if first.shape[1] != num_classes:
        findings.append(Finding("warning", f"{name}: has {first.shape[1]} classes, the data {num_classes}"))
        return Preflight(tuple(findings), None, count)
    if not labeled:
        findings.append(Finding("ok", f"{name}: the images have no labels, so its accuracy is not known"))
        return Preflight(tuple(findings), None, count)
    top1, chance = 100.0 * right / labeled, 1.0 / num_classes
    dense = first.dim() == 4
    # the pixels of an image are of one mind, so it is the images that count
    bound = 100.0 * (chance + 2.0 * math.sqrt(chance * (1.0 - chance) / (count if dense else labeled)))
    what = f"of the pixels right on {count} images" if dense else f"top-1 on {labeled} images"
    text = f"{name}: {top1:.1f} % {what} (chance: {100 * chance:.1f} %)"
    if top1 > bound:
        findings.append(Finding("ok", text))
    else:
        advice = "not clearly above chance: it may not know these classes, or know them in another order"
        findings.append(Finding("warning", f"{text}: {advice}"))
    return Preflight(tuple(findings), top1, count)


def _hits(logits: Tensor, targets: Tensor | Sequence[Tensor]) -> tuple[int, int]:
    """Return how many of the labels are answered rightly, and how many there are."""
    if logits.dim() == 2:
        assert isinstance(targets, Tensor)
        return int((logits.argmax(1) == targets).sum()), int((targets >= 0).sum())
    right = labeled = 0
    for values, target in zip(logits, targets, strict=True):
        given = F.interpolate(values[None], size=target.shape, mode="bilinear", align_corners=False)[0].argmax(0)
        right += int(((given == target) & (target != IGNORE)).sum())
        labeled += int((target != IGNORE).sum())
    return right, labeled


def describe_input(teacher: Network) -> str:
    """Say what a network is shown."""
    spec = teacher.input
    mean, std = (" ".join(f"{value:.3f}" for value in values) for values in (spec.mean, spec.std))
    return f"{spec.img_size[0]} x {spec.img_size[1]} pixels, mean {mean}, std {std}"
