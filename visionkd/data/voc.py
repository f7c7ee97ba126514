"""Boxes in Pascal VOC's XML: one file for each picture."""

from __future__ import annotations

import posixpath
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from xml.etree.ElementTree import Element

from visionkd.data.boxes import FORMAT, NO_IMAGE, Found, Record
from visionkd.data.layout import SPLIT_NAMES, some
from visionkd.errors import DataError
from visionkd.runtime.images import is_hidden, is_image_name

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
#: Share of the pictures that XML files must belong to where nobody says that these are boxes.
_MOST_PICTURES = 0.5
_LISTS = ("train", "val", "trainval", "test")


@dataclass
class _Annotation:
    """One file: the picture's size, and name, corners and difficulty of each object."""

    size: tuple[int, int] | None = None
    objects: list[tuple[str, list[str | None], bool]] = field(default_factory=list)


def read_voc(files: Sequence[str], *, where: str, read: Callable[[int], bytes], required: bool) -> Found | None:
    """Find pictures and their boxes in VOC's XML.

    Files belong to pictures of the same name, in the same folder or in any other. Splits are those that lists in
    ``ImageSets/Main`` tell, or else the folders that the pictures lie in.

    Args:
        files: Relative paths of all files, with forward slashes.
        where: What to call the data in messages.
        read: Gives the content of a file by its position.
        required: Take the files even where few pictures have one.

    Returns:
        The records; None where there are no such files.

    Raises:
        DataError: If a file is damaged, or no picture belongs to one of several of its name.
    """
    shown = [name for name in files if not any(map(is_hidden, name.split("/")[:-1]))]
    position = {name: index for index, name in enumerate(files)}
    notes = [name for name in shown if name.lower().endswith(".xml") and not posixpath.basename(name).startswith(".")]
    pictures = [name for name in shown if is_image_name(posixpath.basename(name))]
    if not notes or not (required or len(notes) >= _MOST_PICTURES * len(pictures)):
        return None
    if _root(read(position[notes[0]]), notes[0], where).tag != "annotation":
        return None
    pairs, alone = _paired(notes, pictures, where)
    splits = _splits(shown, position, pairs, read, where)
    found = Found((), {}, messages=splits.messages)
    notes_by_split: dict[str, list[tuple[Record, _Annotation, str]]] = defaultdict(list)
    for split, wanted in splits.members.items():
        for note in wanted:
            raw = read(position[note])
            found.content.append(raw)
            annotation = _parse(raw, note, where)
            picture = pairs.get(note)
            if picture is None:
                for _, corners, _ in annotation.objects:
                    found.fault(split, note, NO_IMAGE, ", ".join(map(str, corners)))
                continue
            notes_by_split[split].append((Record(position[picture], annotation.size), annotation, picture))
    if alone:
        found.messages.append(f"{len(alone)} files have no image of their name: {some(alone, 3)}.")
    unnoted = len(pictures) - len(pairs)
    if unnoted:
        found.messages.append(f"{unnoted} images have no XML file and are left out.")
    names = {name for rows in notes_by_split.values() for _, each, _ in rows for name, _, _ in each.objects}
    found.classes = tuple(sorted(names))
    numbers = {name: number for number, name in enumerate(found.classes)}
    offset = _offset([each for rows in notes_by_split.values() for _, each, _ in rows], found.messages)
    for split, rows in notes_by_split.items():
        for record, annotation, picture in rows:
            for name, corners, difficult in annotation.objects:
                box = _numbers(corners)
                if box is None:
                    found.fault(split, picture, FORMAT, ", ".join(map(str, corners)))
                    continue
                record.boxes.append((box[0] - offset, box[1] - offset, box[2], box[3]))
                record.labels.append(numbers[name])
                record.crowd.append(difficult)
        found.splits[split] = sorted((record for record, _, _ in rows), key=lambda record: record.image)
    if not found.splits:
        raise DataError(f"'{where}': no XML file of boxes belongs to an image, such as '{notes[0]}'")
    return found


@dataclass
class _Splits:
    members: dict[str, list[str]]
    messages: list[str] = field(default_factory=list)


