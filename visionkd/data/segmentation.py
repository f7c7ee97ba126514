"""Pictures with maps of classes."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from visionkd.data.dense_layout import EXPECTED, INVALID, DenseLayout, read_dense_layout
from visionkd.data.layout import Opened, fingerprint
from visionkd.data.shapes import CLASSES, Scene, ShapesSource
from visionkd.errors import DataError, UnreadableImageError
from visionkd.files import write_text
from visionkd.runtime.images import unreadable
from visionkd.types import IGNORE, Source

#: Most classes: 254 and 255 are needed for values that stand for nothing, and for pixels without a label.
MOST_CLASSES = 254
_SAMPLED = 256
_UNLABELED = -1
#: Names at the end of ``classes.txt`` that stand for pixels without a label.
_VOID = frozenset(("void", "unlabeled", "unlabelled", "ignore", "ignored"))
_INDEXED = frozenset(("L", "P", "1"))
_WIDE = frozenset(("I", "I;16", "I;16B", "I;16L", "I;16N"))
_TO_INDICES = "A map is an index or palette PNG whose values are class indices; 255 is 'no label'."


class Files(Protocol):
    """Files of a folder or an archive, as :class:`visionkd.data.folder.FolderSource` has them."""

    def load(self, index: int) -> Image.Image: ...

    def read(self, index: int) -> bytes: ...

    def name(self, index: int) -> str: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class DenseOptions:
    """What the settings say about maps.

    Attributes:
        required: Refuse data of any other kind.
        classes: Class names in the order of the values; None reads or counts them.
        ignore: Values that stand for no class, besides 255.
    """

    required: bool = False
    classes: tuple[str, ...] | None = None
    ignore: tuple[int, ...] = ()


class DenseSource:
    """Pictures and maps in a folder or an archive.

    Args:
        images: The pictures.
        maps: Their maps, in the same order.
        table: Class of each of the 256 values, 255 to be ignored, 254 for values that stand for nothing.
        num_classes: Number of classes, for messages.
    """

    #: Targets are maps, as large as the pictures.
    maps = True

    def __init__(self, images: Files, labels: Files, table: np.ndarray, num_classes: int) -> None:
        self.images = images
        self.labels = labels
        self.table = table
        self.num_classes = num_classes
        #: No picture has one class.
        self.targets = np.full(len(images), _UNLABELED, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Image.Image:
        return self.images.load(index)

    def read(self, index: int) -> bytes:
        """Return the content of the picture's file; raises UnreadableImageError."""
        return self.images.read(index)

    def name(self, index: int) -> str:
        return self.images.name(index)

    def target(self, index: int) -> np.ndarray:
        """Decode the map of a picture.

        Returns:
            Class indices with 255 ignored, uint8 H x W.

        Raises:
            UnreadableImageError: If the file cannot be decoded.
            DataError: If it is no map of the data's classes.
        """
        name = self.labels.name(index)
        found = decode_map(self.labels.read(index), name=name)
        target = self.table[found]
        if (target == INVALID).any():
            wrong = np.unique(found[target == INVALID]).tolist()
            raise DataError(
                f"'{name}' has values that stand for none of the {self.num_classes} classes: {_listed(wrong)}",
                hint=f"Values are class indices from 0 to {self.num_classes - 1}, and 255 is 'no label'. Leave values"
                f" out with -o data.ignore=[{','.join(map(str, wrong[:5]))}], or name all classes in classes.txt.",
            )
        return target


class ShapesMasks(ShapesSource):
    """The embedded scenes with their maps: 0 is background, the classes of ``shapes`` follow."""

    maps = True
    _last: tuple[int, Scene] | None = None

    @property
    def targets(self) -> np.ndarray:
        """-1 for each scene: none has one class."""
        return np.full(len(self), _UNLABELED, dtype=np.int64)

    def scene(self, index: int) -> Scene:
        last = self._last  # picture and map are asked for one after the other
        if last is None or last[0] != index:
            self._last = last = (index, super().scene(index))
        return last[1]

    def target(self, index: int) -> np.ndarray:  # type: ignore[override]
        return self.scene(index).mask


#: Names of the classes in the maps of ``shapes``.
MASK_CLASSES = ("background", *CLASSES)


def decode_map(content: bytes, *, name: str) -> np.ndarray:
    """Decode an index or palette picture as it is.

    Args:
        content: The file.
        name: What to call it in messages.

    Returns:
        Values, uint8 H x W.

    Raises:
        UnreadableImageError: If the file cannot be decoded.
        DataError: If it is a colour picture, or holds values above 255.
    """
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders meet broken files with errors of many types
        raise unreadable(name, error) from error
    if image.mode in _WIDE:
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > IGNORE):
            raise DataError(f"'{name}' has values up to {int(values.max())}; 255 is the highest", hint=_TO_INDICES)
        return values.astype(np.uint8)
    if image.mode not in _INDEXED:
        raise DataError(f"'{name}' is a picture of mode {image.mode}, not a map of class indices", hint=_TO_INDICES)
    values = np.asarray(image)
    return values.astype(np.uint8) if image.mode == "1" else values


