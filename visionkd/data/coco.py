"""Boxes in COCO's JSON: one file for each split, or one for all."""

from __future__ import annotations

import json
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from visionkd.data.boxes import FORMAT, NO_CLASS, NO_IMAGE, Found, Record
from visionkd.data.layout import SPLIT_NAMES, some
from visionkd.errors import DataError, RequestError
from visionkd.runtime.images import is_hidden, is_image_name

#: Beginnings of names of COCO's own files that hold no boxes, or the same ones again.
_OTHER = ("captions", "person_keypoints", "panoptic", "stuff", "image_info")
_LIKELY = re.compile(r"(^|[._-])(coco|instances|annotations?)([._-]|$)|^instances", re.IGNORECASE)
_PROBED = 64
_KEYS = ("images", "annotations", "categories")


def read_coco(files: Sequence[str], *, where: str, read: Callable[[int], bytes], required: bool) -> Found | None:
    """Find pictures and their boxes in COCO's JSON.

    Args:
        files: Relative paths of all files, with forward slashes.
        where: What to call the data in messages.
        read: Gives the content of a file by its position.
        required: Look into every JSON file, not only into those that are named as annotations are.

    Returns:
        The records; None where there is no such file.

    Raises:
        DataError: If a file is damaged, or boxes are written in another format.
        RequestError: If two files are there for one split.
    """
    tables, content = {}, []
    for index in _candidates(files, required):
        raw = read(index)
        table = _parse(raw, name=files[index], where=where)
        if table is not None:
            tables[files[index]] = table
            content.append(raw)
    if not tables:
        return None
    named: dict[str, list[str]] = defaultdict(list)
    for name in tables:
        named[_split_of(name)].append(name)
    for split, names in named.items():
        if len(names) > 1:
            what = f"for {split}" if split != "all" else "and none names a split"
            raise RequestError(
                f"'{where}' has {len(names)} files of boxes {what}: {some(sorted(names))}",
                hint="Give each split one file, named for it: instances_train.json, instances_val.json.",
            )
    classes, numbers, messages = _classes(tables, where)
    found = Found(classes, {}, messages=messages, content=content)
    images = [
        index
        for index, name in enumerate(files)
        if is_image_name(posixpath.basename(name)) and not any(map(is_hidden, name.split("/")[:-1]))
    ]
    for split, (name,) in named.items():
        table = tables[name]
        if split == "test" and not table["annotations"] and len(named) > 1:
            found.messages.append(f"'{name}' has no boxes, and {split} is left out.")
            continue
        others = set(named) - {split, "all"}
        found.splits[split] = _records(found, split, table, name, files, images, numbers, where, others)
    return found


def _candidates(files: Sequence[str], required: bool) -> list[int]:
    """Files that may be annotations."""
    found = []
    for index, name in enumerate(files):
        *folders, base = name.split("/")
        if not base.lower().endswith(".json") or base.startswith((".", *_OTHER)) or any(map(is_hidden, folders)):
            continue
        likely = _LIKELY.search(base[:-5]) or (folders and folders[-1].lower() in ("annotations", "annotation"))
        if required or (likely and len(folders) <= 3):
            found.append(index)
    return found


def _parse(raw: bytes, *, name: str, where: str) -> dict[str, Any] | None:
    """Return the content of a file of annotations; None where it is another file."""
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{name}' of '{where}' is no JSON: {error}", hint="Was it written to its end?") from error
    if not isinstance(table, dict) or not all(isinstance(table.get(key), list) for key in _KEYS):
        return None
    if not all(isinstance(row, dict) for key in _KEYS for row in table[key]):
        return None
    return table


def _split_of(name: str) -> str:
    """The split that a file's name tells, or else the folders above it."""
    *folders, base = name.split("/")
    for part in (base, *reversed(folders)):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLIT_NAMES:
                return SPLIT_NAMES[word]
    return "all"


def _classes(tables: Mapping[str, Mapping[str, Any]], where: str) -> tuple[tuple[str, ...], dict[Any, int], list[str]]:
    """Return the class names, the index of each category id, and what is to be said about them."""
    named: dict[Any, str] = {}
    for file, table in tables.items():
        for row in table["categories"]:
            if "id" not in row or not isinstance(row.get("name"), str):
                raise DataError(f"'{file}' of '{where}' has a category without id or name: {row}")
            if named.setdefault(row["id"], row["name"]) != row["name"]:
                both = f"'{named[row['id']]}' and '{row['name']}'"
                raise DataError(
                    f"'{where}': the category id {row['id']} is {both}", hint="All splits need the same categories."
                )
    if not named:
        raise DataError(f"'{where}': the file of boxes lists no categories")
    twice = [name for name in named.values() if list(named.values()).count(name) > 1]
    if twice:
        raise DataError(f"'{where}' has several category ids for one name: {some(sorted(set(twice)))}")
    ids = sorted(named, key=lambda key: (isinstance(key, str), key))
    messages = []
    if all(isinstance(key, int) for key in ids) and ids[-1] - ids[0] >= len(ids):
        messages.append(
            f"The category ids {ids[0]} to {ids[-1]} have holes: the {len(ids)} classes are numbered in their order."
        )
    return tuple(named[key] for key in ids), {key: number for number, key in enumerate(ids)}, messages


