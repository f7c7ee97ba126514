"""Teachers' probabilities from a label store, in the path of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from visionkd.teachers.store import LabelStore, StoredLabels


class StoredTeachers:
    """Stands for the teachers where a store holds what they said, and fills the store where it does not.

    Args:
        store: Open for reading and writing.
        rest: What becomes of the probability of classes that the store does not keep.
        grid: Classes, height and width of a label, where it is a map; the store keeps it as one row.
    """

    def __init__(self, store: LabelStore, *, rest: str, grid: tuple[int, int, int] | None = None) -> None:
        self.store, self.rest, self.grid = store, rest, grid

    def look_up(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add what the store holds for the batch, while its indices are in the memory of this process."""
        labels = self.store.read(batch["index"], batch["view"])
        return {**batch, "stored": labels, "stored_keys": (batch["index"], batch["view"], ~labels.present)}

    def probabilities(self, batch: dict[str, Any], run_teachers: Callable[[], Tensor]) -> Tensor:
        """Return B x C probabilities, of maps B x C x h x w, from the store where it has them all.

        Where some are missing, the teachers see the whole batch: in a part of it they could differ in the last bit, and
        a resumed run from the one that was never stopped. What they say is used in the form in which it is stored.
        """
        labels = batch["stored"]
        if labels.complete:
            return self._shaped(labels.dense(rest=self.rest))
        index, view, missing = batch["stored_keys"]
        probs = run_teachers()
        fresh = self.write(index[missing], view[missing], probs.cpu()[missing]).to(probs.device)
        if len(fresh) == len(missing):
            return self._shaped(fresh.dense(rest=self.rest))
        mixed = labels.dense(rest=self.rest).clone()
        mixed[missing.to(mixed.device)] = fresh.dense(rest=self.rest)
        return self._shaped(mixed)

    def write(self, index: Tensor, view: Tensor, probs: Tensor) -> StoredLabels:
        """Store B x C probabilities, or B maps of them, and return them as they are stored."""
        return self.store.write(index, view, probs.flatten(1))

    def _shaped(self, rows: Tensor) -> Tensor:
        return rows if self.grid is None else rows.view(len(rows), *self.grid)
