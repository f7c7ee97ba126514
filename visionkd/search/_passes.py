"""One pass of a random network over one batch, and how its weights are drawn."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionkd.errors import RequestError, WorkError
from visionkd.models import torchvision_zoo
from visionkd.models.factory import Network  # with it, timm knows this project's own networks
from visionkd.models.network import head_names, main_logits

#: How weights are drawn.
INITS = ("default", "gaussian")


@dataclass(frozen=True)
class Batch:
    """The images that all candidates see.

    Attributes:
        image: B x 3 x H x W, float32 in [0, 1].
        target: Class indices, B.
        num_classes: K.
        seed: Of what is random in a pass, and of weights that are drawn.
    """

    image: Tensor
    target: Tensor
    num_classes: int
    seed: int = 0

    @classmethod
    def of(cls, image: Tensor, target: Tensor, num_classes: int, seed: int = 0) -> Batch:
        """Return the batch of uint8 images or of floats in [0, 1].

        Raises:
            RequestError: If there are fewer than two images, or a label is not below ``num_classes``.
        """
        if len(image) < 2 or len(image) != len(target):
            raise RequestError(f"{len(image)} images and {len(target)} labels: a score wants 2 or more of both")
        if target.min() < 0 or target.max() >= num_classes:
            raise RequestError(f"labels from {int(target.min())} to {int(target.max())} with {num_classes} classes")
        image = image.float() / 255.0 if image.dtype == torch.uint8 else image.float()
        return cls(image, target, num_classes, seed)


@dataclass(frozen=True)
class Pass:
    """What one pass gave.

    Attributes:
        feature: B x ..., the last map (or tokens) before pooling, in the network's own layout.
        logits: B x K.
        grad: K x C, gradient of the mean cross-entropy with respect to the classifier's weights; None without backward.
    """

    feature: Tensor
    logits: Tensor
    grad: Tensor | None


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` inside, and leave the generators as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def initialised(network: Network, batch: Batch, *, init: str, seed: int | None = None) -> Network:
    """Return a copy of ``network`` in float32 and in train mode with random weights.

    Weights that are random already are kept by ``default``. Trained ones make place for those that the architecture is
    built with, drawn from ``seed`` (None: the batch's). A classifier for other classes than the batch's is replaced.

    Raises:
        WorkError: If a trained network cannot be built anew.
    """
    with seeded(batch.seed if seed is None else seed):
        if init == "default" and network.trained:
            made = _fresh(network)
        else:
            made = copy.deepcopy(network)
        if made.num_classes != batch.num_classes:
            made.reset_classifier(batch.num_classes)
        if init == "gaussian":
            _draw_gaussian(made.net)
    made.zero_grad(set_to_none=True)
    return made.float().requires_grad_(True).train()


def run(network: Network, batch: Batch, *, backward: bool = True) -> Pass:
    """Run ``network``, a copy, in train mode: batch norms take the statistics of the batch.

    Raises:
        WorkError: If the logits come from no linear layer, or something is not finite.
    """
    network.train().requires_grad_(False)
    image, target = placed(network, batch)
    weight = _head_weight(network).requires_grad_(True) if backward else None
    with seeded(batch.seed), torch.autocast(image.device.type, enabled=False), torch.set_grad_enabled(backward):
        feature, logits = _forward(network, image)
        if logits.shape != (len(image), batch.num_classes):
            raise WorkError(f"'{network.architecture}' answers {tuple(logits.shape)} for {len(image)} images")
        grad = None
        if weight is not None:
            # of one layer: what lies before it has kept no graph, and the backward pass costs next to nothing
            (grad,) = torch.autograd.grad(F.cross_entropy(logits, target), [weight])
            grad = grad.flatten(1).detach()
    for name, value in (("map", feature), ("logits", logits), ("gradient", grad)):
        if value is not None and not torch.isfinite(value).all():
            raise WorkError(f"the {name} of '{network.architecture}' is not finite with these random weights")
    return Pass(feature.detach(), logits.detach(), grad)


def placed(network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return images and labels on the device of ``network``."""
    device = next(network.parameters()).device
    return batch.image.to(device), batch.target.to(device)


def _forward(network: Network, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last features before pooling and the logits, from one pass."""
    answers: list[Any] = []
    handle = network.net.register_forward_hook(lambda _, __, output: answers.append(output))
    try:
        feature = network.forward_features(image)
    finally:
        handle.remove()
    # timm's forward_features ends in front of the head, torchvision's networks have run as a whole
    net: Any = network.net
    logits = answers[-1] if answers else net.forward_head(feature)
    if not isinstance(feature, Tensor):
        raise WorkError(f"'{network.architecture}' has no single last map: {type(feature).__name__}")
    return feature, main_logits(logits)


def _head_weight(network: Network) -> nn.Parameter:
    names = head_names(network.net, network.source)
    head = network.net.get_submodule(names[0]) if names else None
    if not isinstance(head, (nn.Linear, nn.Conv2d)):
        raise WorkError(f"the classifier of '{network.architecture}' is no linear layer, so classes have no gradients")
    return head.weight


def _fresh(network: Network) -> Network:
    """Return the architecture with the weights that it is built with."""
    name, args = network.architecture, network.model_args
    try:
        if network.source == "timm":
            net = timm.create_model(name, pretrained=False, **args)
        else:
            net = torchvision_zoo.build(name, {**torchvision_zoo.fixed_args(name, False), **args})
    except Exception as error:
        raise WorkError(f"'{name}' cannot be built anew with random weights: {error}") from error
    made = Network(net, architecture=name, source=network.source, input=network.input, model_args=args)
    return made.to(next(network.parameters()).device)


@torch.no_grad()
def _draw_gaussian(net: nn.Module) -> None:
    """Draw the weights of convolutions and linear layers from N(0, 1); norms become 1 and biases 0.

    What belongs to no such layer (class tokens, position embeddings, scales) keeps what it was built with.
    """
    for module in net.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            nn.init.normal_(module.weight)
        elif "norm" in type(module).__name__.lower() and isinstance(weight, nn.Parameter):
            nn.init.ones_(weight)
        else:
            continue
        if isinstance(bias, nn.Parameter):
            nn.init.zeros_(bias)
