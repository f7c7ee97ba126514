"""Pictures with boxes, whatever they were written down in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from PIL import Image

from visionkd.data.layout import some
from visionkd.data.shapes import CLASSES, COMBINATIONS, Scene, ShapesSource
from visionkd.data.subset import SubsetSource
from visionkd.errors import DataError
from visionkd.types import Source

_UNLABELED = -1
#: Boxes that reach further outside of their picture than this, in pixels, are faults of the annotation.
_ROUNDING = 1.0
#: Share of faulty boxes from which on it is the file that is wrong, not its boxes.
_MOST_FAULTS = 0.5

FORMAT, NO_AREA, OUTSIDE, REACHES_OUT = "wrong format", "no area", "outside the image", "reaches outside the image"
NO_IMAGE, NO_CLASS = "its image is missing", "unknown class"
_HINTS = {
    FORMAT: "A box is four finite numbers: left, top, width and height in COCO JSON, xmin, ymin, xmax and ymax in VOC"
    " XML.",
    NO_AREA: "COCO JSON has left, top, width and height, not two corners; VOC XML has two corners.",
    OUTSIDE: "Boxes are in pixels of the picture as it lies there, before any resizing.",
    NO_IMAGE: "Give the folder that holds the images too, each by the name that the annotation has for it.",
    NO_CLASS: "Each box needs one of the classes that the file lists.",
}


class Files(Protocol):
    """Files of a folder or an archive, as :class:`visionkd.data.folder.FolderSource` has them."""

    def load(self, index: int) -> Image.Image: ...

    def read(self, index: int) -> bytes: ...

    def name(self, index: int) -> str: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class BoxOptions:
    """What the settings say about boxes.

    Attributes:
        required: Refuse data of any other kind.
        classes: Classes to keep, in this order; None keeps all.
    """

    required: bool = False
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Fault:
    """Something wrong with one box.

    Attributes:
        image: Path of the picture.
        kind: One of the constants of this module.
        text: What it is about.
    """

    image: str
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


@dataclass
class Record:
    """What was written down about one picture.

    Attributes:
        image: Position of the picture in the list of files.
        size: Width and height as written down; None where it is not.
        boxes: Left, top, right and bottom of each box, as far as they are numbers.
        labels: Class index of each.
        crowd: Whether a box stands for many objects, or for one that is too hard to count.
    """

    image: int
    size: tuple[int, int] | None = None
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)


@dataclass
class Found:
    """What a reader of annotations found.

    Attributes:
        classes: Class names in index order.
        splits: Records by split; ``all`` without splits.
        faults: What could not be taken, by split.
        messages: Choices made, to be said aloud.
        content: Bytes that the annotations follow from, for the fingerprint.
    """

    classes: tuple[str, ...]
    splits: dict[str, list[Record]]
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    content: list[bytes] = field(default_factory=list)

    def fault(self, split: str, image: str, kind: str, text: str) -> None:
        self.faults.setdefault(split, []).append(Fault(image, kind, text))


class BoxSource:
    """Pictures and boxes in a folder or an archive.

    Args:
        images: The pictures.
        sizes: Width and height of each as written down, N x 2; 0 where unknown.
        counts: Boxes of each picture, N.
        boxes: Those of all pictures, one after the other: M x 4 of float32, left, top, right, bottom in pixels.
        labels: Their class indices, M of int64.
        crowd: Which of them stand for many objects, M of bool.
        faults: Boxes that were left out or cut, for ``data check``.
    """

    #: Targets are boxes.
    boxed = True

    def __init__(
        self,
        images: Files,
        sizes: np.ndarray,
        counts: np.ndarray,
        boxes: np.ndarray,
        labels: np.ndarray,
        crowd: np.ndarray,
        faults: Sequence[Fault] = (),
    ) -> None:
        self.images = images
        self.sizes = sizes
        self.faults = tuple(faults)
        #: No picture has one class.
        self.targets = np.full(len(images), _UNLABELED, dtype=np.int64)
        self._ends = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._boxes, self._labels, self._crowd = boxes, labels, crowd

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Image.Image:
        """Decode a picture.

        Raises:
            UnreadableImageError: If it cannot be decoded.
            DataError: If it has another size than its boxes were drawn for.
        """
        image = self.images.load(index)
        size = tuple(self.sizes[index].tolist())
        if all(size) and image.size != size:
            raise different_sizes(self.name(index), image.size, size)
        return image

    def read(self, index: int) -> bytes:
        """Return the content of the picture's file; raises UnreadableImageError."""
        return self.images.read(index)

    def name(self, index: int) -> str:
        return self.images.name(index)

    def target(self, index: int) -> dict[str, np.ndarray]:
        """Return ``boxes`` (N x 4 of float32: left, top, right, bottom in pixels), ``labels`` (N of int64) and
        ``crowd`` (N of bool) of a picture; none of them may be written to."""
        own = slice(self._ends[index], self._ends[index + 1])
        return {"boxes": self._boxes[own], "labels": self._labels[own], "crowd": self._crowd[own]}


