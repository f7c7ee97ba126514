"""Teachers' probabilities from a label store, in the path of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from visionkd.teachers.store import LabelStore


class StoredTeachers:
    """Stands for the teachers where a store holds what they said, and fills the store where it does not.

    Args:
        store: Open for reading and writing.
        num_classes: Number of classes, C.
        rest: What becomes of the probability of classes that the store does not keep.
    """

    def __init__(self, store: LabelStore, *, num_classes: int, rest: str) -> None:
        self.store, self.num_classes, self.rest = store, num_classes, rest

    def look_up(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add what the store holds for the batch; called with the batch in the memory of this process."""
        labels = self.store.read(batch["index"], batch["view"])
        keys = (batch["index"], batch["view"], ~labels.present)
        return {**batch, "stored": labels, "stored_keys": None if bool(labels.present.all()) else keys}

    def probabilities(self, batch: dict[str, Any], run_teachers: Callable[[], Tensor]) -> Tensor:
        """Return B x C probabilities, from the store where it has them all.

        Where some are missing, the teachers see the whole batch: a part of it could differ in the last bit, and a
        resumed run from the one that was never stopped. What they say is used in the form in which it is stored.
        """
        labels, keys = batch["stored"], batch["stored_keys"]
        if keys is None:
            return labels.dense(num_classes=self.num_classes, rest=self.rest)
        index, view, missing = keys
        fresh = run_teachers()
        own = fresh.cpu()
        self.store.write(index[missing], view[missing], own[missing])
        fresh = self.store.as_stored(own).to(fresh.device).dense(num_classes=self.num_classes, rest=self.rest)
        if bool(missing.all()):
            return fresh
        kept = labels.dense(num_classes=self.num_classes, rest=self.rest)
        return torch.where(missing.to(fresh.device)[:, None], fresh, kept)