def open_dense(
    files: Sequence[str],
    folders: Sequence[str],
    *,
    where: str,
    name: str,
    make: Callable[[np.ndarray], Files],
    stamps: Sequence[object],
    options: DenseOptions,
) -> Opened | None:
    """Open pictures with maps of classes.

    Args:
        files: Relative paths of all files.
        folders: Relative paths of all folders.
        where: What to call the data in messages.
        name: Its short name.
        make: Gives the files at some positions of ``files``.
        stamps: Something of each file that changes with its content, such as its size.
        options: What the settings say.

    Returns:
        The data; None if these files are for another task.

    Raises:
        DataError: If pictures and maps do not go together, or if options require maps and there are none.
    """

    def read(index: int) -> bytes:
        return make(np.array([index])).read(0)

    layout = read_dense_layout(files, folders, where=where, read=read)
    if layout is None:
        if options.required:
            raise DataError(f"'{where}' holds no pictures with maps of classes", hint=f"{EXPECTED}.")
        return None
    pairs = {split: (make(found.images), make(found.maps)) for split, found in layout.splits.items()}
    parts = []
    for split, found in layout.splits.items():
        for indices, members in ((found.images, pairs[split][0]), (found.maps, pairs[split][1])):
            listing = "\n".join(f"{files[index]}\t{stamps[index]}" for index in indices)
            parts += [split.encode(), os.fsencode(listing)]
            for index in np.linspace(0, len(indices) - 1, min(_SAMPLED, len(indices))).astype(int):
                try:
                    parts.append(members.read(int(index)))
                except UnreadableImageError:
                    parts.append(b"unreadable")
    messages = list(layout.messages)
    classes, table = _classes(layout, pairs, options, read, fingerprint(parts), messages, where)
    parts += [table.tobytes(), "\n".join(classes).encode()]
    sources: dict[str, Source] = {
        split: DenseSource(images, labels, table, len(classes)) for split, (images, labels) in pairs.items()
    }
    return Opened(name, classes, sources, fingerprint(parts), tuple(messages), task="segmentation")


def _classes(
    layout: DenseLayout,
    pairs: dict[str, tuple[Files, Files]],
    options: DenseOptions,
    read: Callable[[int], bytes],
    key: str,
    messages: list[str],
    where: str,
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the class names, and the class of each of the 256 values."""
    classes, ignore = options.classes, set(options.ignore)
    if classes is None and layout.class_file is not None:
        classes = tuple(line.strip() for line in read(layout.class_file).decode("utf-8-sig").splitlines())
        classes = tuple(line for line in classes if line and not line.startswith("#"))
        while classes and classes[-1].lower() in _VOID:
            messages.append(f"The value {len(classes) - 1}, '{classes[-1]}', counts as 'no label'.")
            ignore.add(len(classes) - 1)
            classes = classes[:-1]
    elif classes is None:
        classes = layout.classes
    if classes is None:
        classes = _counted(pairs, ignore, key, messages, where)
    if not 2 <= len(classes) <= MOST_CLASSES or len(set(classes)) < len(classes):
        twice = next((name for name in classes if classes.count(name) > 1), None)
        reason = f"'{twice}' is there twice" if twice else f"{len(classes)} of them; 2 to {MOST_CLASSES} are allowed"
        raise DataError(
            f"'{where}': the class names do not do: {reason}", hint="classes.txt has one name in each line."
        )
    if layout.table is not None and layout.classes == classes:
        table = layout.table.copy()
    else:
        table = np.full(256, INVALID, dtype=np.uint8)
        table[: len(classes)] = np.arange(len(classes))
    table[[IGNORE, *ignore]] = IGNORE
    return classes, table


def _counted(
    pairs: dict[str, tuple[Files, Files]], ignore: set[int], key: str, messages: list[str], where: str
) -> tuple[str, ...]:
    """Return names for as many classes as the values of all maps tell."""
    first = _values(pairs, key)
    found = sorted(value for value in first if value not in ignore and value != IGNORE)
    if len(found) < 2 or found[-1] >= MOST_CLASSES or (found[-1] >= 32 and len(found) <= (found[-1] + 1) // 2):
        highest = found[-1] if found else IGNORE
        raise DataError(
            f"'{where}': the values of the maps are {_listed(found) or 'none'} (besides 255, 'no label'), which are no"
            f" class indices: see '{first.get(highest, '')}'",
            hint="Number the classes from 0, masks of two classes with 0 and 1; or name them in classes.txt.",
        )
    count = sum(len(labels) for _, labels in pairs.values())
    missing = f"; {_listed(sorted(set(range(found[-1])) - set(found)))} never occur" if found[-1] >= len(found) else ""
    messages.append(
        f"There is no classes.txt: the values of {count} maps tell {found[-1] + 1} classes, 0 to {found[-1]}{missing}."
    )
    return tuple(f"class_{value}" for value in range(found[-1] + 1))


def _values(pairs: dict[str, tuple[Files, Files]], key: str) -> dict[int, str]:
    """Return the values of all maps, each with a file that has it; kept in the cache directory."""
    from visionkd.data.archive import cache_root

    kept = Path(cache_root()) / "maps" / f"{key[:32]}.json"
    try:
        return {int(value): name for value, name in json.loads(kept.read_text("utf-8")).items()}
    except (OSError, ValueError, AttributeError):
        pass
    first: dict[int, str] = {}

    def look(labels: Files, index: int) -> tuple[np.ndarray, str]:
        name = labels.name(index)
        try:
            values = decode_map(labels.read(index), name=name)
        except UnreadableImageError:
            return np.zeros(0, dtype=np.uint8), name
        return np.flatnonzero(np.bincount(values.reshape(-1), minlength=256)), name

    with ThreadPoolExecutor() as pool:
        for _, labels in pairs.values():
            for values, name in pool.map(lambda index, labels=labels: look(labels, index), range(len(labels))):
                for value in values.tolist():
                    first.setdefault(int(value), name)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, json.dumps({str(value): name for value, name in sorted(first.items())}))
    except OSError:
        pass  # a cache directory that cannot be written to costs time only
    return first


def _listed(values: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, values[:most]))
    return shown if len(values) <= most else f"{shown} and {len(values) - most} more"