class ShapesBoxes(ShapesSource):
    """The embedded scenes with a box around the visible part of each object.

    Args:
        seed: Chooses the data set.
        num_samples: How many scenes.
        size: Height and width in pixels.
        first: Index of the first scene.
        classes: Names of shapes, or of combinations of colour and shape, in index order; other objects have no box.
    """

    boxed = True
    _last: tuple[int, Scene] | None = None

    def __init__(
        self, seed: int, num_samples: int, size: int, first: int = 0, *, classes: Sequence[str] = CLASSES
    ) -> None:
        super().__init__(seed, num_samples, size, first)
        number = {name: index for index, name in enumerate(classes)}
        rows = np.array([number.get(name, _UNLABELED) for name in COMBINATIONS]).reshape(-1, len(CLASSES))
        kinds = np.array([number.get(name, _UNLABELED) for name in CLASSES])
        #: Class of each colour and shape; -1 for none.
        self._table = np.maximum(rows, kinds)

    @property
    def targets(self) -> np.ndarray:
        """-1 for each scene: none has one class."""
        return np.full(len(self), _UNLABELED, dtype=np.int64)

    def scene(self, index: int) -> Scene:
        last = self._last  # picture and boxes are asked for one after the other
        if last is None or last[0] != index:
            self._last = last = (index, super().scene(index))
        return last[1]

    def target(self, index: int) -> dict[str, np.ndarray]:  # type: ignore[override]
        scene = self.scene(index)
        labels = self._table[scene.box_colours, scene.box_labels]
        kept = labels != _UNLABELED
        return {"boxes": scene.boxes_xyxy[kept], "labels": labels[kept], "crowd": np.zeros(kept.sum(), dtype=bool)}


