"""Teachers' probabilities from a label store, in the path of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from visionkd.teachers.store import LabelStore


class StoredTeachers:
    """Stands for the teachers where a store holds what they said, and fills the store where it does not.

    Args:
        store: Open for reading and writing.
        rest: What becomes of the probability of classes that the store does not keep.
    """

    def __init__(self, store: LabelStore, *, rest: str) -> None:
        self.store, self.rest = store, rest

    def look_up(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add what the store holds for the batch, while its indices are in the memory of this process."""
        labels = self.store.read(batch["index"], batch["view"])
        return {**batch, "stored": labels, "stored_keys": (batch["index"], batch["view"], ~labels.present)}

    def probabilities(self, batch: dict[str, Any], run_teachers: Callable[[], Tensor]) -> Tensor:
        """Return B x C probabilities, from the store where it has them all.

        Where some are missing, the teachers see the whole batch: in a part of it they could differ in the last bit, and
        a resumed run from the one that was never stopped. What they say is used in the form in which it is stored.
        """
        labels = batch["stored"]
        if labels.complete:
            return labels.dense(rest=self.rest)
        index, view, missing = batch["stored_keys"]
        probs = run_teachers()
        fresh = self.store.write(index[missing], view[missing], probs.cpu()[missing]).to(probs.device)
        if len(fresh) == len(missing):
            return fresh.dense(rest=self.rest)
        mixed = labels.dense(rest=self.rest).clone()
        mixed[missing.to(mixed.device)] = fresh.dense(rest=self.rest)
        return mixed
