"""Images in folders, one for each class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from visionkd.data.boxes import BoxOptions
from visionkd.data.detection import open_boxes
from visionkd.data.layout import UNLABELED, Labels, Opened, fingerprint, read_layout
from visionkd.data.segmentation import DenseOptions, open_dense
from visionkd.errors import DataError, UnreadableImageError
from visionkd.runtime.images import decode_rgb, walk

_SAMPLED = 256


class Names:
    """An immutable list of strings in two arrays.

    A Python list of a million strings is copied page by page into every loader process, because reading a string
    changes its reference count. Arrays stay shared.
    """

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self._ends):
            raise IndexError(index)
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())


class FolderSource:
    """Image files below a directory.

    Args:
        root: The directory.
        names: Paths relative to it.
        targets: Class indices, one for each name.
        empty_classes: Class folders without an image, for ``data check``.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        names: Sequence[str],
        targets: Sequence[int],
        empty_classes: Sequence[str] = (),
    ) -> None:
        self.root = os.path.abspath(root)
        self.targets = np.asarray(targets, dtype=np.int64)
        self.empty_classes = tuple(empty_classes)
        self._names = Names(names)

    def __len__(self) -> int:
        return len(self._names)

    def load(self, index: int) -> Image.Image:
        return decode_rgb(os.path.join(self.root, self._names[index]), name=self._names[index])

    def target(self, index: int) -> int:
        return int(self.targets[index])

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> bytes:
        """Return the file's content; raises UnreadableImageError."""
        name = self._names[index]
        try:
            return Path(self.root, name).read_bytes()
        except OSError as error:
            raise UnreadableImageError(f"cannot read '{name}': {(error.strerror or str(error)).lower()}") from error


def open_folder(
    path: str | os.PathLike[str],
    *,
    labels: Labels = "required",
    dense: DenseOptions | None = None,
    boxes: BoxOptions | None = None,
) -> Opened:
    """Open a directory of classes, of splits of classes, or of pictures with maps of classes or with boxes.

    Args:
        path: The directory.
        labels: What to do without class folders; see :func:`visionkd.data.layout.read_layout`.
        dense: What the settings say about maps; None takes none.
        boxes: What the settings say about boxes; None takes none.

    Raises:
        DataError: If it holds no usable images, or cannot be listed.
        RequestError: If it holds data for another task.
    """
    where = os.fspath(path)
    files, sizes, folders = [], [], []
    try:
        for name, is_dir, size in walk(where):
            if is_dir:
                folders.append(name)
            else:
                files.append(name)
                sizes.append(size)
    except OSError as error:
        raise DataError(
            f"cannot list '{error.filename or where}': {(error.strerror or str(error)).lower()}",
            hint="Check the permissions of the folder and of those above it.",
        ) from error
    name = os.path.basename(os.path.abspath(where))

    def make(indices: np.ndarray) -> FolderSource:
        return FolderSource(where, [files[index] for index in indices], np.full(len(indices), UNLABELED))

    opened = None
    if dense is not None:
        opened = open_dense(files, folders, where=where, name=name, make=make, stamps=sizes, options=dense)
    if opened is None and boxes is not None:
        opened = open_boxes(files, where=where, name=name, make=make, stamps=sizes, options=boxes)
    if opened is not None:
        return opened
    layout = read_layout(files, folders, where=where, labels=labels)
    sources = {}
    parts = []
    for split, found in layout.splits.items():
        names = [files[index] for index in found.members]
        source = FolderSource(where, names, found.targets, found.empty_classes)
        sources[split] = source
        listing = "\n".join(f"{files[index]}\t{sizes[index]}" for index in found.members)
        parts += [split.encode(), os.fsencode(listing)]
        # Sizes tell nearly every replaced file from its predecessor; a few contents tell a whole set that was made
        # again in a format of fixed size. Times of change are left out: they differ between copies of the same data.
        for index in np.linspace(0, len(names) - 1, min(_SAMPLED, len(names))).astype(int):
            try:
                parts.append(source.read(int(index)))
            except UnreadableImageError:
                parts.append(b"unreadable")
    return Opened(
        name=name,
        classes=layout.classes,
        sources=sources,
        fingerprint=fingerprint(parts),
        messages=tuple(layout.messages),
    )
