"""Global context: what a whole map knows, added to each of its cells.

    G(x) = x + W2 relu(LN(W1 sum_p x_p softmax_p(w x_p)))

Cao, Xu, Lin, Wei and Hu, "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond", ICCVW 2019,
arXiv 1904.11492; FGD distils features through two such blocks, one for each network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ContextBlock(nn.Module):
    """Adds the context of a map to its cells; adds nothing before it is trained, for W2 begins at 0.

    Args:
        channels: C of the map, at least 2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pick = nn.Conv2d(channels, 1, 1)
        self.reduce = nn.Conv2d(channels, channels // 2, 1)
        self.norm = nn.LayerNorm([channels // 2, 1, 1])
        self.expand = nn.Conv2d(channels // 2, channels, 1)
        nn.init.kaiming_normal_(self.pick.weight)
        for zero in (self.pick.bias, self.expand.weight, self.expand.bias):
            nn.init.zeros_(zero)

    def forward(self, features: Tensor) -> Tensor:
        """Return ``features``, B x C x H x W, with the context of each added."""
        chosen = self.pick(features).flatten(2).softmax(2)
        context = torch.einsum("bcp,bkp->bc", features.flatten(2), chosen)[:, :, None, None]
        return features + self.expand(self.norm(self.reduce(context)).relu())
