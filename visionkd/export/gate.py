"""The gate: INT8 that loses too much, or gains no time, is repaired or refused, with the guilty layers named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visionkd.errors import WorkError
from visionkd.export.accuracy import Truth, score
from visionkd.export.answers import answers, divergence, in_file_form
from visionkd.export.onnx import unit
from visionkd.models.modes import evaluating
from visionkd.models.network import Network
from visionkd.quantization.insert import activation_quantizers, int8_layers, leave_float, set_mode

#: Largest loss of accuracy against the float twin, in points.
MAX_DROP = 1.0
#: Least ratio of the float twin's time to the INT8 file's.
MIN_SPEEDUP = 1.0
_BATCH, _DENSE_BATCH = 32, 4
_MOST_FLOAT = 0.5


class Refused(WorkError):
    """An INT8 file loses too much or gains no time, and was not written."""


@dataclass(frozen=True)
class LayerSensitivity:
    """What a layer costs when it alone is in INT8.

    Attributes:
        name: The layer.
        divergence: As :func:`visionkd.export.answers.divergence` measures it.
    """

    name: str
    divergence: float


@torch.inference_mode()
def logits_of(network: Network, images: Tensor) -> Tensor:
    """Return the logits for ``images``, N x 3 x H x W uint8 or in [0, 1], in eval mode.

    Returns:
        N x C; for segmentation N x C x h x w at the network's own stride, which is what fits into memory; of a detector
        its candidates, N x M x (4 + C).
    """
    device = next(network.net.parameters()).device
    size = _BATCH if network.task == "classification" else _DENSE_BATCH
    with evaluating(network):
        return torch.cat([answers(network, unit(batch).to(device)).float().cpu() for batch in images.split(size)])


@torch.inference_mode()
def accuracy(network: Network, logits: Tensor, truth: Truth) -> float:
    """Return the accuracy in percent of logits from :func:`logits_of`, brought into the form that a file gives."""
    batches = logits.split(_BATCH if logits.ndim == 2 else _DENSE_BATCH)
    return score(truth, (in_file_form(network, batch).numpy() for batch in batches))


@torch.inference_mode()
def sensitivity(
    network: Network,
    images: Tensor,
    *,
    reference: Tensor | None = None,
    on_layer: Callable[[int, int], object] | None = None,
) -> tuple[LayerSensitivity, ...]:
    """Measure each INT8 layer by quantising its weight and its input, and nothing else.

    Args:
        network: Quantised and calibrated; its quantisers are all on afterwards.
        images: N x 3 x H x W; labels are not needed.
        reference: Logits of the teacher on them, as ``logits_of`` gives them; None takes the network's in float.
        on_layer: Is told the layers done and their number.

    Returns:
        The layers, the worst first.
    """
    layers, quantizers, inputs = int8_layers(network), activation_quantizers(network), _inputs(network)
    found = []
    try:
        set_mode(network, "off")
        target = logits_of(network, images) if reference is None else reference.float().cpu()
        for done, (name, layer) in enumerate(layers.items(), 1):
            layer.weight_quantizer.enabled = True
            for used in inputs.get(name, ()):
                quantizers[used].mode = "quantize"
            found.append(LayerSensitivity(name, divergence(network, logits_of(network, images), target)))
            layer.weight_quantizer.enabled = False
            for used in inputs.get(name, ()):
                quantizers[used].mode = "off"
            if on_layer is not None:
                on_layer(done, len(layers))
    finally:
        set_mode(network, "quantize")
    return tuple(sorted(found, key=lambda row: -row.divergence))


def repair(
    network: Network,
    ranked: Sequence[LayerSensitivity],
    drop_of: Callable[[Network], float],
    *,
    max_drop: float,
    title: str = "top-1",
) -> tuple[Network, tuple[str, ...]]:
    """Leave the worst layers in float, 1, 2, 4, ... of them, until ``drop_of`` is at most ``max_drop``.

    Args:
        network: Quantised.
        ranked: From ``sensitivity``.
        drop_of: Measures a candidate's loss of accuracy in points.
        max_drop: What is allowed.
        title: What the accuracy is called.

    Returns:
        The repaired network and the names of the layers it has in float now.

    Raises:
        Refused: If half of the layers in float do not help.
    """
    most, count, drop = max(1, int(len(ranked) * _MOST_FLOAT)), 1, float("nan")
    while ranked:
        names = tuple(row.name for row in ranked[: min(count, most)])
        if len(names) == len(ranked):
            break  # nothing would be left in INT8
        candidate = leave_float(network, names)
        drop = drop_of(candidate)
        if drop <= max_drop:
            return candidate, names
        if count >= most:
            break
        count *= 2
    worst = ", ".join(row.name for row in ranked[:3])
    raise Refused(
        f"INT8 loses {drop:.2f} points of {title} even with {min(count, most)} of {len(ranked)} layers in float, and"
        f" {max_drop:g} are allowed (--max-drop); the most sensitive layers are {worst}; no file was left",
        hint="Train with the quantisers on: visionkd quantize MODEL --data DATA --epochs 5 --teacher MODEL",
    )


def check_speed(float_ms: float, int8_ms: float, *, min_speedup: float) -> float:
    """Return how many times faster INT8 is.

    Raises:
        Refused: If that is less than ``min_speedup``.
    """
    speedup = float_ms / int8_ms
    if speedup < min_speedup:
        raise Refused(
            f"INT8 takes {int8_ms:.2f} ms and the float network {float_ms:.2f} ms on this machine: {speedup:.2f} times"
            f" as fast, and {min_speedup:g} times is asked for (--min-speedup); no file was left",
            hint="Keep the float file, or pass --min-speedup 0 if the file is for another machine.",
        )
    return speedup


def _inputs(network: Network) -> dict[str, list[str]]:
    """Return the quantisers of the inputs of each INT8 layer."""
    layers, quantizers = int8_layers(network), activation_quantizers(network)
    found: dict[str, list[str]] = {}
    for node in network.net.graph.nodes:
        if node.op == "call_module" and node.target in layers:
            for parent in node.all_input_nodes:
                name = str(parent.target).rpartition(".")[2]
                if parent.op == "call_module" and name in quantizers:
                    found.setdefault(str(node.target), []).append(name)
    return found
