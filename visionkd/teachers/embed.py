"""Filling a cache of embeddings: cut regions out of images, and show them to an encoder, many images at a time.

Wang et al., "Object-Aware Distillation Pyramid for Open-Vocabulary Object Detection", CVPR 2023, arXiv 2303.05892.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visionkd.errors import Problem, RequestError, UnreadableImageError
from visionkd.teachers.crops import block_crops, object_crops
from visionkd.teachers.embedding_cache import EmbeddingCache, ImageRegions, Proposals
from visionkd.teachers.encoders import ImageTextEncoder
from visionkd.teachers.regions import AREA_RATIO, RESCALE
from visionkd.types import Source

#: Images that are cut and shown at a time.
_PART = 8
_MOST_CROPS = 256


@dataclass(frozen=True)
class RegionOptions:
    """Which regions of an image an encoder is shown.

    Attributes:
        mode: ``adaptive`` makes the crop around an object larger than the object by ``area_ratio``, ``constant`` takes
            squares of ``side`` pixels.
        area_ratio: Area of a crop in areas of its object.
        side: Side of a crop in pixels of the image.
        cover: Make no crop shorter than its object, which the authors do not.
        rescale: Ratio of the sides of one level of the pyramid of blocks and the next.
        most_pixels: Longest side of a whole image; larger ones are shrunk to it.
    """

    mode: Literal["adaptive", "constant"] = "adaptive"
    area_ratio: float = AREA_RATIO
    side: float | None = None
    cover: bool = False
    rescale: float = RESCALE
    most_pixels: int = 1333

    def key(self, encoder: ImageTextEncoder) -> dict[str, Any]:
        """Return what of the embeddings' identity follows from the encoder and these options."""
        return {
            "encoder": {
                "weights": encoder.identity, "resolution": list(encoder.img_size),
                "masks": None if encoder.grid is None else list(encoder.grid),
            },
            "regions": asdict(self) | {"version": 1},
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Cut:
    """The pixels of the regions of an image, uint8."""

    whole: Tensor
    blocks: Tensor
    block_boxes: Tensor
    objects: Tensor
    outside: Tensor
    object_boxes: Tensor
    objectness: Tensor


def check_encoder(encoder: ImageTextEncoder) -> None:
    """Refuse an encoder of crops that are not square.

    Raises:
        RequestError: If it is one.
    """
    height, width = encoder.img_size
    if height != width:
        said = f"'{encoder.name}' takes crops of {height} x {width} pixels, and regions are square"
        raise RequestError(Problem("--teacher", said, "Take an encoder of square images."))


def fill(
    cache: EmbeddingCache,
    source: Source,
    encoder: ImageTextEncoder,
    options: RegionOptions,
    *,
    workers: int = 1,
    progress: Callable[[int, int, int], None] | None = None,
) -> None:
    """Compute the shards that are missing; their proposals must be there.

    Args:
        cache: Is being built by this process alone.
        source: The images.
        encoder: On its device.
        options: Which regions it is shown.
        workers: Threads that decode and cut.
        progress: Told images done, images in all, and regions done.
    """
    todo = cache.missing()
    total, done, regions = sum(len(cache.images_of(shard)) for shard in todo), 0, 0

    def cut(index: int) -> _Cut | None:
        try:
            return _cut(source.load(index), cache.read_proposals(index), encoder, options)
        except UnreadableImageError:
            return None

    with ThreadPoolExecutor(max(1, workers)) as pool:
        for shard in todo:
            found: list[ImageRegions] = []
            for part in _ahead(pool, _parts(cache.images_of(shard)), cut):
                embedded = _embed(part, encoder)
                found += embedded
                regions += sum(1 + len(each.blocks) + len(each.objects) for each in embedded)
                done += len(part)
                if progress is not None:
                    progress(done, total, regions)
            cache.write(shard, found)


def _parts(images: range) -> list[range]:
    return [images[start : start + _PART] for start in range(0, len(images), _PART)]


def _ahead(
    pool: ThreadPoolExecutor, parts: Sequence[range], work: Callable[[int], _Cut | None]
) -> Iterator[list[_Cut | None]]:
    """Yield what becomes of each part, while the next one is worked on."""
    waiting: list[Future] = []
    for part in parts:
        coming = [pool.submit(work, index) for index in part]
        if waiting:
            yield [each.result() for each in waiting]
        waiting = coming
    yield [each.result() for each in waiting]


def _cut(image: Image.Image, proposals: Proposals, encoder: ImageTextEncoder, options: RegionOptions) -> _Cut:
    size = encoder.img_size[0]
    objects = object_crops(
        image, proposals.boxes, size=size, grid=1 if encoder.grid is None else encoder.grid[0],
        interpolation=encoder.interpolation, area_ratio=options.area_ratio,
        side=options.side if options.mode == "constant" else None, cover=options.cover,
    )  # fmt: skip
    blocks, boxes = block_crops(
        image, size=size, max_stride=size // 2, rescale=options.rescale, interpolation=encoder.interpolation
    )
    whole = torch.from_numpy(np.array(_fitting(image, encoder.least_side, options.most_pixels))).permute(2, 0, 1)
    return _Cut(
        whole, blocks, boxes, objects.crops, objects.outside, proposals.boxes[objects.kept],
        proposals.objectness[objects.kept],
    )  # fmt: skip


def _fitting(image: Image.Image, least: int, most: int) -> Image.Image:
    """Return an image as it is, or enlarged or shrunk where an encoder would not take it."""
    short, long = min(image.size), max(image.size)
    factor = max(min(1.0, most / long), least / short)
    if factor == 1.0:
        return image
    return image.resize([max(least, round(side * factor)) for side in image.size], Image.Resampling.BICUBIC)


def _embed(images: Sequence[_Cut | None], encoder: ImageTextEncoder) -> list[ImageRegions]:
    """Show the regions of several images to the encoder together."""
    seen = [each for each in images if each is not None]
    wholes = _whole(seen, encoder)
    blocks = _shown([each.blocks for each in seen], encoder)
    masks = None if encoder.grid is None else [each.outside for each in seen]
    objects = _shown([each.objects for each in seen], encoder, masks)
    found = iter(zip(seen, wholes, blocks, objects, strict=True))
    regions = []
    for image in images:
        if image is None:
            regions.append(ImageRegions.none(encoder.dim))
            continue
        own, whole, of_blocks, of_objects = next(found)
        regions.append(
            ImageRegions(whole, own.block_boxes, of_blocks, own.object_boxes, of_objects, own.objectness)
        )
    return regions


def _shown(
    crops: Sequence[Tensor], encoder: ImageTextEncoder, outside: Sequence[Tensor] | None = None
) -> Sequence[Tensor]:
    """Return embeddings of the crops of several images, image by image, on the CPU."""
    if not crops:
        return []
    pixels = torch.cat(list(crops)).split(_MOST_CROPS)
    masks = [None] * len(pixels) if outside is None else torch.cat(list(outside)).split(_MOST_CROPS)
    found = [encoder.encode_crops(part.float() / 255, mask).cpu() for part, mask in zip(pixels, masks, strict=True)]
    return torch.cat(found).split([len(each) for each in crops])


def _whole(images: Sequence[_Cut], encoder: ImageTextEncoder) -> list[Tensor]:
    """Return the embedding of each image as a whole; images of one size go together."""
    found: dict[int, Tensor] = {}
    sizes: dict[tuple[int, ...], list[int]] = {}
    for place, each in enumerate(images):
        sizes.setdefault(tuple(each.whole.shape), []).append(place)
    for places in sizes.values():
        vectors = encoder.encode_image(torch.stack([images[place].whole for place in places]).float() / 255).cpu()
        found.update(zip(places, vectors, strict=True))
    return [found[place] for place in range(len(images))]