def _splits(
    shown: Sequence[str],
    position: dict[str, int],
    pairs: dict[str, str],
    read: Callable[[int], bytes],
    where: str,
) -> _Splits:
    """Return the XML files of each split."""
    notes = list(pairs)
    by_stem = {_stem(note): note for note in notes}
    lists = {}
    for name in shown:
        parts = name.lower().split("/")
        if parts[-3:-1] == ["imagesets", "main"] and parts[-1][:-4] in _LISTS and parts[-1].endswith(".txt"):
            lists[parts[-1][:-4]] = name
    if not lists:
        members: dict[str, list[str]] = defaultdict(list)
        for note in notes:
            members[_split_of(pairs[note])].append(note)
        named = {split for split in members if split != "all"}
        found = _Splits(members)
        if named and "all" in members:
            outside = len(members.pop("all"))
            found.messages.append(f"{outside} images outside of {', '.join(sorted(named))} are left out.")
        return found
    found = _Splits({})
    if "train" in lists or "val" in lists:
        lists.pop("trainval", None)
    for split, name in lists.items():
        wanted = read(position[name]).decode("utf-8", "replace").split()
        own = [by_stem[each] for each in wanted if each in by_stem]
        if not own:
            found.messages.append(f"{split} has no boxes and is left out.")
            continue
        if len(own) < len(wanted):
            missing = [each for each in wanted if each not in by_stem]
            raise DataError(
                f"'{name}' of '{where}' names images without an XML file or a picture: {some(missing)}",
                hint="Take them out of the list, or add the files.",
            )
        found.members["train" if split == "trainval" else split] = own
    return found


def _split_of(picture: str) -> str:
    return next((SPLIT_NAMES[part] for part in picture.lower().split("/")[:-1] if part in SPLIT_NAMES), "all")


def _stem(name: str) -> str:
    return posixpath.splitext(posixpath.basename(name))[0]


def _paired(notes: Sequence[str], pictures: Sequence[str], where: str) -> tuple[dict[str, str], list[str]]:
    """Return the picture of each XML file, and the files that have none."""
    beside = {posixpath.splitext(name)[0]: name for name in pictures}
    by_stem: dict[str, list[str]] = defaultdict(list)
    for name in pictures:
        by_stem[_stem(name)].append(name)
    pairs, alone = {}, []
    for note in notes:
        picture = beside.get(posixpath.splitext(note)[0])
        if picture is None:
            several = by_stem.get(_stem(note), [])
            if len(several) > 1:  # one name in each split: the one of the same split is meant
                several = [name for name in several if _split_of(name) == _split_of(note)] or several
            if len(several) > 1:
                raise DataError(f"'{note}' of '{where}' may belong to any of {some(several)}")
            picture = several[0] if several else None
        if picture is None:
            alone.append(note)
        else:
            pairs[note] = picture
    return pairs, alone


def _root(raw: bytes, name: str, where: str) -> Element:
    if b"<!DOCTYPE" in raw or b"<!ENTITY" in raw:
        raise DataError(f"'{name}' of '{where}' has a document type, which no annotation needs")
    try:
        return ElementTree.fromstring(raw)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"'{name}' of '{where}' is no XML: {error}", hint="Was it written to its end?") from error


def _parse(raw: bytes, name: str, where: str) -> _Annotation:
    root = _root(raw, name, where)
    size = [_number(root.findtext(f"size/{side}")) for side in ("width", "height")]
    annotation = _Annotation((int(size[0]), int(size[1])) if size[0] and size[1] else None)
    for each in root.iter("object"):
        label = (each.findtext("name") or "").strip()
        if not label:
            raise DataError(f"'{name}' of '{where}' has an object without a name")
        corners = [each.findtext(f"bndbox/{corner}") for corner in _CORNERS]
        annotation.objects.append((label, corners, (each.findtext("difficult") or "0").strip() == "1"))
    return annotation


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def _numbers(corners: Sequence[str | None]) -> list[float] | None:
    found = [_number(text) for text in corners]
    return None if None in found else found  # type: ignore[return-value]


def _offset(annotations: Sequence[_Annotation], messages: list[str]) -> float:
    """1 where boxes count pixels from 1 and name their last one, as VOC does; 0 where they are plain coordinates."""
    firsts = [
        box[:2]
        for annotation in annotations
        for _, corners, _ in annotation.objects
        if (box := _numbers(corners)) is not None
    ]
    if any(value < 1.0 for pair in firsts for value in pair):
        messages.append("Boxes begin at 0 somewhere: pixels are counted from 0 in all files, not from 1 as in VOC.")
        return 0.0
    if any(value != int(value) for pair in firsts for value in pair):
        messages.append("Boxes have fractions of pixels, which are counted from 0 then, not from 1 as in VOC.")
        return 0.0
    return 1.0
