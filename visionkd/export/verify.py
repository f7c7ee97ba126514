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
# Of the distance that quantisation itself has moved the logits. A file that does not quantise at all is at 1.
_SIGNED_SHARE, _ROUNDED_SHARE = 0.5, 2.0
# Of the distance between PyTorch in float32 and in float64, which is nothing but values on a tie.
_NOISE_SHARE, _NOISE_IMAGES = 2.0, 16


@dataclass(frozen=True)
class Verification:
    """How an exported file compares with PyTorch on the same images.

    Attributes:
        num_images: Images compared.
        max_abs_diff: Largest difference between two logits.
        relative_diff: The same as a share of the largest logit.
        rms_diff: Root mean square of the differences as a share of that of the logits.
        agreement: Percent of images with the same top-1 class.
        top1_torch: Accuracy of the network in percent; None without targets.
        top1_exported: Accuracy of the file in percent; None without targets.
        batch_sizes: Batch sizes that were run.
    """

    num_images: int
    max_abs_diff: float
    relative_diff: float
    rms_diff: float
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
    optimize: bool = True,
) -> Verification:
    images = torch.as_tensor(images)
    if images.ndim != 4 or len(images) == 0 or tuple(images.shape[-2:]) != tuple(network.input.img_size):
        raise ValueError(f"images N x 3 x {network.input.img_size} expected, got {tuple(images.shape)}")
    session = Session(OrtModel(path, optimize=optimize))
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
        rms_diff=rms_difference(exported, reference),
        agreement=100.0 * float((reference.argmax(1) == exported.argmax(1)).mean()),
        top1_torch=top1[0],
        top1_exported=top1[1],
        batch_sizes=tuple(sorted({len(chunk) for chunk in chunks})),
    )


def verify_int8(
    network: Network,
    path: str | os.PathLike[str],
    images: Tensor | np.ndarray,
    targets: Tensor | np.ndarray | None = None,
    *,
    own_error: float,
    rounds_results: bool,
    batch_size: int = 16,
) -> Verification:
    """Compare an INT8 file with the fake-quantised ``network``; the file stays, whatever comes out.

    Deep quantised networks have no tolerance of 1e-5: a sum that differs in its last bit moves a value that lies on a
    tie by a whole step, which later layers carry on. What can be said is how far that is from the network in
    comparison with what quantisation itself has moved: half as far at most, for a file with the network's own
    roundings; twice as far, for a file that rounds biases and results too (``cpu``).

    Either way it may be twice as far as PyTorch in float64 is from PyTorch in float32.

    Args:
        network: The quantised network that the file was exported from.
        path: The file.
        images: N x 3 x H x W with the network's H and W: uint8, or float in [0, 1].
        targets: N class indices, for the accuracy of both.
        own_error: ``rms_difference`` of the network and its float twin.
        rounds_results: Whether the file rounds in more places than the network; it runs as on a device then, and
            node by node otherwise.
        batch_size: Batch size above 1.

    Raises:
        WorkError: If the file is further away.
    """
    found = _compare(portable(network), path, images, targets, batch_size, optimize=rounds_results)
    noise = tie_noise(network, torch.as_tensor(images)[:_NOISE_IMAGES])
    limit = max(TOLERANCE, own_error * (_ROUNDED_SHARE if rounds_results else _SIGNED_SHARE), _NOISE_SHARE * noise)
    if not found.rms_diff <= limit:  # written so that NaN fails
        raise WorkError(
            f"the INT8 file of '{network.architecture}' differs from PyTorch by {found.rms_diff:.2g} of the logits, and"
            f" {limit:.2g} is allowed (quantisation itself: {own_error:.2g}), on {found.num_images} images; no file"
            " was left",
            hint="Report it with the name of the network and the versions from: visionkd doctor",
        )
    return found


@torch.inference_mode()
def tie_noise(network: Network, images: Tensor) -> float:
    """Return how far a quantised network in float32 is from the same in float64, as :func:`rms_difference`."""
    plain = portable(network)
    batch = images.float().div(255.0) if images.dtype == torch.uint8 else images.float()
    single = plain(batch).logits.numpy()
    return rms_difference(single, plain.double()(batch.double()).logits.numpy())


def rms_difference(values: np.ndarray, reference: np.ndarray) -> float:
    """Return the root mean square of the differences as a share of that of ``reference``."""
    scale = float(np.sqrt(np.mean(np.square(reference, dtype=np.float64))))
    return float(np.sqrt(np.mean(np.square(np.subtract(values, reference, dtype=np.float64))))) / (scale or 1.0)


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
