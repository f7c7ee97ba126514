"""An exported file against PyTorch: element by element, and by accuracy."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from visionkd.errors import WorkError
from visionkd.export.onnx import portable
from visionkd.models.factory import Network
from visionkd.runtime.metrics import top_k_accuracy
from visionkd.runtime.ort import OrtModel
from visionkd.runtime.session import Session

#: Largest difference between two logits, as a share of the largest logit. Float rounding stays below 1e-5; a graph that
#: computes something else is above 1e-2.
TOLERANCE = 1e-3
#: Largest loss of top-1, in points.
MAX_DROP = 1.0
_SINGLES = 4


@dataclass(frozen=True)
class Verification:
    """How an exported file compares with PyTorch on the same images.

    Attributes:
        num_images: Images compared.
        max_abs_diff: Largest difference between two logits.
        relative_diff: The same as a share of the largest logit.
        agreement: Percent of images with the same top-1 class.
        top1_torch: Accuracy of the network in percent; None without targets.
        top1_exported: Accuracy of the file in percent; None without targets.
        batch_sizes: Batch sizes that were run.
    """

    num_images: int
    max_abs_diff: float
    relative_diff: float
    agreement: float
    top1_torch: float | None
    top1_exported: float | None
    batch_sizes: tuple[int, ...]


def verify_onnx(
    network: Network,
    path: str | os.PathLike[str],
    images: Tensor | np.ndarray,
    targets: Tensor | np.ndarray | None = None,
    *,
    batch_size: int = 16,
    tolerance: float = TOLERANCE,
    max_drop: float = MAX_DROP,
) -> Verification:
    """Compare the file with ``network`` at batch size 1 and above; remove the file if they differ.

    Args:
        network: The network that the file was exported from.
        path: The file.
        images: N x 3 x H x W with the network's H and W: uint8, or float in [0, 1].
        targets: N class indices, for the accuracy of both.
        batch_size: Batch size above 1.
        tolerance: Largest ``relative_diff``.
        max_drop: Largest loss of top-1, in points.

    Raises:
        WorkError: If a limit is passed, after the file was removed.
    """
    try:
        found = _compare(portable(network), path, images, targets, batch_size)
        _judge(found, network.architecture, tolerance, max_drop)
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise
    return found


def _compare(
    network: Network,
    path: str | os.PathLike[str],
    images: Tensor | np.ndarray,
    targets: Tensor | np.ndarray | None,
    batch_size: int,
) -> Verification:
    images = torch.as_tensor(images)
    if images.ndim != 4 or len(images) == 0 or tuple(images.shape[-2:]) != tuple(network.input.img_size):
        raise ValueError(f"images N x 3 x {network.input.img_size} expected, got {tuple(images.shape)}")
    session = Session(OrtModel(path))
    if session.input != network.input:
        raise WorkError(f"the file describes another input ({session.input}) than the network's ({network.input})")
    # A batch of one first, then full ones, and a last one that is smaller: three sizes where there are enough images.
    chunks = [images[i : i + 1] for i in range(min(_SINGLES, len(images)))]
    singles = len(chunks)
    chunks += list(images.split(max(2, batch_size)))
    if len(images) == 1:
        chunks[-1] = images.repeat(2, 1, 1, 1)
    expected, given = [], []
    for chunk in chunks:
        batch = chunk.float().div(255.0) if chunk.dtype == torch.uint8 else chunk.float()
        with torch.inference_mode():
            expected.append(network(batch).logits.numpy())
        given.append(session.predict_logits(batch.numpy()))
        if given[-1].shape != expected[-1].shape:
            raise WorkError(
                f"the file answers with {given[-1].shape} where the network answers with {expected[-1].shape}"
            )
    diffs = [np.abs(a - b).max() for a, b in zip(expected, given, strict=True)]
    scale = max(float(np.abs(logits).max()) for logits in expected)
    max_abs = float(np.max(diffs))  # NaN, if any, wins
    reference, exported = np.concatenate(expected[singles:]), np.concatenate(given[singles:])
    top1 = (None, None)
    if targets is not None:
        labels = np.asarray(targets)
        labels = np.repeat(labels, 2) if len(images) == 1 else labels
        top1 = (top_k_accuracy(reference, labels, 1), top_k_accuracy(exported, labels, 1))
    return Verification(
        num_images=len(images),
        max_abs_diff=max_abs,
        relative_diff=max_abs / scale if scale > 0 else max_abs,
        agreement=100.0 * float((reference.argmax(1) == exported.argmax(1)).mean()),
        top1_torch=top1[0],
        top1_exported=top1[1],
        batch_sizes=tuple(sorted({len(chunk) for chunk in chunks})),
    )


def _judge(found: Verification, architecture: str, tolerance: float, max_drop: float) -> None:
    hint = "Report it with the name of the network and the versions from: visionkd doctor"
    where = f"on {found.num_images} images, so the file was removed"
    if not found.relative_diff <= tolerance:  # written so that NaN fails
        raise WorkError(
            f"the ONNX file of '{architecture}' differs from PyTorch by {found.max_abs_diff:.3g}, "
            f"{found.relative_diff:.2g} of the largest logit ({tolerance:g} is allowed), {where}",
            hint=hint,
        )
    if found.top1_torch is not None and found.top1_exported < found.top1_torch - max_drop:
        raise WorkError(
            f"the ONNX file of '{architecture}' loses {found.top1_torch - found.top1_exported:.2f} points of top-1 "
            f"({max_drop:g} are allowed) {where}",
            hint=hint,
        )
