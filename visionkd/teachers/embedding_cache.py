"""Embeddings of images, of their blocks and of objects in them, kept on disk: an encoder sees each image once.

A cache is a directory with a ``manifest.json``, which says what the embeddings were computed from, and shards: one for
each run of consecutive images, complete or absent. Embeddings are of length 1 and stored in half precision, boxes in
single precision, for half of it is wrong by whole pixels from 2048 on.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from visionkd.data.archive import cache_root
from visionkd.errors import DataError, Problem, RequestError
from visionkd.files import write_bytes, write_text
from visionkd.teachers._manifest import differences

MANIFEST = "manifest.json"
_FORMAT, _VERSION = "visionkd embedding cache", 1
#: Images of a shard: what a killed process loses at most.
SHARD_IMAGES = 128
_NO_BOXES = (0, 4)


@dataclass(frozen=True, eq=False)
class ImageRegions:
    """What is known about one image; boxes are left, top, right, bottom in its pixels.

    Attributes:
        whole: D, of the image as a whole.
        block_boxes: M x 4.
        blocks: M x D.
        object_boxes: N x 4.
        objects: N x D.
        objectness: N, in [0, 1].
    """

    whole: Tensor
    block_boxes: Tensor
    blocks: Tensor
    object_boxes: Tensor
    objects: Tensor
    objectness: Tensor

    @classmethod
    def none(cls, dim: int) -> ImageRegions:
        """Return what stands for an image that cannot be read."""
        boxes, vectors = torch.zeros(_NO_BOXES), torch.zeros(0, dim)
        return cls(torch.zeros(dim), boxes, vectors, boxes, vectors, torch.zeros(0))


@dataclass(frozen=True, eq=False)
class Proposals:
    """Boxes of one image that may hold an object.

    Attributes:
        boxes: N x 4 in pixels of the image.
        objectness: N, in [0, 1], the highest first.
    """

    boxes: Tensor
    objectness: Tensor

    @classmethod
    def none(cls) -> Proposals:
        return cls(torch.zeros(_NO_BOXES), torch.zeros(0))


class EmbeddingCache:
    """A cache, open for reading and writing; see :func:`open_cache`.

    Args:
        directory: Where it lies.
        num_samples: Images.
        dim: Length of an embedding.
        shard_images: Images of a shard.
    """

    def __init__(self, directory: Path, *, num_samples: int, dim: int, shard_images: int) -> None:
        self.directory, self.num_samples, self.dim, self.shard_images = directory, num_samples, dim, shard_images
        self._open: dict[Path, Any] = {}

    # Shards -----------------------------------------------------------------------------------------------------------

    @property
    def num_shards(self) -> int:
        return -(-self.num_samples // self.shard_images)

    def images_of(self, shard: int) -> range:
        """Return the indices of the images of a shard."""
        first = shard * self.shard_images
        return range(first, min(first + self.shard_images, self.num_samples))

    def missing(self, kind: str = "regions") -> list[int]:
        """Return the shards that are not there yet, of ``regions`` or ``proposals``; damaged ones are removed."""
        return [number for number in range(self.num_shards) if not self._sound(self._file(kind, number))]

    def _file(self, kind: str, shard: int) -> Path:
        return self.directory / f"{kind}-{shard:05d}.safetensors"

    @staticmethod
    def _sound(file: Path) -> bool:
        if not file.is_file():
            return False
        try:
            with safe_open(file, framework="pt") as content:
                return "crc" in (content.metadata() or {})
        except (SafetensorError, OSError):
            file.unlink(missing_ok=True)
            return False

    @contextmanager
    def building(self) -> Iterator[None]:
        """Keep other processes from filling the cache meanwhile, and remove what killed ones left."""
        with FileLock(str(self.directory / ".lock")):
            for left in self.directory.glob(".*.tmp"):
                left.unlink(missing_ok=True)
            yield

    # Writing ----------------------------------------------------------------------------------------------------------

    def write(self, shard: int, regions: Sequence[ImageRegions]) -> None:
        """Write a shard, complete or not at all."""
        self._write(
            self._file("regions", shard),
            {
                "whole": torch.stack([each.whole for each in regions]).half(),
                "block_ends": _ends([len(each.blocks) for each in regions]),
                "block_boxes": torch.cat([each.block_boxes for each in regions]).float(),
                "blocks": torch.cat([each.blocks for each in regions]).half(),
                "object_ends": _ends([len(each.objects) for each in regions]),
                "object_boxes": torch.cat([each.object_boxes for each in regions]).float(),
                "objects": torch.cat([each.objects for each in regions]).half(),
                "objectness": torch.cat([each.objectness for each in regions]).float(),
            },
        )

    def write_proposals(self, shard: int, proposals: Sequence[Proposals]) -> None:
        """Write the proposals of a shard's images, complete or not at all."""
        self._write(
            self._file("proposals", shard),
            {
                "ends": _ends([len(each.boxes) for each in proposals]),
                "boxes": torch.cat([each.boxes for each in proposals]).float(),
                "objectness": torch.cat([each.objectness for each in proposals]).float(),
            },
        )

    @staticmethod
    def _write(file: Path, tensors: Mapping[str, Tensor]) -> None:
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        write_bytes(file, save(plain, metadata={"crc": str(_check(plain))}))

    # Reading ----------------------------------------------------------------------------------------------------------

    def read(self, index: int) -> ImageRegions:
        """Return what is known about an image, in float32; embeddings are brought to length 1 again.

        Raises:
            DataError: If its shard is not there, or not what was written.
        """
        shard, place = divmod(index, self.shard_images)
        content = self._content("regions", shard)
        blocks, objects = (_span(content, f"{name}_ends", place) for name in ("block", "object"))

        def unit(name: str, span: tuple[int, int]) -> Tensor:
            return F.normalize(_rows(content, name, span).float(), dim=-1)

        return ImageRegions(
            whole=unit("whole", (place, place + 1))[0],
            block_boxes=_rows(content, "block_boxes", blocks),
            blocks=unit("blocks", blocks),
            object_boxes=_rows(content, "object_boxes", objects),
            objects=unit("objects", objects),
            objectness=_rows(content, "objectness", objects),
        )

    def read_proposals(self, index: int) -> Proposals:
        """Return the proposals of an image; raises DataError as :meth:`read` does."""
        shard, place = divmod(index, self.shard_images)
        content = self._content("proposals", shard)
        span = _span(content, "ends", place)
        return Proposals(_rows(content, "boxes", span), _rows(content, "objectness", span))

    def _content(self, kind: str, shard: int) -> Any:
        file = self._file(kind, shard)
        if file not in self._open:
            hint = "Start again: what is missing is computed anew."
            try:
                content = safe_open(file, framework="pt").__enter__()
            except FileNotFoundError as error:
                raise DataError(f"the embedding cache has lost '{file}'", hint=hint) from error
            except (SafetensorError, OSError) as error:
                raise DataError(f"'{file}' is damaged: {error}", hint=f"Delete it. {hint}") from error
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  (no mapping)
            if str(_check(tensors)) != (content.metadata() or {}).get("crc"):
                raise DataError(f"'{file}' is damaged: its checksum does not match", hint=f"Delete it. {hint}")
            self._open[file] = content
        return self._open[file]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a loader process opens its own