class NovelClasses:
    """A source of boxes, some of whose classes are novel: hidden in training, and measured apart in validation.

    Args:
        source: Pictures with boxes.
        novel: Indices of the novel classes.
        hidden: Leave their boxes out. The pictures stay, so that they show objects that nobody has marked.
    """

    boxed = True

    def __init__(self, source: Source, novel: Sequence[int], *, hidden: bool) -> None:
        self.source = source
        self.novel = tuple(int(label) for label in novel)
        self.hidden = hidden

    @property
    def targets(self) -> np.ndarray:
        """-1 for each picture: none has one class."""
        return np.full(len(self), _UNLABELED, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> Any:
        return self.source.load(index)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def target(self, index: int) -> dict[str, np.ndarray]:
        target = self.source.target(index)
        if not self.hidden:
            return target
        kept = ~np.isin(target["labels"], self.novel)
        return {name: values[kept] for name, values in target.items()}


def novel_of(source: Source) -> tuple[int, ...]:
    """Return the indices of the novel classes of a source of boxes."""
    return tuple(getattr(source.base if isinstance(source, SubsetSource) else source, "novel", ()))


#: Names of the classes of the boxes of ``shapes``, by what they are called after.
BOX_CLASSES = {"shapes": CLASSES, "combinations": COMBINATIONS}


def different_sizes(name: str, image: Sequence[int], written: Sequence[int]) -> DataError:
    """Return the error about a picture that is not as large as its annotation says."""
    has, said = (f"{width} x {height}" for width, height in (image, written))
    return DataError(
        f"'{name}' has {has} pixels, and its boxes were drawn on {said}",
        hint="Boxes belong to the picture as it was when they were drawn, turned as its EXIF data says;"
        " 'visionkd data check' lists all pictures that differ.",
    )


def kept_classes(found: Found, wanted: Sequence[str] | None, *, where: str) -> Found:
    """Keep boxes of some classes, in the order of their names; None keeps all.

    Raises:
        DataError: If one of them is not there.
    """
    if wanted is None:
        return found
    missing = [name for name in wanted if name not in found.classes]
    if missing:
        raise DataError(f"'{where}' has no class {some(missing)}", hint=f"Its classes: {some(found.classes, 20)}.")
    number = {found.classes.index(name): place for place, name in enumerate(wanted)}
    dropped = 0
    for record in (record for records in found.splits.values() for record in records):
        keep = [place for place, label in enumerate(record.labels) if label in number]
        dropped += len(record.labels) - len(keep)
        record.boxes = [record.boxes[place] for place in keep]
        record.labels = [number[record.labels[place]] for place in keep]
        record.crowd = [record.crowd[place] for place in keep]
    if dropped:
        found.messages.append(f"{dropped} boxes of classes other than the {len(wanted)} asked for are left out.")
    found.classes = tuple(wanted)
    return found


def sources_of(
    found: Found, files: Sequence[str], make: Callable[[np.ndarray], Files], *, where: str
) -> dict[str, BoxSource]:
    """Turn records into sources; boxes that cannot be used are left out, and the rest is cut at the picture's edge.

    Raises:
        DataError: If most boxes of a split cannot be used, or if there is none at all.
    """
    sources = {}
    for split, records in found.splits.items():
        images = make(np.array([record.image for record in records], dtype=np.int64))
        sizes = np.array([record.size or (0, 0) for record in records], dtype=np.int64).reshape(-1, 2)
        owner = np.repeat(np.arange(len(records)), [len(record.boxes) for record in records])
        boxes = np.array([box for record in records for box in record.boxes], dtype=np.float64).reshape(-1, 4)
        labels = np.array([label for record in records for label in record.labels], dtype=np.int64)
        crowd = np.array([each for record in records for each in record.crowd], dtype=bool)
        boxes, kinds = _cut(boxes, sizes[owner])
        faults = found.faults.setdefault(split, [])
        for place in np.flatnonzero(kinds != ""):
            record = records[owner[place]]
            box = record.boxes[place - int(np.searchsorted(owner, owner[place]))]
            faults.append(Fault(files[record.image], str(kinds[place]), ", ".join(f"{value:g}" for value in box)))
        usable = (kinds == "") | (kinds == REACHES_OUT)
        _check_share(split, faults, len(usable), where)
        counts = np.bincount(owner[usable], minlength=len(records))
        sources[split] = BoxSource(
            images, sizes, counts, boxes[usable].astype(np.float32), labels[usable], crowd[usable], faults
        )
    if not any(len(source._labels) for source in sources.values()):
        raise DataError(f"'{where}': no image has a box", hint="'visionkd data check DATA' says what is there.")
    found.messages += _said(found)
    return sources


def _cut(boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut boxes, M x 4, at the edges of pictures of ``sizes``, M x 2 (0: unknown); and what is wrong with each."""
    kinds = np.full(len(boxes), "", dtype="<U32")
    finite = np.isfinite(boxes).all(1)
    known = (sizes > 0).all(1)
    limits = np.where(known[:, None], sizes, np.inf)
    edges = np.concatenate([limits, limits], axis=1)
    cut = np.clip(np.nan_to_num(boxes), 0.0, edges)
    with np.errstate(invalid="ignore"):
        empty = (boxes[:, 2:] <= boxes[:, :2]).any(1)
        kinds[np.abs(cut - boxes).max(1, initial=0.0) > _ROUNDING] = REACHES_OUT
    kinds[(cut[:, 2:] <= cut[:, :2]).any(1)] = OUTSIDE
    kinds[empty] = NO_AREA
    kinds[~finite] = FORMAT
    return cut, kinds


def _check_share(split: str, faults: Sequence[Fault], count: int, where: str) -> None:
    """Raise where so many boxes are faulty that the file means something else than it was read as."""
    counts = Counter(fault.kind for fault in faults)
    read = count + sum(counts[kind] for kind in (NO_IMAGE, NO_CLASS))
    for kind, number in counts.most_common(1):
        if number > _MOST_FAULTS * max(1, read) and number > 1:
            first = next(fault for fault in faults if fault.kind == kind)
            raise DataError(
                f"'{where}': {number} of {read} boxes of {split} are no use: {kind}, such as {first.text} of"
                f" '{first.image}'",
                hint=_HINTS.get(kind, _HINTS[OUTSIDE]),
            )


def _said(found: Found) -> list[str]:
    """Say what was left out, and how many pictures show nothing."""
    said = []
    for split, records in found.splits.items():
        counts = Counter(fault.kind for fault in found.faults.get(split, ()))
        cut = counts.pop(REACHES_OUT, 0)
        if counts:
            kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
            said.append(f"{sum(counts.values())} boxes of {split} are left out ({kinds}).")
        if cut:
            said.append(f"{cut} boxes of {split} reach outside of their image and are cut there.")
        empty = sum(not record.boxes for record in records)
        if empty:
            said.append(f"{empty} images of {split} have no boxes: they show background.")
    if any(found.faults.values()):
        said.append("'visionkd data check' lists the boxes that were left out or cut.")
    return said
