"""What a network says, in the form that it is compared in: logits, or the candidates of a detector."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from visionkd.export.differences import SIDES, rms_difference
from visionkd.export.onnx import file_logits
from visionkd.models.network import Network
from visionkd.types import Output

_TINY = 1e-6


def answers(network: Network, image: Tensor) -> Tensor:
    """Return what a network says of ``image``, B x 3 x H x W in [0, 1].

    Returns:
        Logits, B x C or B x C x h x w at the network's own stride; of a detector candidates, boxes first, B x N x
        (4 + K), or (4 K + K) where each class has a box of its own.
    """
    if network.task == "detection":
        boxes, scores = network.candidates(image)
        return torch.cat([boxes.flatten(2), scores], -1)
    return network(image).logits


def in_file_form(network: Network, given: Tensor) -> Tensor:
    """Bring what :func:`answers` returned into the form that a file gives it in."""
    return given if network.task == "detection" else file_logits(network, Output(logits=given))


def difference(network: Network, values: Tensor, reference: Tensor) -> float:
    """Return :func:`rms_difference` of two answers; of candidates of one stage the larger one of boxes and scores."""
    parts = [slice(None)] if network.task != "detection" else [slice(0, SIDES), slice(SIDES, None)]
    return max(rms_difference(values[..., part].numpy(), reference[..., part].numpy()) for part in parts)


def divergence(network: Network, given: Tensor, reference: Tensor) -> float:
    """Return how far an answer is from the reference, 0 where they are the same.

    Returns:
        The Kullback-Leibler divergence of the probabilities from the reference's, a mean over images or pixels, in
        nats. Of candidates its sum over an image for each score by itself, and beside it how far boxes have moved, in
        shares of their sides and weighted by the reference's best score of each.
    """
    if network.task != "detection":
        wanted, found = F.log_softmax(reference, 1), F.log_softmax(given, 1)
        count = found.numel() / found.shape[1]
        return max(0.0, float(F.kl_div(found, wanted, reduction="sum", log_target=True)) / count)
    wanted, found = (each[..., SIDES:].clamp(_TINY, 1.0 - _TINY) for each in (reference, given))
    votes = wanted * (wanted / found).log() + (1.0 - wanted) * ((1.0 - wanted) / (1.0 - found)).log()
    boxes, moved = reference[..., :SIDES], (given[..., :SIDES] - reference[..., :SIDES]).abs()
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1.0).repeat(1, 1, 2)
    weight = wanted.amax(-1, keepdim=True)
    return max(0.0, float(votes.sum() + (weight * moved / sides).sum()) / len(given))
