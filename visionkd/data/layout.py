"""What a list of paths says about a data set: splits, classes, or a task other than classification.

Folders and archives are read by the same rules, so a data set means the same inside a tar as outside.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from visionkd.errors import DataError, RequestError
from visionkd.runtime.images import is_hidden, is_image_name
from visionkd.types import Source, TaskName

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_EXPECTED = "Expected <split>/<class>/*.jpg with splits train, val and test, or <class>/*.jpg"
_WITHOUT = "Images without labels are enough for 'visionkd distill --method ssld', which learns from the teacher alone"
#: Class index of an image without a label.
UNLABELED = -1
#: Whether class folders must be there, may be, or are not looked for.
Labels = Literal["required", "optional", "ignored"]
# Folder names beside 'images' that hold the labels of other tasks.
_MASKS = frozenset(("masks", "mask", "labels", "label", "segmentationclass", "gt", "gtfine", "annotations", "annot"))


@dataclass(frozen=True)
class Opened:
    """A data set as its files describe it, before splits are chosen and limits applied.

    Attributes:
        name: Short name.
        classes: Class names in index order; empty where no image has a label.
        sources: Sources by split; a flat data set has the one key ``all``.
        fingerprint: SHA-256 over the samples.
        messages: What was left out, to be said aloud.
        task: What the targets are.
    """

    name: str
    classes: tuple[str, ...]
    sources: Mapping[str, Source]
    fingerprint: str
    messages: tuple[str, ...] = ()
    task: TaskName = "classification"


@dataclass
class SplitFiles:
    """The samples of one split.

    Attributes:
        members: Positions in the list of files.
        targets: Class indices, one for each member.
        empty_classes: Names of class folders without an image.
    """

    members: np.ndarray
    targets: np.ndarray
    empty_classes: tuple[str, ...] = ()


@dataclass
class Layout:
    """What :func:`read_layout` found."""

    classes: tuple[str, ...]
    splits: dict[str, SplitFiles]
    messages: list[str] = field(default_factory=list)


def read_layout(files: Sequence[str], folders: Iterable[str], *, where: str, labels: Labels = "required") -> Layout:
    """Find splits and classes in a list of paths.

    Args:
        files: Relative paths of all files, with forward slashes.
        folders: Relative paths of all folders, which tell empty classes.
        where: What to call the data in messages.
        labels: ``required`` refuses images that lie in fewer than two class folders; ``optional`` takes them as
            unlabelled; ``ignored`` takes every image, wherever it lies, as unlabelled.

    Raises:
        DataError: If there is no image, no class folder, or a class that training does not know.
        RequestError: If this is the layout of another task.
    """
    paths = [path.split("/") for path in files]
    dirs = [path.split("/") for path in folders]
    images = [index for index, parts in enumerate(paths) if _is_image(parts)]
    if labels == "ignored":
        if not images:
            raise DataError(f"no images in '{where}'", hint="Any folders will do, with images that Pillow reads.")
        return Layout((), {"all": _without_labels(images)})
    _refuse_other_tasks(paths, dirs, where)
    if not images:
        raise DataError(f"no images in '{where}'", hint=_EXPECTED)
    depth = _depth_of_root(paths, dirs, images)
    tree: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index in images:
        parts = paths[index][depth:]
        # 'train/cat/a/b.jpg' belongs to class 'cat' in a split layout and to class 'train' in a flat one.
        tree[parts[0] if len(parts) > 1 else ""][parts[1] if len(parts) > 2 else ""].append(index)
    prefix = paths[images[0]][:depth]
    dirs = [parts[depth:] for parts in dirs if parts[:depth] == prefix and len(parts) > depth]
    splits = {top: SPLIT_NAMES[top.lower()] for top in tree if top.lower() in SPLIT_NAMES and any(tree[top])}
    if labels == "optional" and (unlabeled := _read_unlabeled(tree, splits)) is not None:
        return unlabeled
    if splits:
        return _read_splits(tree, dirs, splits, where)
    return _read_flat(tree, dirs, where)


def _is_image(parts: Sequence[str]) -> bool:
    return is_image_name(parts[-1]) and not any(is_hidden(part) for part in parts[:-1])


def _depth_of_root(paths: list[list[str]], dirs: list[list[str]], images: list[int]) -> int:
    """How many leading folders hold nothing but the data set (``cifar10/train/...`` unpacks into one folder)."""
    depth = 0
    while True:
        tops = {paths[index][depth] if len(paths[index]) > depth + 1 else "" for index in images}
        tops |= {parts[depth] for parts in dirs if len(parts) > depth and not is_hidden(parts[depth])}
        if len(tops) != 1 or "" in tops or next(iter(tops)).lower() in SPLIT_NAMES:
            return depth
        # One class folder alone is not a wrapper: below it lie images, not folders of images.
        if any(len(paths[index]) <= depth + 2 for index in images):
            return depth
        depth += 1


def _read_splits(tree, dirs: list[list[str]], splits: dict[str, str], where: str) -> Layout:
    messages = []
    if len(set(splits.values())) < len(splits):
        raise RequestError(f"'{where}' has two folders for one split: {', '.join(sorted(splits))}", hint=_EXPECTED)
    ignored = sum(len(found) for top in tree if top not in splits for found in tree[top].values())
    ignored += sum(len(tree[top].get("", ())) for top in splits)
    if ignored:
        messages.append(f"{ignored} images outside {', '.join(sorted(splits))}/<class> are left out.")
    named = {split: {name: found for name, found in tree[top].items() if name} for top, split in splits.items()}
    first = "train" if "train" in named else "val" if "val" in named else "test"
    classes = tuple(sorted(named[first]))
    result = {}
    for top, split in splits.items():
        strangers = sorted(set(named[split]) - set(classes))
        if strangers:
            raise DataError(
                f"'{where}': {split} has classes that {first} lacks: {some(strangers)}",
                hint=f"Give each of them images in {first}, or take them out of {split}.",
            )
        folders = {parts[1] for parts in dirs if len(parts) >= 2 and parts[0] == top and not is_hidden(parts[1])}
        empty = tuple(sorted((folders | set(classes)) - set(named[split])))
        result[split] = _members(named[split], classes, empty)
        if empty:
            messages.append(f"{split} has no images of {some(empty)}.")
    return _checked(Layout(classes, result, messages), where)


def _read_flat(tree, dirs: list[list[str]], where: str) -> Layout:
    named = {top: [index for found in below.values() for index in found] for top, below in tree.items() if top}
    messages = []
    loose = sum(len(found) for found in tree[""].values()) if "" in tree else 0
    if not named:
        raise DataError(f"'{where}' holds {loose} images but no class folders", hint=f"{_EXPECTED}. {_WITHOUT}.")
    if _are_splits(named):
        raise DataError(
            f"'{where}' holds images in {', '.join(sorted(named))}, but no class folders there",
            hint=f"{_EXPECTED}. {_WITHOUT}.",
        )
    if loose:
        messages.append(f"{loose} images outside the class folders are left out.")
    classes = tuple(sorted(named))
    empty = tuple(sorted({parts[0] for parts in dirs if not is_hidden(parts[0])} - set(classes)))
    if empty:
        messages.append(f"Folders without images are left out: {some(empty)}.")
    return _checked(Layout(classes, {"all": _members(named, classes, empty)}, messages), where)


def _are_splits(tops: Iterable[str]) -> bool:
    """Whether all folders are named as splits: two classes 'train' and 'test' are nothing that anybody has."""
    return all(top.lower() in SPLIT_NAMES for top in tops)


def _read_unlabeled(tree, splits: dict[str, str]) -> Layout | None:
    """Take images in fewer than two class folders as unlabelled, in their splits; None where there are classes."""
    tops = [top for top in tree if top]
    if not splits and tops and _are_splits(tops):
        splits = {top: SPLIT_NAMES[top.lower()] for top in tops}
    classes = {name for top in splits for name in tree[top] if name} if splits else set(tops)
    if len(classes) > 1 or len(set(splits.values())) < len(splits):
        return None
    groups: dict[str, list[int]] = defaultdict(list)
    for top, below in tree.items():
        groups[splits.get(top, "") if splits else "all"] += [index for found in below.values() for index in found]
    left_out = len(groups.pop("", ()))
    messages = [f"{left_out} images outside {', '.join(sorted(splits))} are left out."] if left_out else []
    return Layout((), {split: _without_labels(sorted(members)) for split, members in groups.items()}, messages)


def _without_labels(images: Sequence[int]) -> SplitFiles:
    return SplitFiles(np.array(images, dtype=np.int64), np.full(len(images), UNLABELED, dtype=np.int64))


def _members(named: Mapping[str, list[int]], classes: tuple[str, ...], empty: tuple[str, ...]) -> SplitFiles:
    members = [(index, label) for label, name in enumerate(classes) for index in named.get(name, ())]
    table = np.array(members, dtype=np.int64).reshape(-1, 2)
    return SplitFiles(table[:, 0].copy(), table[:, 1].copy(), empty)


def _checked(layout: Layout, where: str) -> Layout:
    if len(layout.classes) < 2:
        raise DataError(
            f"'{where}' has one class, '{layout.classes[0]}'; a classifier needs at least two",
            hint=f"{_EXPECTED}. {_WITHOUT}.",
        )
    return layout


def some(names: Sequence[str], most: int = 5) -> str:
    """Return the first names, quoted, and how many more there are."""
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _refuse_other_tasks(paths: list[list[str]], dirs: list[list[str]], where: str) -> None:
    """Raise for layouts of segmentation and detection, whose folders would otherwise be read as classes."""
    by_parent: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for parts in dirs:
        by_parent[tuple(parts[:-1])].add(parts[-1].lower())
    suffixes: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for parts in paths:
        suffixes[tuple(part.lower() for part in parts[:-1])].add(parts[-1].rsplit(".", 1)[-1].lower())
    task = None
    for parent, names in by_parent.items():
        if len(parent) > 2:
            continue
        at = tuple(part.lower() for part in parent)
        if "jpegimages" in names and names & {"annotations", "segmentationclass"}:
            task = "segmentation" if "segmentationclass" in names else "detection"
        elif {"images", "labels"} <= names and any(
            "txt" in found for folder, found in suffixes.items() if folder[: len(at) + 1] == (*at, "labels")
        ):
            task = "detection"
        elif "annotations" in names and "json" in suffixes.get((*at, "annotations"), ()):
            task = "detection"
        elif names & {"images", "image", "imgs", "leftimg8bit"} and names & _MASKS:
            task = "segmentation"
        elif any(f"{name}annot" in names or f"{name}_labels" in names or f"{name}_masks" in names for name in names):
            task = "segmentation"
    if any(len(parts) <= 3 and parts[-1].lower().endswith(".coco.json") for parts in paths):
        task = "detection"
    if task == "segmentation":
        raise RequestError(
            f"'{where}' looks like data for segmentation, not for classification",
            hint=f"Leave out --task classification. For that task: {_EXPECTED.lower()}.",
        )
    if task:
        raise RequestError(
            f"'{where}' looks like data for detection, not for classification",
            hint="Boxes are read from COCO JSON and VOC XML, where --task does not say classification; text files of"
            f" boxes are not read. For classification: {_EXPECTED.lower()}.",
        )


def fingerprint(parts: Iterable[bytes]) -> str:
    """Return the SHA-256 of ``parts`` as hexadecimal digits, each part set off from the next."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
