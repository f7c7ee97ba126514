"""FKD: the short forms of a soft label, what is recovered from them, and the student's loss on it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from _reference.base import Case, Check, Comparison
from visionkd.data.transforms import RESAMPLING, pixel_box, resized_crop
from visionkd.losses.distillation import average_probabilities, soft_cross_entropy
from visionkd.losses.label_storage import Rest, recover_labels, top_k_labels

_FULL = ("ori", "full")


def _form(label_type: str, stored: Tensor, num_classes: int) -> tuple[int, Rest]:
    """Number of stored classes and what becomes of the others, for one of FKD's label types."""
    if label_type in _FULL:
        return num_classes, "uniform"
    if label_type in ("hard", "smoothing"):
        return 1, "renormalize" if label_type == "hard" else "uniform"
    match = re.fullmatch(r"marginal_(smoothing|renorm)(?:_k\d+)?", label_type)
    if match is None:
        raise ValueError(f"unknown label type '{label_type}'")
    return stored.shape[2], "uniform" if match[1] == "smoothing" else "renormalize"


def _ours(label_type: str, probs: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """Our short form in the layout of the reference: indices and probabilities in one array."""
    if label_type in _FULL:
        return probs
    if label_type == "hard":
        return indices[:, 0]
    pair = torch.stack([indices.float(), values], dim=1)
    return pair[:, :, 0] if label_type == "smoothing" else pair


def _split(label_type: str, stored: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and probabilities, B x k each, of a stored label of the reference."""
    if label_type in _FULL:
        return torch.arange(stored.shape[1]).expand(len(stored), -1), stored
    if label_type == "hard":
        return stored[:, None], torch.ones(len(stored), 1)
    pair = stored[:, :, None] if label_type == "smoothing" else stored
    return pair[:, 0].long(), pair[:, 1]


def _labels(case: Case) -> Iterator[Comparison]:
    stored, num_classes = case.tensor("stored_label"), int(case.hyper["classes"])
    label_type = case.hyper["training_label_type"]
    k, rest = _form(label_type, stored, num_classes)
    probs = average_probabilities([case.tensor("teacher_logits")], temperature=case.hyper["generation_temperature"])
    ours = _ours(label_type, probs, *top_k_labels(probs, k)[:2]).to(stored.dtype)
    yield Comparison("stored_label", ours, case.arrays["stored_label"])

    # The released recovery keeps a rest mass that half precision made negative; ours takes it as 0 and rescales.
    indices, values = _split(label_type, stored)
    released = recover_labels(indices, values, num_classes=num_classes, rest=rest, clamp_rest=False)
    labels = recover_labels(indices, values, num_classes=num_classes, rest=rest)
    usual = (values.float().sum(1) <= 1.0) | (rest == "renormalize")
    yield Comparison("recovered_label", released, case.arrays["recovered_label"])
    yield Comparison("recovered_row_sum", released.sum(1), case.arrays["recovered_row_sum"])
    yield Comparison("clamped label", labels[usual], case.arrays["recovered_label"][usual.numpy()])
    yield Comparison("clamped row sum", labels.sum(1), np.ones(len(labels), np.float32))
    yield Comparison("clamped minimum", labels.clamp_max(0.0), np.zeros(labels.shape, np.float32), rtol=0.0, atol=0.0)

    student = case.tensor("student_logits", requires_grad=True)
    temperature = case.hyper["student_temperature"]
    loss = soft_cross_entropy(student_logits=student, teacher_probs=released, temperature=temperature)
    loss.backward()
    yield Comparison("loss", loss, case.arrays["loss"])
    yield Comparison("grad_student_logits", student.grad, case.arrays["grad_student_logits"])


def _replay(case: Case) -> Iterator[Comparison]:
    image = Image.fromarray(case.arrays["image_uint8"])
    side = int(case.hyper["student_size"])
    boxes, views = [], []
    for fractions, flip in zip(case.arrays["coords_top_left_height_width_fraction"], case.arrays["flip"], strict=True):
        left, top, width, height = pixel_box(tuple(map(float, fractions)), height=image.height, width=image.width)
        boxes.append((top, left, height, width))
        view = resized_crop(image, (left, top, width, height), img_size=(side, side), resample=RESAMPLING["bilinear"])
        views.append(np.asarray(view)[:, ::-1] if flip else np.asarray(view))
    expected = case.arrays["student_view_uint8"].astype(np.float32)
    yield Comparison("boxes in pixels", np.array(boxes), case.arrays["crop_pixels_top_left_height_width"])
    yield Comparison("student views, grey levels", np.stack(views).astype(np.float32), expected, rtol=0.0, atol=1.0)


CHECKS = [
    Check("FKD replay", lambda case: case.has("image_uint8", "student_view_uint8"), _replay),
    Check("FKD labels", lambda case: case.has("teacher_logits", "stored_label", "recovered_label"), _labels),
]
