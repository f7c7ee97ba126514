"""Regions of a training set with their embeddings, brought to the views that a batch shows.

Boxes go where a view moved the picture; embeddings stay what the encoder said of the picture as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from visionkd.data.detection_transforms import moved_boxes
from visionkd.data.sampler import view_seed
from visionkd.teachers.embedding_cache import EmbeddingCache, ImageRegions
from visionkd.teachers.pseudo_labels import PseudoLabels


class CachedRegions:
    """Stands for an image-text encoder in training.

    Args:
        cache: Complete.
        positions: Position in the cache of each image of the training set, N of int64.
        objects: Most objects of an image in a step, drawn at random; None takes all.
        pseudo: For each image of the training set, boxes of novel classes to learn beside those of base classes.
        released_block: Take the box of the whole image's block as the released code writes it.
        seed: Decides which objects are drawn.
    """

    def __init__(
        self,
        cache: EmbeddingCache,
        positions: Tensor,
        *,
        objects: int | None = None,
        pseudo: Sequence[PseudoLabels] | None = None,
        released_block: bool = False,
        seed: int = 0,
    ) -> None:
        self.cache, self.positions, self.objects, self.pseudo = cache, positions, objects, pseudo
        self.released_block, self.seed = released_block, seed

    def look_up(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Add ``regions`` to a batch of the training loader, and pseudo boxes to its targets.

        ``regions`` holds ``object_boxes`` and ``block_boxes``, for each view N x 4 and M x 4 in its pixels, and the
        embeddings of all views together: ``objects``, ``blocks`` and ``whole``, the last one B x D.
        """
        indices, views = batch["index"].tolist(), batch["view"].tolist()
        found = [
            self._drawn(self.cache.read(int(self.positions[index])), index, view)
            for index, view in zip(indices, views, strict=True)
        ]
        geometry = batch["geometry"]
        regions = {
            "object_boxes": [moved_boxes(each.object_boxes, own) for each, own in zip(found, geometry, strict=True)],
            "block_boxes": [
                moved_boxes(self._block_boxes(each), own) for each, own in zip(found, geometry, strict=True)
            ],
            "objects": torch.cat([each.objects for each in found]),
            "blocks": torch.cat([each.blocks for each in found]),
            "whole": torch.stack([each.whole for each in found]),
        }
        target = batch["target"]
        if self.pseudo is not None:
            target = [
                _joined(own, self.pseudo[index], where)
                for own, index, where in zip(target, indices, geometry, strict=True)
            ]
        return {**batch, "target": target, "regions": regions}

    def _drawn(self, regions: ImageRegions, index: int, view: int) -> ImageRegions:
        """Leave all but some objects out; which ones follows from the view alone, as after a resumption."""
        count = len(regions.objects)
        if self.objects is None or count <= self.objects:
            return regions
        generator = torch.Generator().manual_seed(view_seed(self.seed, view, index) >> 1)
        kept = torch.randperm(count, generator=generator)[: self.objects]
        return ImageRegions(
            regions.whole, regions.block_boxes, regions.blocks, regions.object_boxes[kept], regions.objects[kept],
            regions.objectness[kept],
        )  # fmt: skip

    def _block_boxes(self, regions: ImageRegions) -> Tensor:
        boxes = regions.block_boxes
        if not self.released_block or not len(boxes):
            return boxes
        # its corner and its side, read as two corners
        left, top, right, _ = boxes[0].tolist()
        return torch.cat([boxes.new_tensor([[left, top, right - left, right - left]]), boxes[1:]])


def _joined(target: Mapping[str, Tensor], found: PseudoLabels, geometry: Tensor) -> dict[str, Tensor]:
    """Add boxes that an encoder found to those of a view."""
    boxes = moved_boxes(found.boxes_xyxy, geometry)
    more = {"boxes": boxes, "labels": found.labels, "crowd": torch.zeros(len(boxes), dtype=torch.bool)}
    return {name: torch.cat([value, more[name].to(value)]) if name in more else value for name, value in target.items()}
