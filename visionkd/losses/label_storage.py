"""Soft labels in the short forms that a store keeps: the most probable classes, and what becomes of the rest.

With q the recovered label over C classes, v_1 >= ... >= v_k the stored probabilities and r the rest mass::

    uniform       q_c = v_j at the stored class j,  r / (C - k) at every other class
    renormalize   q_c = v_j / sum(v)                0

FKD's label types are these two with a k: ``hard`` is k = 1 renormalized, ``smoothing`` k = 1 uniform,
``marginal_smoothing_k5`` k = 5 uniform, ``marginal_renorm_k5`` k = 5 renormalized, and the full label is k = C.

Reference:
    Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV 2022, arXiv 2112.01528.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rest = Literal["uniform", "renormalize"]


@torch.no_grad()
def top_k_labels(probs: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``k`` most probable classes of each row, the most probable first.

    Args:
        probs: B x C; rows sum to 1.
        k: At most C.

    Returns:
        Class indices B x k in int64, their probabilities B x k in float32, and the mass of all other classes, B in
        float32, at least 0.
    """
    values, indices = probs.float().topk(k, dim=1)
    return indices, values, (1.0 - values.sum(1)).clamp_min(0.0)


@torch.no_grad()
def recover_labels(
    indices: Tensor,
    values: Tensor,
    *,
    num_classes: int,
    rest: Rest = "uniform",
    rest_mass: Tensor | None = None,
    clamp_rest: bool = True,
) -> Tensor:
    """Return dense labels from stored ones.

    Probabilities in half precision need not sum to 1 with the rest mass, and may even exceed 1 by themselves. The mass
    is then taken as 0, not as a negative probability of every other class, and rows are divided by their sum.

    Args:
        indices: Stored classes, B x k in int64, different from each other in each row.
        values: Their probabilities, B x k in any float type.
        num_classes: C.
        rest: What becomes of the other classes: they share the rest mass evenly, or the stored ones share it.
        rest_mass: Probability of all other classes, B; None takes what the values leave of 1.
        clamp_rest: False keeps a negative rest mass and divides nothing, as the authors' released code does. It is of
            use only to compare with that code.

    Returns:
        B x C in float32. Every row sums to 1 and none is negative; a row with a NaN is NaN throughout.

    Raises:
        ValueError: If ``rest`` is none of the two.
    """
    values = values.float()
    batch, k = values.shape
    total = values.sum(1)
    others = num_classes - k
    if rest == "renormalize" or (others == 0 and clamp_rest):
        fill, total = total * 0.0, total  # times 0, not 0: a NaN stays one
    elif rest == "uniform":
        mass = 1.0 - total if rest_mass is None else rest_mass.float()
        mass = mass.clamp_min(0.0) if clamp_rest else mass
        fill, total = mass / max(others, 1), total + mass
    else:
        raise ValueError(f"rest '{rest}' is neither 'uniform' nor 'renormalize'")
    if clamp_rest or rest == "renormalize":
        fill, values = fill / total, values / total[:, None]
    labels = fill[:, None].expand(batch, num_classes).contiguous()
    return labels.scatter_(1, indices, values)
