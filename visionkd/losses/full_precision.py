"""Products that stay in float32 where autocast would take half of their digits."""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` in float32, whatever precision a training runs in.

    Cosines are multiplied by up to 143 before a softmax: in bfloat16 such logits would be off by up to 0.3.
    """
    if torch.is_autocast_enabled(a.device.type):
        with torch.autocast(a.device.type, enabled=False):
            return a.float() @ b.float()
    return a.float() @ b.float()
