"""Networks that were never trained, with statistics like those of trained ones."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def draw_statistics(network: nn.Module) -> None:
    """Draw what the batch norms of a network hold from torch's generator."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.2)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0.0, 0.2)
