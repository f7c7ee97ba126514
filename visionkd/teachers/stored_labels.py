"""Labels between a teacher's probabilities, the bytes of a store and the training loop."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from visionkd.errors import WorkError
from visionkd.losses.label_storage import Rest, recover_labels, top_k_labels
from visionkd.teachers._shards import RowFormat


@dataclass(frozen=True)
class StoredLabels:
    """The labels of a batch as a store keeps them.

    Attributes:
        num_classes: C.
        present: B, whether the store holds the label; a label that it does not hold is NaN.
        complete: Whether it holds all of them; known without waiting for a device.
        probs: B x C in float32, where all classes are stored.
        indices: B x k in int64, the most probable classes, where only these are stored.
        values: B x k in float32, their probabilities.
        rest: B in float32, the probability of all other classes.
    """

    num_classes: int
    present: Tensor
    complete: bool
    probs: Tensor | None = None
    indices: Tensor | None = None
    values: Tensor | None = None
    rest: Tensor | None = None

    def __len__(self) -> int:
        return len(self.present)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> StoredLabels:
        """Return the labels on a device."""
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **moved)

    def dense(self, rest: Rest = "uniform") -> Tensor:
        """Return the labels over all classes.

        Args:
            rest: What becomes of classes that are not stored: ``uniform`` or ``renormalize``.

        Returns:
            B x C in float32 on the device of the labels. Rows sum to 1; those that are not present are NaN.
        """
        if self.probs is not None:
            return self.probs
        assert self.indices is not None and self.values is not None
        return recover_labels(self.indices, self.values, num_classes=self.num_classes, rest=rest, rest_mass=self.rest)


def encode(probs: Tensor, fmt: RowFormat) -> np.ndarray:
    """Return probabilities as the opaque rows of a store.

    Args:
        probs: B x C on any device; rows sum to 1.
        fmt: Format of the store.

    Raises:
        ValueError: If they are not B x C.
        WorkError: If one is not finite.
    """
    if probs.ndim != 2 or probs.shape[1] != fmt.num_classes:
        raise ValueError(f"probabilities of shape {tuple(probs.shape)} for {fmt.num_classes} classes")
    probs = probs.detach()
    if fmt.storage == "full":
        full = probs.to("cpu", torch.float32).contiguous().numpy()
        finite, rows = np.isfinite(full), full.view(fmt.dtype)[:, 0]
    else:
        indices, values, rest = (tensor.cpu().numpy() for tensor in top_k_labels(probs, fmt.k))
        finite, rows = np.isfinite(values), np.empty(len(values), dtype=fmt.dtype)
        rows["indices"], rows["values"], rows["rest"] = indices, values, rest
    if not finite.all():
        raise WorkError(
            f"The teachers' probabilities of {int((~finite.all(1)).sum())} of {len(rows)} images of a batch are not "
            "finite, and such labels are not stored.",
            hint="Look at each teacher with 'visionkd eval'; with -o teachers.0.precision=32 it cannot overflow.",
        )
    return rows.view(fmt.row)


def decode(rows: np.ndarray, fmt: RowFormat) -> StoredLabels:
    """Return the opaque rows of a store as tensors.

    Args:
        rows: B rows that nobody else changes.
        fmt: Format of the store.
    """
    present = fmt.present(rows)
    complete = bool(present.all())
    flags = torch.from_numpy(present)
    if fmt.storage == "full":
        probs = torch.from_numpy(rows.view("<f4").reshape(len(rows), fmt.num_classes))
        return StoredLabels(fmt.num_classes, flags, complete, probs=probs)
    fields = rows.view(fmt.dtype)
    indices = fields["indices"].astype(np.int64)
    if not complete:
        indices[~present] = np.arange(fmt.k)  # any that exist: their values are NaN
    values, rest = (torch.from_numpy(fields[name].astype(np.float32)) for name in ("values", "rest"))
    return StoredLabels(fmt.num_classes, flags, complete, indices=torch.from_numpy(indices), values=values, rest=rest)
