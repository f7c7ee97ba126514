"""An exported file against PyTorch: element by element, and by accuracy."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visionkd.errors import WorkError
from visionkd.export.accuracy import Truth
from visionkd.export.answers import answers, difference, in_file_form
from visionkd.export.differences import Differences, paired
from visionkd.export.onnx import portable, unit
from visionkd.models.factory import Network
from visionkd.runtime.ort import OrtModel
from visionkd.runtime.session import Session

#: Largest difference between two logits, as a share of the largest logit. Float rounding stays below 1e-5; a graph that
#: computes something else is above 1e-2.
TOLERANCE = 1e-3
#: Largest loss of accuracy, in points.
MAX_DROP = 1.0
_SINGLES = 4
# Of the distance that quantisation itself has moved the logits. A file that does not quantise at all is at 1.
_SIGNED_SHARE, _ROUNDED_SHARE = 0.5, 2.0
# Of the distance between PyTorch in float32 and in float64, which is nothing but values on a tie.
_NOISE_SHARE, _NOISE_IMAGES, _NOISE_BATCH = 2.0, 16, 4
# Of white: where an image has one colour, as beside a picture, all anchors are equally sure, and a rounding proposes.
_GRAIN = 0.05
# Of the largest objectness, or of 1: as far as sums of float32 in another order are from one another, and sigmoids.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Verification:
    """How an exported file compares with PyTorch on the same images.

    Attributes:
        num_images: Images compared.
        max_abs_diff: Largest difference between two logits; of a detector between two scores, from 0 to 1.
        relative_diff: The same as a share of the largest logit; of a detector as a share of the largest score, or that
            of a side of a box as a share of the input's, if it is larger.
        rms_diff: Root mean square of the differences as a share of that of the logits, or of scores or boxes.
        agreement: Percent of images, pixels or candidates above the threshold with the same class.
        metric: Name of the accuracy, such as ``top1``; None without right answers.
        torch: Accuracy of the network in percent.
        exported: Accuracy of the file in percent.
        batch_sizes: Batch sizes that were run.
    """

    num_images: int
    max_abs_diff: float
    relative_diff: float
    rms_diff: float
    agreement: float
    metric: str | None
    torch: float | None
    exported: float | None
    batch_sizes: tuple[int, ...]


def verify_onnx(
    network: Network,
    path: str | os.PathLike[str],
    images: Tensor | np.ndarray,
    truth: Truth | None = None,
    *,
    batch_size: int = 16,
    tolerance: float = TOLERANCE,
    max_drop: float = MAX_DROP,
) -> Verification:
    """Compare the file with ``network`` at batch size 1 and above; remove the file if they differ.

    Of a detector of two stages the values are compared on images with some noise, proposal by proposal, as
    :func:`visionkd.export.differences.paired` brings them together, and the accuracy on the images themselves. They
    may be twice as far apart as PyTorch is from itself where its objectness moves by a rounding: a network that has
    learnt nothing finds all anchors equally sure.

    Args:
        network: The network that the file was exported from.
        path: The file.
        images: N x 3 x H x W with the network's H and W: uint8, or float in [0, 1].
        truth: Right answers about them, for the accuracy of both.
        batch_size: Batch size above 1.
        tolerance: Largest ``relative_diff``.
        max_drop: Largest loss of accuracy, in points.

    Raises:
        WorkError: If a limit is passed, after the file was removed.
    """
    try:
        found = _compare(portable(network), path, images, truth, batch_size)
        if not found.relative_diff <= tolerance and network.task == "detection" and network.two_stage:
            tolerance = max(tolerance, _NOISE_SHARE * undecided(network, torch.as_tensor(images)[:_NOISE_IMAGES]))
        _judge(found, network.architecture, tolerance, max_drop, truth)
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise
    return found


def _compare(
    network: Network,
    path: str | os.PathLike[str],
    images: Tensor | np.ndarray,
    truth: Truth | None,
    batch_size: int,
    optimize: bool = True,
) -> Verification:
    images = torch.as_tensor(images)
    if images.ndim != 4 or len(images) == 0 or tuple(images.shape[-2:]) != tuple(network.input.img_size):
        raise ValueError(f"images N x 3 x {network.input.img_size} expected, got {tuple(images.shape)}")
    session = Session(OrtModel(path, optimize=optimize))
    if session.input != network.input:
        raise WorkError(f"the file describes another input ({session.input}) than the network's ({network.input})")
    singles = list(images[:_SINGLES].split(1))
    # A batch of one first, then full ones, and a last one that is smaller: three sizes where there are enough images.
    chunks = [*singles, *images.split(max(2, batch_size))]
    seen = Differences(session.rule)
    two_stage = network.task == "detection" and network.two_stage
    tallies = None if truth is None else (truth.tally(), truth.tally())
    for number, chunk in enumerate(chunks):
        repeated = number >= len(singles) and len(images) == 1
        batch = unit(chunk.repeat(2, 1, 1, 1) if repeated else chunk)
        given, expected = _both(network, session, _grained(batch, number) if two_stage else batch)
        compared = paired(given, expected, session.rule) if two_stage else (given, expected)
        seen.add(*compared, averaged=number >= len(singles))
        if tallies is not None and number >= len(singles):
            if two_stage:
                given, expected = _both(network, session, batch)
            for tally, logits in zip(tallies, (expected, given), strict=True):
                tally.add(logits[: len(chunk)])
    sizes = {len(chunk) for chunk in chunks} | ({2} if len(images) == 1 else set())
    return Verification(
        num_images=len(images),
        max_abs_diff=seen.largest,
        relative_diff=seen.relative,
        rms_diff=seen.rms,
        agreement=seen.agreement,
        metric=None if truth is None else truth.metric,
        torch=None if tallies is None else tallies[0].percent(),
        exported=None if tallies is None else tallies[1].percent(),
        batch_sizes=tuple(sorted(sizes)),
    )


def _both(network: Network, session: Session, batch: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return what the file and the network say of a batch."""
    with torch.inference_mode():
        expected = in_file_form(network, answers(network, batch)).numpy()
    given = session.answers(batch.numpy())
    if given.shape != expected.shape:
        raise WorkError(f"the file answers with {given.shape} where the network answers with {expected.shape}")
    return given, expected


