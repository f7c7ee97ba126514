"""Find the ranges of a network's activations on images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from visionkd.errors import DataError
from visionkd.models.modes import evaluating
from visionkd.models.network import Network
from visionkd.quantization.insert import Int8Scheme, activation_quantizers, freeze, set_mode
from visionkd.quantization.ranges import HistogramObserver, MaxObserver, range_of

#: Fewer images are refused, as their ranges say little about the next image.
MIN_IMAGES = 16
#: As many as NVIDIA's examples take.
USUAL_IMAGES = 512


@dataclass(frozen=True)
class Calibration:
    """What a calibration found.

    Attributes:
        images: Number of images.
        ranges: Largest magnitude that is kept, by quantiser.
        largest: Largest magnitude seen, by quantiser.
    """

    images: int
    ranges: dict[str, float]
    largest: dict[str, float]


@torch.no_grad()
def calibrate(
    network: Network,
    batches: Iterable[Tensor],
    *,
    min_images: int = MIN_IMAGES,
    on_batch: Callable[[int], object] | None = None,
) -> Calibration:
    """Set all scales of a quantised network, in place, and switch its quantisers on.

    The network runs in eval mode and in float.

    Args:
        network: From ``quantize_network``; its scheme says how ranges are chosen.
        batches: Images in [0, 1], B x 3 x H x W each.
        min_images: Fewer are refused.
        on_batch: Is told the number of images so far.

    Raises:
        DataError: If there are too few images, all are alike, or a range is zero, infinite or no number.
    """
    scheme = Int8Scheme.from_dict(network.quantization["scheme"])
    quantizers = activation_quantizers(network)
    observers = {name: MaxObserver() if scheme.calibration == "max" else HistogramObserver() for name in quantizers}
    for name, quantizer in quantizers.items():
        quantizer.observer = observers[name]
    device = next(network.net.parameters()).device
    images, alike = 0, _Alike()
    try:
        set_mode(network, "observe")
        with evaluating(network):
            for batch in batches:
                alike.see(batch)
                network(batch.to(device))
                images += len(batch)
                if on_batch is not None:
                    on_batch(images)
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None
        set_mode(network, "quantize")
    if images < min_images:
        raise DataError(
            f"{images} image{'s' if images != 1 else ''} for calibration, and at least {min_images} are needed",
            hint=f"Give more images like those of the device; {USUAL_IMAGES} are usual.",
        )
    if alike:
        raise DataError(
            f"All {images} images for calibration are the same: the ranges would hold for this one only",
            hint="Give different images, like those that the device will see.",
        )
    ranges = {name: range_of(seen, scheme.calibration, scheme.percentile) for name, seen in observers.items()}
    _refuse_unusable(ranges, observers)
    for name, amax in ranges.items():
        quantizers[name].set_amax(amax)
    freeze(network)
    return Calibration(images, ranges, {name: seen.amax for name, seen in observers.items()})


def _refuse_unusable(ranges: dict[str, float], observers: dict[str, MaxObserver | HistogramObserver]) -> None:
    for name, amax in ranges.items():
        if not math.isfinite(observers[name].amax):
            raise DataError(
                f"The input of '{name}' is not finite on the calibration images",
                hint="The network itself overflows; evaluate the float model first.",
            )
        if not amax > 0.0 or amax / 127.0 < torch.finfo(torch.float32).tiny:
            raise DataError(
                f"The input of '{name}' is zero on all calibration images, which gives no range",
                hint="Give images like those that the network was trained on, or leave the layer in float:"
                f" -o scheme.skip=[{name}]",
            )


class _Alike:
    """Whether all images seen are the same."""

    def __init__(self) -> None:
        self._first: Tensor | None = None
        self._differ = False

    def see(self, batch: Tensor) -> None:
        if self._first is None and len(batch):
            self._first = batch[0]
        if not self._differ and self._first is not None:
            same = batch.shape[1:] == self._first.shape and bool((batch == self._first).all())
            self._differ = not same

    def __bool__(self) -> bool:
        return not self._differ
