"""Opening pictures with boxes, in folders and archives alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np

from visionkd.data.boxes import BoxOptions, Files, kept_classes, sources_of
from visionkd.data.coco import read_coco
from visionkd.data.layout import Opened, fingerprint
from visionkd.data.voc import read_voc
from visionkd.errors import DataError, UnreadableImageError

EXPECTED = (
    "Expected COCO JSON (annotations/instances_train.json beside train/*.jpg, or train/_annotations.coco.json) or VOC"
    " XML (Annotations/*.xml beside JPEGImages/*.jpg, or train/*.xml beside train/*.jpg)"
)
_SAMPLED = 256


def open_boxes(
    files: Sequence[str],
    *,
    where: str,
    name: str,
    make: Callable[[np.ndarray], Files],
    stamps: Sequence[object],
    options: BoxOptions,
) -> Opened | None:
    """Open pictures with boxes.

    Args:
        files: Relative paths of all files.
        where: What to call the data in messages.
        name: Its short name.
        make: Gives the files at some positions of ``files``.
        stamps: Something of each file that changes with its content, such as its size.
        options: What the settings say.

    Returns:
        The data; None if these files are for another task.

    Raises:
        DataError: If the boxes cannot be used, or if options require boxes and there are none.
        RequestError: If it is not clear which file is meant.
    """

    def read(index: int) -> bytes:
        try:
            return make(np.array([index])).read(0)
        except UnreadableImageError as error:
            raise DataError(str(error)) from error

    found = read_coco(files, where=where, read=read, required=options.required)
    if found is None:
        found = read_voc(files, where=where, read=read, required=options.required)
    if found is None:
        if not options.required:
            return None
        yolo = any(path.lower().endswith(".txt") and "labels" in path.lower().split("/") for path in files)
        said = "; text files below 'labels' are none that this version reads" if yolo else ""
        raise DataError(f"'{where}' holds no pictures with boxes{said}", hint=f"{EXPECTED}.")
    found = kept_classes(found, options.classes, where=where)
    sources = sources_of(found, files, make, where=where)
    parts = ["\n".join(found.classes).encode(), *found.content]
    for split, records in found.splits.items():
        listing = "\n".join(f"{files[record.image]}\t{stamps[record.image]}" for record in records)
        parts += [split.encode(), os.fsencode(listing)]
        for index in np.linspace(0, len(records) - 1, min(_SAMPLED, len(records))).astype(int).tolist():
            try:
                parts.append(sources[split].read(index))
            except UnreadableImageError:
                parts.append(b"unreadable")
    return Opened(name, found.classes, sources, fingerprint(parts), tuple(found.messages), task="detection")