def _records(
    found: Found,
    split: str,
    table: Mapping[str, Any],
    file: str,
    files: Sequence[str],
    images: Sequence[int],
    numbers: Mapping[Any, int],
    where: str,
    others: set[str],
) -> list[Record]:
    places = _places([str(row.get("file_name", "")) for row in table["images"]], file, files, images, others)
    records: dict[Any, Record] = {}
    missing: dict[Any, str] = {}
    for row in table["images"]:
        name = str(row.get("file_name", ""))
        if (index := places.get(name)) is None:
            missing[row.get("id")] = name
            continue
        size = (row.get("width"), row.get("height"))
        known = all(isinstance(side, int) and side > 0 for side in size)
        records[row.get("id")] = Record(index, (int(size[0]), int(size[1])) if known else None)
    if missing and not records:
        raise DataError(
            f"'{where}': none of the {len(missing)} images that '{file}' names is there, such as"
            f" '{next(iter(missing.values()))}'",
            hint=f"Put the images of {split} beside the file, or into images/{split} or {split}.",
        )
    _check_corners(table, records, file, where)
    for row in table["annotations"]:
        record, image = records.get(row.get("image_id")), row.get("image_id")
        name = files[record.image] if record is not None else missing.get(image, f"image id {image}")
        label = numbers.get(row.get("category_id"))
        if record is None:
            found.fault(split, name, NO_IMAGE, str(row.get("bbox")))
        elif label is None:
            found.fault(split, name, NO_CLASS, f"category id {row.get('category_id')}")
        elif (corners := _corners(row.get("bbox"))) is None:
            found.fault(split, name, FORMAT, str(row.get("bbox"))[:80])
        else:
            record.boxes.append(corners)
            record.labels.append(label)
            record.crowd.append(bool(row.get("iscrowd") or row.get("ignore")))
    if missing:
        found.messages.append(
            f"{len(missing)} images that '{file}' names are missing and left out: {some(list(missing.values()), 3)}."
        )
    return sorted(records.values(), key=lambda record: record.image)


def _corners(box: Any) -> tuple[float, float, float, float] | None:
    """Left, top, right and bottom from left, top, width and height; None where these are not four numbers."""
    if not isinstance(box, list) or len(box) != 4:
        return None
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in box):
        return None
    left, top, width, height = map(float, box)
    return left, top, left + width, top + height


def _places(
    names: Sequence[str], file: str, files: Sequence[str], images: Sequence[int], others: set[str]
) -> dict[str, int]:
    """Return the position of each picture that a file of annotations names, in the folder that has most of them.

    Folders of ``others``, splits that have files of their own, are none of them.
    """
    positions = {files[index]: index for index in images}
    folders = {posixpath.dirname(file), ""}
    for name in positions:
        while name := posixpath.dirname(name):
            folders.add(name)
    split = _split_of(file)
    probes = [name.lstrip("./") for name in names[:: max(1, len(names) // _PROBED)]]

    def fit(folder: str) -> tuple[int, bool, bool, int]:
        hits = sum(posixpath.join(folder, name) in positions for name in probes)
        return hits, _split_of(f"{folder}/x") == split, folder == posixpath.dirname(file), -len(folder)

    # splits often have the same names: an image that is missing here is not the one of that name there
    best = max(sorted(each for each in folders if _split_of(f"{each}/x") not in others), key=fit)
    found = {}
    for name in names:
        index = positions.get(posixpath.normpath(posixpath.join(best, name.lstrip("./"))))
        if index is not None:
            found[name] = index
    return found


def _check_corners(table: Mapping[str, Any], records: Mapping[Any, Record], file: str, where: str) -> None:
    """Raise where all boxes make sense as two corners, or as shares of the picture, and most do not otherwise."""
    total = outside = corners = shares = 0
    for row in table["annotations"]:
        record, box = records.get(row.get("image_id")), row.get("bbox")
        if record is None or record.size is None or _corners(box) is None:
            continue
        width, height = record.size
        total += 1
        outside += box[0] + box[2] > width + 1 or box[1] + box[3] > height + 1
        corners += box[0] < box[2] <= width + 1 and box[1] < box[3] <= height + 1
        shares += max(box) <= 1.0
    if total and corners == total and outside > total / 2:
        raise DataError(
            f"'{file}' of '{where}': {outside} of {total} boxes reach outside of their image, and all of them are"
            " within it if read as two corners",
            hint="COCO's JSON has left, top, width and height: subtract left and top from the last two.",
        )
    if total > 1 and shares == total:
        raise DataError(
            f"'{file}' of '{where}': no number of any box is above 1, so they are shares of the image",
            hint="COCO's JSON is in pixels: multiply by width and height of the image.",
        )
