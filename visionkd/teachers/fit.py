"""Give a teacher the data's classes: a linear probe on its cached features."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visionkd.errors import WorkError
from visionkd.models.factory import Network

_L2_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
_HOLDOUT = 0.2


@dataclass(frozen=True)
class Probe:
    """A linear classifier on a network's embedding.

    Attributes:
        weight: C x D.
        bias: C.
        l2: Strength of the regularisation that was chosen.
        holdout_top1: Accuracy in percent on the fifth of the features that was held out to choose it.
        num_images: Number of images whose features were used.
    """

    weight: Tensor
    bias: Tensor
    l2: float
    holdout_top1: float
    num_images: int


@torch.no_grad()
def cache_features(
    network: Network,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    on_batch: Callable[[int], None] = lambda count: None,
) -> tuple[Tensor, Tensor]:
    """Run the network once over images and keep what its classifier would see.

    Args:
        network: Network, put into eval mode.
        batches: Images in [0, 1], B x 3 x H x W, and class indices, B.
        device: Where to run.
        dtype: Autocast type, or None.
        on_batch: Called with the number of images of each batch.

    Returns:
        Embeddings, N x D in float32, and class indices, N, on the CPU.
    """
    network.to(device).eval()
    features, targets = [], []
    for images, target in batches:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            features.append(network.embed(images.to(device)).float().cpu())
        targets.append(target)
        on_batch(len(target))
    if not features:
        raise WorkError("There are no images to fit a probe on.")
    return torch.cat(features), torch.cat(targets)


def fit_probe(features: Tensor, targets: Tensor, *, num_classes: int, seed: int) -> Probe:
    """Fit multinomial logistic regression on standardised features, regularisation chosen on a held-out fifth.

    Args:
        features: N x D.
        targets: Class indices, N.
        num_classes: C.
        seed: Draws the held-out fifth.
    """
    mean, std = features.mean(0), features.std(0, correction=0)
    std = torch.where(std > 1e-6, std, torch.ones_like(std))
    scaled = (features - mean) / std
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    held, kept = order[: int(_HOLDOUT * len(order))], order[int(_HOLDOUT * len(order)) :]
    scores = {}
    for l2 in _L2_STRENGTHS if len(held) else ():
        weight, bias = _logistic(scaled[kept], targets[kept], num_classes=num_classes, l2=l2)
        scores[l2] = 100.0 * float((F.linear(scaled[held], weight, bias).argmax(1) == targets[held]).float().mean())
    l2 = max(scores, key=lambda strength: (scores[strength], strength)) if scores else _L2_STRENGTHS[1]
    weight, bias = _logistic(scaled, targets, num_classes=num_classes, l2=l2)
    # fold the standardisation into the classifier, so that it takes the plain embedding
    weight = weight / std
    bias = bias - weight @ mean
    return Probe(weight, bias, l2, scores.get(l2, float("nan")), len(targets))


def _logistic(features: Tensor, targets: Tensor, *, num_classes: int, l2: float) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(num_classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), targets) + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()