@torch.inference_mode()
def undecided(network: Network, images: Tensor) -> float:
    """Return how far the answers of a detector of two stages move where its objectness moves by a rounding.

    Args:
        network: The detector.
        images: N x 3 x H x W, in [0, 1] or uint8.
    """
    plain, generator = portable(network), torch.Generator().manual_seed(0)
    seen = Differences(plain.rule())

    def shake(_: Any, given: Any, answer: Any) -> Any:
        logits, codes = answer
        largest = max(1.0, *(float(each.abs().max()) for each in logits))
        noise = (torch.randn(each.shape, generator=generator) for each in logits)
        return [each + _ROUNDING * largest * own for each, own in zip(logits, noise, strict=True)], codes

    for number, chunk in enumerate(images.split(_NOISE_BATCH)):
        batch = _grained(unit(chunk), number)
        expected = answers(plain, batch).numpy()
        handle = plain.net.rpn.head.register_forward_hook(shake)
        moved = answers(plain, batch).numpy()
        handle.remove()
        seen.add(*paired(moved, expected, plain.rule()), averaged=False)
    return seen.relative


def _grained(batch: Tensor, seed: int) -> Tensor:
    noise = torch.rand(batch.shape, generator=torch.Generator().manual_seed(seed))
    return (batch + _GRAIN * (2.0 * noise - 1.0)).clamp(0.0, 1.0)


def verify_int8(
    network: Network,
    path: str | os.PathLike[str],
    images: Tensor | np.ndarray,
    truth: Truth | None = None,
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
        truth: Right answers about them, for the accuracy of both.
        own_error: :func:`visionkd.export.answers.difference` of the network and its float twin.
        rounds_results: Whether the file rounds in more places than the network; it runs as on a device then, and
            node by node otherwise.
        batch_size: Batch size above 1.

    Raises:
        WorkError: If the file is further away.
    """
    found = _compare(portable(network), path, images, truth, batch_size, optimize=rounds_results)
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
    """Return how far a quantised network in float32 is from the same in float64, as :func:`difference`."""
    plain = portable(network)
    batches = [unit(batch) for batch in images.split(_NOISE_BATCH)]
    single = torch.cat([answers(plain, batch) for batch in batches])
    double = plain.double()
    return difference(plain, single, torch.cat([answers(double, batch.double()) for batch in batches]))


def _judge(found: Verification, architecture: str, tolerance: float, max_drop: float, truth: Truth | None) -> None:
    hint = "Report it with the name of the network and the versions from: visionkd doctor"
    where = f"on {found.num_images} images, so the file was removed"
    if not found.relative_diff <= tolerance:  # written so that NaN fails
        raise WorkError(
            f"the ONNX file of '{architecture}' differs from PyTorch by {found.max_abs_diff:.3g}, "
            f"{found.relative_diff:.2g} of the largest value ({tolerance:g} is allowed), {where}",
            hint=hint,
        )
    if truth is not None and found.exported < found.torch - max_drop:
        raise WorkError(
            f"the ONNX file of '{architecture}' loses {found.torch - found.exported:.2f} points of {truth.title} "
            f"({max_drop:g} are allowed) {where}",
            hint=hint,
        )