def open_cache(
    key: Mapping[str, Any],
    *,
    num_samples: int,
    dim: int,
    directory: Path | None = None,
    about: Mapping[str, Any] | None = None,
    shard_images: int = SHARD_IMAGES,
) -> EmbeddingCache:
    """Open the cache that belongs to a key, or begin it.

    Args:
        key: What embeddings are computed from, as nested JSON.
        num_samples: Images.
        dim: Length of an embedding.
        directory: Where to look; None takes a directory in the cache that belongs to the key.
        about: Names for people, which are not compared.
        shard_images: Images of a shard, where it is begun.

    Raises:
        RequestError: If ``directory`` holds embeddings of something else; each part that differs is named.
        DataError: If its manifest cannot be read.
    """
    key = {**key, "num_samples": num_samples, "dim": dim}
    directory = cache_path(key) if directory is None else directory
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(str(directory / ".lock")):
        values = _read_manifest(directory)
        if values is None:
            values = {
                "format": _FORMAT, "version": _VERSION, "key": key, "about": dict(about or {}),
                "shard_images": shard_images,
            }  # fmt: skip
            write_text(directory / MANIFEST, json.dumps(values, indent=2) + "\n")
    if problems := differences(values["key"], key):
        raise RequestError(
            [Problem("embedding cache", f"{directory} holds embeddings of something else"), *problems],
            hint="Leave out options.embeddings, so that each setting has a cache of its own, give another directory"
            f" with -o options.embeddings=DIR, or delete {directory}.",
        )
    return EmbeddingCache(directory, num_samples=num_samples, dim=dim, shard_images=int(values["shard_images"]))


def caches_root() -> Path:
    """Where caches are kept: ``$VISIONKD_CACHE/embeddings`` or ``~/.cache/visionkd/embeddings``."""
    return cache_root().parent / "embeddings"


def cache_path(key: Mapping[str, Any]) -> Path:
    """Return the directory that belongs to a key."""
    text = json.dumps(key, sort_keys=True, separators=(",", ":"))
    return caches_root() / hashlib.sha256(text.encode()).hexdigest()[:12]


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    file = directory / MANIFEST
    if not file.exists():
        return None
    hint = f"Give another directory, or delete {directory}."
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"'{file}' cannot be read: {error}", hint=hint) from error
    if not isinstance(values, dict) or values.get("format") != _FORMAT or "key" not in values:
        raise DataError(f"'{directory}' is no embedding cache", hint=hint)
    if values.get("version") != _VERSION:
        raise DataError(f"'{directory}' is of format {values.get('version')}; this version reads {_VERSION}", hint=hint)
    return values


def _ends(counts: Sequence[int]) -> Tensor:
    return torch.tensor(counts, dtype=torch.int64).cumsum(0)


def _span(content: Any, name: str, place: int) -> tuple[int, int]:
    """Return where the rows of an image begin and end."""
    first = max(0, place - 1)
    ends = content.get_slice(name)[first : place + 1].tolist()
    return (0, ends[0]) if place == 0 else (ends[0], ends[1])


def _rows(content: Any, name: str, span: tuple[int, int]) -> Tensor:
    rows = content.get_slice(name)
    if span[0] == span[1]:  # an empty part is none that can be asked for
        return torch.zeros(0, *rows.get_shape()[1:])
    return rows[span[0] : span[1]]


def _check(tensors: Mapping[str, Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].contiguous().flatten().view(torch.uint8).numpy(), value)
    return value
